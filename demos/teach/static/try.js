// One picture, classified by the server and by this browser from the same pixels.

import { bytesOf, post, send } from "./api.js";
import { openCamera } from "./camera.js";
import { classify } from "./classifier.js";
import { $, filled, make, plural, showing, takesFiles } from "./dom.js";
import { copyTo, decoded, png } from "./pictures.js";

const SHOWN = 5; // classes

let state = null;
let picture = null; // the canvas that is classified
let answered = null; // the server's answer
let asking = 0; // the number of the last request: an answer to an earlier request is not shown
let comparing = 0; // the number of the request that the browser is answering; 0: none
let truth = ""; // the true class of the picture, if known
let counted = false; // whether this picture is in the tally
let tally = { version: null, right: 0, n: 0 };

export function startTrying() {
  takesFiles($("try-drop"), $("try-files"), $("try-input"), ([file]) => file && take(() => decoded(file)));
  $("try-camera").addEventListener("click", () =>
    openCamera(async (blob) => take(() => decoded(blob)), true),
  );
  $("try-sample").addEventListener("click", () => {
    let name = "";
    take(async () => {
      const sample = await post("/api/sample");
      name = sample.name;
      return decoded(new Blob([bytesOf(sample.png)], { type: "image/png" }));
    }, () => name);
  });
  $("truth").addEventListener("change", () => {
    truth = $("truth").value;
    count();
  });
}

async function take(read, named = () => "") {
  await showing($("try-problem"), async () => {
    const canvas = await read();
    picture = canvas;
    truth = named();
    counted = false;
    copyTo($("try-picture"), picture);
    await ask();
  });
}

/** Asks both. The server answers while a task is learnt; the browser's file is exported when nothing else runs. */
async function ask() {
  const question = ++asking;
  const answer = await send("/api/predict", await png(picture));
  if (question !== asking) return;
  answered = answer;
  $("answer").hidden = false;
  $("agreement").textContent = "";
  showVerdict();
  showBars($("server-answer"), answer.classes, answer.probabilities);
  showTruth();
  count();
  await askBrowser(question);
}

async function askBrowser(question) {
  $("browser-answer").replaceChildren();
  $("answer").dataset.compared = "";
  if (!state.runtime) {
    return note("This part is off, because onnxruntime-web is not installed. Install npm, run make runtime, and reload the page.");
  }
  if (state.job !== null) return note("The browser answers when nothing else runs: the model is exported then.");
  comparing = question;
  note(state.exported ? "Loading" : "The server is exporting the model");
  try {
    const { version, probabilities } = await classify(picture);
    if (question !== asking) return;
    if (version !== answered.version) return void ask().catch(() => {});
    note("");
    showBars($("browser-answer"), answered.classes, probabilities);
    const difference = Math.max(...probabilities.map((value, place) => Math.abs(value - answered.probabilities[place])));
    $("agreement").textContent = `Both used the same pixels; their probabilities differ by ${shown(difference)}.`;
    $("answer").dataset.compared = JSON.stringify({ server: answered.probabilities, browser: probabilities });
  } catch (error) {
    if (question === asking) note(`The browser cannot answer: ${error.message}.`);
  } finally {
    if (comparing === question) comparing = 0;
  }
}

const shown = (difference) => (difference < 1e-6 ? "less than 0.000001" : `${difference.toFixed(6)} at most`);
const note = (text) => void ($("browser-note").textContent = text);

function showVerdict() {
  const best = answered.probabilities.indexOf(Math.max(...answered.probabilities));
  const score = `${(100 * answered.probabilities[best]).toFixed(1)} %`;
  const name = answered.label ?? "None of the known classes";
  const detail = answered.label === null ? `the most probable one is ${answered.classes[best]}, below its threshold` : score;
  $("verdict").replaceChildren(name, make("span", { className: "soft" }, detail));
}

function showBars(list, classes, probabilities) {
  const order = classes.map((_, place) => place).sort((a, b) => probabilities[b] - probabilities[a]);
  list.replaceChildren(
    ...order.slice(0, SHOWN).map((place) => {
      const percent = `${(100 * probabilities[place]).toFixed(1)} %`;
      const track = make("span", { className: "track" }, filled(probabilities[place]));
      return make("li", {}, make("span", { className: "name" }, classes[place]), make("span", {}, percent), track);
    }),
  );
}

function showTruth() {
  const names = answered.classes;
  $("truth").replaceChildren(make("option", { value: "" }, "not selected"), ...names.map((name) => make("option", { value: name }, name)));
  $("truth").value = names.includes(truth) ? truth : "";
}

/** Counts the picture once, when its true class has been selected; the pictures themselves are not kept. */
function count() {
  if (answered === null || counted || !truth || !answered.classes.includes(truth)) return;
  if (tally.version !== answered.version) tally = { version: answered.version, right: 0, n: 0 };
  counted = true;
  tally.n += 1;
  tally.right += answered.label === truth;
  showTally();
}

function showTally() {
  const current = tally.n > 0 && tally.version === state.version;
  $("tally").textContent = current
    ? `${tally.right} right of ${plural(tally.n, "picture")} tried here since the model last changed.`
    : "";
}

/** Shows the part of the state that this module uses. */
export function showTrying(now) {
  const before = state;
  state = now;
  $("try-sample").hidden = !state.ready.samples;
  $("try-hint").hidden = state.classes.length > 0;
  for (const id of ["try-files", "try-camera", "try-sample"]) $(id).disabled = !state.classes.length;
  showTally();
  const changed = before !== null && before.version !== state.version;
  if (picture === null) return;
  if (changed) {
    counted = true; // it was counted for the previous model, or not at all
    ask().catch((error) => void ($("try-problem").textContent = error.message));
  } else if (before?.job && !state.job && answered !== null && comparing !== asking && !$("answer").dataset.compared) {
    askBrowser(asking); // the operation that it waited for has ended
  }
}
