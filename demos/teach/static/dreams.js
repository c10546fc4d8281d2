// Dreams of each class: generated on request, and kept only by this page.

import { bytesOf, post } from "./api.js";
import { $, make, plural, showing } from "./dom.js";
import { fromRgb } from "./pictures.js";

const PER_CLASS = 8;

let version = null; // of the model that generated the images

export function startDreams() {
  $("dream-button").addEventListener("click", () =>
    showing($("dream-problem"), async () => show(await post("/api/dream", { per_class: PER_CLASS }))),
  );
  $("dream-cancel").addEventListener("click", () => showing($("dream-problem"), () => post("/api/cancel")));
}

function show({ size, dreams }) {
  $("dreams").replaceChildren(
    ...dreams.map(({ name, images }) => {
      const canvases = images.map((pixels) => fromRgb(bytesOf(pixels), size));
      const pictures = make("div", { className: "images", role: "img" }, ...canvases);
      pictures.setAttribute("aria-label", `${plural(canvases.length, "generated image")} of ${name}`);
      const none = make("p", { className: "soft" }, "No generated image was classified as this class.");
      return make("figure", {}, make("figcaption", {}, name), canvases.length ? pictures : none);
    }),
  );
}

export function showDreams(state) {
  if (version !== null && version !== state.version) $("dreams").replaceChildren(); // they are of a model that has been replaced
  version = state.version;
  const { job } = state;
  $("dream-cancel").hidden = job?.kind !== "dream";
  $("dream-cancel").disabled = Boolean(job?.cancelling);
  const button = $("dream-button");
  button.disabled = job !== null || !state.classes.length;
  button.textContent = job?.kind === "dream" ? (job.steps ? `${job.step} of ${job.steps} steps` : "Generating") : "Generate";
}
