// Pictures from the camera, in a dialog.

import { $, plural, showing } from "./dom.js";

const BURST = 20;
const PAUSE = 200; // milliseconds between the pictures of a burst

let take = null; // the function that gets the pictures
let taken = 0;
let stream = null;

/** Opens the camera; `receive(blob)` gets each picture, and the dialog closes after one if `single`. */
export async function openCamera(receive, single) {
  take = receive;
  taken = 0;
  $("camera-count").textContent = "";
  $("camera-many").hidden = single;
  $("camera-one").onclick = async () => {
    if ((await shoot()) && single) $("camera-dialog").close();
  };
  ready(false);
  $("camera-dialog").showModal();
  await showing($("camera-problem"), async () => {
    if (!navigator.mediaDevices) throw new Error("the browser gives this page no camera; open it at 127.0.0.1 or localhost");
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 480 } });
    } catch (error) {
      throw new Error(`the camera cannot be used (${error.message}); allow it in the browser, or drop files instead`);
    }
    $("camera-video").srcObject = stream;
    await $("camera-video").play();
    ready(true);
  });
}

/** Enables the buttons if the camera is running. */
function ready(plays) {
  $("camera-one").disabled = $("camera-many").disabled = !plays;
}

async function shoot() {
  const video = $("camera-video");
  if (!video.videoWidth) return false;
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  const went = await showing($("camera-problem"), () => take(blob));
  if (went) $("camera-count").textContent = `${plural(++taken, "picture")} taken`;
  return went;
}

export function startCamera() {
  $("camera-many").addEventListener("click", async () => {
    for (let n = 0; n < BURST && $("camera-dialog").open && (await shoot()); n++) {
      await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
  });
  $("camera-close").addEventListener("click", () => $("camera-dialog").close());
  $("camera-dialog").addEventListener("close", () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    $("camera-video").srcObject = null;
  });
}
