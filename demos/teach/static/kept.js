// Every byte that the model keeps, by role, and the pictures that are in memory now.

import { getJson, post } from "./api.js";
import { $, filled, make, plural, showing, size, whole } from "./dom.js";

let version = null;

export function startKept() {
  $("tensors").addEventListener("toggle", listTensors);
  $("onnx-button").addEventListener("click", () => showing($("kept-problem"), download));
}

export function showKept(state) {
  const { kept, held } = state;
  $("kept-total").replaceChildren(size(kept.bytes), " ", make("span", { className: "soft" }, `${whole(kept.bytes)} bytes in the model`));
  $("kept-bar").replaceChildren(...kept.roles.map(({ bytes }) => filled(bytes / kept.bytes)));
  $("kept-table").tBodies[0].replaceChildren(
    ...kept.roles.map(({ role, bytes, tensors, from_data: fromData }) => {
      const source = make("span", { className: "soft" }, fromData ? "derived from pictures" : "not derived from pictures");
      return make("tr", {}, make("th", { scope: "row" }, role, source), make("td", {}, whole(tensors)), make("td", {}, whole(bytes)));
    }),
  );
  $("kept-note").textContent = "Nothing else is kept: no picture, no feature of a picture, no generator and no generated image.";
  const rows = [["of the task that is being collected, until it has been taught", held.task]];
  if (held.ready.pictures) rows.push([`that came with the page (${state.ready.title})`, held.ready]);
  $("held-table").tBodies[0].replaceChildren(
    ...rows.map(([name, { pictures, bytes }]) =>
      make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, whole(pictures)), make("td", {}, size(bytes))),
    ),
  );
  if (version !== state.version) {
    version = state.version;
    if ($("tensors").open) listTensors();
  }
  $("onnx-button").disabled = !state.classes.length || state.job !== null;
}

async function listTensors() {
  if (!$("tensors").open) return;
  const tensors = await getJson("/api/kept");
  $("tensors").querySelector("tbody").replaceChildren(
    ...tensors.map(({ name, kind, shape, bytes, images }) => {
      const behind = images?.length ? `, of ${plural(images.reduce((sum, n) => sum + n, 0), "picture")}` : "";
      const about = make("span", { className: "soft" }, `${kind.replaceAll("_", " ")}, ${shape.join(" × ") || 1}${behind}`);
      return make("tr", {}, make("th", { scope: "row" }, name, about), make("td", {}, whole(bytes)));
    }),
  );
}

async function download() {
  await post("/api/export");
  make("a", { href: "/api/model.onnx", download: "model.onnx" }).click();
}
