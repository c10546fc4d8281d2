// What the model dreams of each class: generated when asked for, and held by this page alone.

import { bytesOf, post } from "./api.js";
import { $, make, showing } from "./dom.js";
import { fromRgb } from "./pictures.js";

const PER_CLASS = 8;

let version = null; // of the model that the images are of

export function startDreams() {
  $("dream-button").addEventListener("click", () =>
    showing($("dream-problem"), async () => show(await post("/api/dream", { per_class: PER_CLASS }))),
  );
  $("dream-cancel").addEventListener("click", () => showing($("dream-problem"), () => post("/api/cancel")));
}

function show({ size, images }) {
  const byClass = Map.groupBy ? Map.groupBy(images, ({ name }) => name) : grouped(images);
  $("dreams").replaceChildren(
    ...[...byClass].map(([name, some]) => {
      const canvases = some.slice(0, PER_CLASS).map(({ pixels }) => fromRgb(bytesOf(pixels), size));
      const pictures = make("div", { className: "images", role: "img" }, ...canvases);
      pictures.setAttribute("aria-label", `${canvases.length} generated images of ${name}`);
      return make("figure", {}, make("figcaption", {}, name), pictures);
    }),
  );
}

function grouped(images) {
  const found = new Map();
  for (const image of images) found.set(image.name, [...(found.get(image.name) ?? []), image]);
  return found;
}

export function showDreams(state) {
  if (version !== null && version !== state.version) $("dreams").replaceChildren(); // of a model that is gone
  version = state.version;
  const { job } = state;
  $("dream-cancel").hidden = job?.kind !== "dream";
  $("dream-cancel").disabled = Boolean(job?.cancelling);
  const button = $("dream-button");
  button.disabled = job !== null || !state.classes.length;
  button.textContent = job?.kind === "dream" ? (job.steps ? `${job.step} of ${job.steps} steps` : "Generating") : "Generate";
}
