// The classes, by task; each opens a dialog that renames or forgets it.

import { post } from "./api.js";
import { $, make, showing } from "./dom.js";

let current = "";

export function startKnown() {
  $("class-form").addEventListener("submit", (event) => {
    event.preventDefault();
    change(() => post("/api/rename", { name: current, to: $("new-name").value }));
  });
  $("forget-button").addEventListener("click", () => change(() => post("/api/forget", { name: current })));
  $("class-close").addEventListener("click", () => $("class-dialog").close());
}

async function change(work) {
  if (await showing($("class-problem"), work)) $("class-dialog").close();
}

function open(name) {
  current = name;
  $("class-title").textContent = name;
  $("new-name").value = name;
  $("class-problem").textContent = "";
  $("class-dialog").showModal();
}

export function showKnown({ tasks }) {
  if (!tasks.length) {
    $("known").replaceChildren(make("p", { className: "soft" }, "Nothing yet."));
    return;
  }
  $("known").replaceChildren(
    ...tasks.map((names, number) => {
      const chips = [...new Set(names)].map((name) => {
        const chip = make("button", { type: "button", className: "chip" }, name);
        chip.setAttribute("aria-haspopup", "dialog");
        chip.setAttribute("aria-label", `${name}: rename or forget`);
        chip.addEventListener("click", () => open(name));
        return chip;
      });
      return make("div", { className: "task" }, make("span", {}, `Task ${number + 1}`), make("div", { className: "chips" }, ...chips));
    }),
  );
}
