// The page: the server's state, shown by parts that each use some of its fields.

import { follow, getJson } from "./api.js";
import { startCamera } from "./camera.js";
import { showChart, startChart } from "./chart.js";
import { $, plural, size } from "./dom.js";
import { showDreams, startDreams } from "./dreams.js";
import { showKept, startKept } from "./kept.js";
import { showKnown, startKnown } from "./known.js";
import { showTeaching, startTeaching } from "./teach.js";
import { showTrying, startTrying } from "./try.js";

/** Calls `show` only when the named parts of the state have changed, so that elements do not lose focus without reason. */
function whenChanged(names, show) {
  let before = null;
  return (state) => {
    const now = JSON.stringify(names.map((name) => state[name]));
    if (now !== before) show(state);
    before = now;
  };
}

const PARTS = [
  whenChanged(["model", "classes", "kept"], showModel),
  whenChanged(["ready", "draft", "job", "outcome", "model", "tasks"], showTeaching),
  whenChanged(["version", "classes", "job", "ready", "exported"], showTrying),
  whenChanged(["tasks"], showKnown),
  whenChanged(["tasks", "history", "ready"], showChart),
  whenChanged(["version", "kept", "held", "job"], showKept),
  whenChanged(["version", "job", "classes"], showDreams),
];

function showModel({ model, classes, kept }) {
  const side = model.image_size;
  const origin = model.pretrained ? "pretrained" : "from scratch";
  $("model-line").textContent = `${model.backbone}, ${origin}, ${side} × ${side} pixels · ${plural(classes.length, "class", "classes")} · ${size(kept.bytes)}`;
}

async function start() {
  for (const begin of [startCamera, startTeaching, startTrying, startKnown, startChart, startKept, startDreams]) begin();
  const { runtime, limits } = await getJson("/api/state");
  $("class-name").maxLength = limits.name;
  $("new-name").maxLength = limits.name;
  follow(
    (state) => {
      for (const show of PARTS) show({ ...state, runtime });
      document.body.dataset.ready = "true";
    },
    () => void ($("model-line").textContent = "The server does not answer; start it again with make teach"),
  );
}

start();
