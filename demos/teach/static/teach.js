// The task that is being collected, the button that teaches it, and its progress.

import { post, send } from "./api.js";
import { openCamera } from "./camera.js";
import { $, filled, listed, make, plural, sentence, showing, takesFiles, whole } from "./dom.js";
import { decoded, thumbnail } from "./pictures.js";

const SUGGESTED = 2; // ready classes that are chosen by default
const MOST_THUMBNAILS = 12;
const STAGES = {
  plan: "Measuring how fast this machine is",
  instant: "A first model, from class means",
  dream: "Dreaming of the classes it knows",
  learn: "Training the network",
  refine: "Refining the head",
  lda: "Computing the head in closed form",
};
const COMMITS = { instant: "The model now knows the new classes", adapted: "The adapted network answers now" };

let chosen = new Set(); // ready classes
let offered = ""; // the options of the current choice, which is reset after every task
let state = null;
const thumbnails = new Map(); // of collected classes, only in this page

export function startTeaching() {
  takesFiles($("teach-drop"), $("teach-files"), $("teach-input"), (files) => add(files));
  $("teach-camera").addEventListener("click", () =>
    showing($("teach-problem"), async () => {
      className();
      await openCamera((blob) => upload(className(), blob), false);
    }),
  );
  $("teach-button").addEventListener("click", () =>
    showing($("teach-problem"), async () => {
      const adapt = document.querySelector("input[name=mode]:checked").value === "adapt";
      await post("/api/teach", { ready: [...chosen], adapt });
    }),
  );
  $("cancel-button").addEventListener("click", () => showing($("teach-problem"), () => post("/api/cancel")));
}

function className() {
  const name = $("class-name").value.trim();
  if (name) return name;
  $("class-name").focus();
  throw new Error("name the class first, then add its pictures");
}

async function add(files) {
  const refused = [];
  const named = await showing($("teach-problem"), async () => {
    const name = className();
    for (const file of files) {
      try {
        await upload(name, file);
      } catch (error) {
        refused.push(`${file.name}: ${error.message}`);
      }
    }
  });
  if (named && refused.length) {
    const more = refused.length > 1 ? ` (and ${plural(refused.length - 1, "more file")})` : "";
    $("teach-problem").textContent = sentence(refused[0] + more);
  }
}

async function upload(name, blob) {
  await send(`/api/pictures?class=${encodeURIComponent(name)}`, blob);
  const shown = thumbnails.get(name) ?? [];
  thumbnails.set(name, shown);
  if (shown.length < MOST_THUMBNAILS) {
    const small = await decoded(blob).then((canvas) => thumbnail(canvas), () => null);
    if (small !== null) shown.push(small);
    showDraft();
  }
}

/** Shows the part of the state that this module uses. */
export function showTeaching(now) {
  state = now;
  const names = state.ready.classes.map(({ name }) => name);
  const teaching = state.job?.kind === "teach";
  const key = JSON.stringify([names, state.classes, teaching]);
  if (key !== offered) {
    offered = key;
    chosen = new Set(state.draft.length ? [] : names.slice(0, SUGGESTED));
    showReady();
  }
  for (const name of thumbnails.keys()) if (!state.draft.some((one) => one.name === name) && !teaching) thumbnails.delete(name);
  showDraft();
  showProgress();
  showButton();
}

function showReady() {
  $("ready").hidden = !state.ready.classes.length;
  $("ready-title").textContent = state.ready.title;
  $("ready-classes").replaceChildren(
    ...state.ready.classes.map(({ name, count }) => {
      const chip = make("button", { type: "button", className: "chip", title: plural(count, "picture") }, name);
      chip.setAttribute("aria-pressed", chosen.has(name));
      chip.addEventListener("click", () => {
        if (!chosen.delete(name)) chosen.add(name);
        chip.setAttribute("aria-pressed", chosen.has(name));
        showButton();
      });
      return chip;
    }),
  );
}

function showDraft() {
  if (state === null) return;
  $("draft").replaceChildren(
    ...state.draft.map(({ name, count }) => {
      const remove = make("button", { type: "button" }, "Discard");
      remove.setAttribute("aria-label", `Discard ${name}`);
      remove.disabled = state.job !== null;
      remove.addEventListener("click", () => showing($("teach-problem"), () => post("/api/discard", { name })));
      const thumbs = make("span", { className: "thumbs" }, ...(thumbnails.get(name) ?? []));
      const text = make("span", {}, make("span", { className: "name" }, name), " ", make("span", { className: "soft" }, plural(count, "picture")));
      return make("li", {}, text, thumbs, remove);
    }),
  );
}

function showButton() {
  const names = [...state.draft.map(({ name }) => name), ...chosen];
  const button = $("teach-button");
  button.textContent = names.length && names.length <= 4 ? `Teach ${listed(names)}` : `Teach ${names.length ? `${names.length} classes` : ""}`.trim();
  button.disabled = state.job !== null || !names.length;
  $("cancel-button").hidden = state.job?.kind !== "teach";
  $("cancel-button").disabled = Boolean(state.job?.cancelling);
  $("mode").hidden = !state.model.can_adapt || !state.tasks.length;
}

function showProgress() {
  const { job, outcome } = state;
  $("progress").hidden = job?.kind !== "teach";
  if (job?.kind === "teach") $("stages").replaceChildren(...stageItems(job));
  $("outcome").className = `outcome ${outcome?.kind ?? ""}`;
  const text = job?.kind === "teach" ? announced(job) : outcome ? sentence(outcome.text) : "";
  if ($("outcome").textContent !== text) $("outcome").textContent = text; // so that a screen reader reads each text once
}

/** The text for screen readers while a task is learnt: its milestones, not each step. */
function announced(job) {
  if (job.cancelling) return "Cancelling after the current step.";
  if (job.commits.includes("instant")) return `The model now knows ${listed(job.names)}; the network is being adapted.`;
  return `Teaching ${listed(job.names)}.`;
}

function stageItems(job) {
  const items = job.done.map((stage) => item("done", STAGES[stage] ?? stage));
  const first = job.done.indexOf("instant");
  if (job.commits.includes("instant") && first >= 0) items.splice(first + 1, 0, item("done commit", COMMITS.instant));
  if (job.commits.includes("adapted")) items.push(item("done commit", COMMITS.adapted));
  else if (job.done.at(-1) !== job.stage || !job.done.length) items.push(running(job));
  return items;
}

function item(kind, text) {
  return make("li", { className: kind }, make("span", { className: "mark" }), make("span", {}, text));
}

function running(job) {
  const row = item("now", STAGES[job.stage] ?? (job.stage || "Reading the pictures"));
  const count = job.steps ? `${whole(job.step)} of ${plural(job.steps, "step")}` : "";
  const bar = make("div", { className: "bar", role: "progressbar" }, filled(job.steps ? job.step / job.steps : 0));
  bar.setAttribute("aria-label", row.textContent);
  bar.classList.toggle("unknown", !job.steps);
  if (job.steps) {
    bar.setAttribute("aria-valuemin", 0);
    bar.setAttribute("aria-valuemax", job.steps);
    bar.setAttribute("aria-valuenow", job.step);
  } else {
    bar.firstChild.style.width = "";
  }
  row.append(make("span", { className: "count" }, count), bar);
  return row;
}
