// Small helpers over the DOM. Text is always set as text: a class name is never read as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children: make("li", { className: "now" }, "text", other). */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** A span that fills a share of its parent's width, 0 to 1. */
export function filled(share) {
  const span = make("span");
  span.style.width = `${100 * share}%`;
  return span;
}

/** Runs `work` and shows an error that it throws in `place`, as a sentence. Returns whether it succeeded. */
export async function showing(place, work) {
  place.textContent = "";
  try {
    await work();
    return true;
  } catch (error) {
    place.textContent = sentence(error.message);
    return false;
  }
}

/** With a capital first letter and a full stop. */
export function sentence(text) {
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}

export const whole = (number) => number.toLocaleString("en");

/** Bytes in readable form: "714 kB". */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} bytes`;
  const [unit, divisor] = bytes < 1e6 ? ["kB", 1e3] : ["MB", 1e6];
  const value = bytes / divisor;
  return `${value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
}

export const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;

/** "0", "0 and 1", "0, 1 and 2". */
export function listed(names) {
  return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

/** A place to drop files on, with a button that chooses them. */
export function takesFiles(zone, button, input, take) {
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = "";
  });
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    take([...event.dataTransfer.files]);
  });
}
