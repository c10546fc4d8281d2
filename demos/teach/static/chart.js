// Accuracy by task: one row per task, one point per commit, all rows on the same scale from 0 to 100 %.

import { $, listed, make } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 74;
const LONGEST = 32; // characters of a name that are shown
const PLOT = 40; // pixels from 0 to 100 %
const NAME = 18; // pixels of a row's name, above its plot
const RIGHT = 72;

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Rows of `{ name, points }`; a point is a share in [0, 1], or null before the task was taught. Forgotten classes are left out. */
function rowsOf({ tasks, classes, history }) {
  const measured = new Set(history.flatMap(({ right }) => Object.keys(right)));
  const rows = tasks.map((names) => [...new Set(names)].filter((name) => measured.has(name))).filter((names) => names.length);
  const named = rows.map((names) => ({ name: listed(names), names }));
  if (rows.length > 1) named.unshift({ name: "All", names: classes.filter((name) => measured.has(name)) });
  return named.map(({ name, names }) => ({ name, points: history.map(({ right }) => share(right, names)) }));
}

function share(right, names) {
  const counts = names.filter((name) => name in right).map((name) => right[name]);
  const n = counts.reduce((sum, [, images]) => sum + images, 0);
  return n ? counts.reduce((sum, [good]) => sum + good, 0) / n : null;
}

const percent = (value) => (value === null ? "not taught" : `${(100 * value).toFixed(1)} %`);

let shown = null; // the state that is drawn

/** Draws the chart again at the available width, so that the text keeps its size. */
export function startChart() {
  new ResizeObserver(() => shown && showChart(shown)).observe($("chart"));
}

export function showChart(state) {
  shown = state;
  const { history } = state;
  $("chart-title").hidden = !history.length;
  if (!history.length) {
    $("chart").replaceChildren();
    $("chart-note").textContent = state.classes.length
      ? "None of your own pictures is held back to measure with. Try some, and select their true class: right answers are counted."
      : "";
    return;
  }
  const rows = rowsOf(state);
  $("chart").replaceChildren(drawn(rows, history), table(rows, history));
  const pictures = Object.values(history.at(-1).right).reduce((sum, [, n]) => sum + n, 0);
  $("chart-note").textContent =
    `Right answers on ${pictures} pictures held back from ${state.ready.title}, which are never used for learning; all known classes compete. ` +
    "Each row shows 0 to 100 %, with a point for each change of the model.";
}

function drawn(rows, history) {
  const height = rows.length * ROW + 16;
  const width = Math.max(260, $("chart").clientWidth);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const span = width - RIGHT - 16;
  const x = (place) => 8 + (history.length > 1 ? (place * span) / (history.length - 1) : span / 2);
  rows.forEach(({ name, points }, row) => {
    const kind = name === "All" ? "all" : "";
    const y = (value) => row * ROW + NAME + 6 + PLOT * (1 - value);
    for (const value of [0, 1]) chart.append(svg("line", { class: "grid", x1: 0, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    chart.append(svg("text", { class: `name ${kind}`, x: 0, y: row * ROW + 12 }, short(name)));
    const known = points.map((value, place) => [x(place), value]).filter(([, value]) => value !== null);
    chart.append(svg("polyline", { class: `line ${kind}`, points: known.map(([at, value]) => `${at},${y(value)}`).join(" ") }));
    for (const [at, value] of known) chart.append(svg("circle", { class: kind, cx: at, cy: y(value), r: 3.5 }));
    const last = known.at(-1);
    if (last) chart.append(svg("text", { class: `value ${kind}`, x: width, y: y(0.5) + 4, "text-anchor": "end" }, percent(last[1])));
  });
  const bottom = rows.length * ROW + 10;
  chart.append(svg("text", { x: 0, y: bottom }, label(history[0].label)));
  if (history.length > 1) {
    chart.append(svg("text", { x: width - RIGHT, y: bottom, "text-anchor": "end" }, label(history.at(-1).label)));
  }
  return chart;
}

const short = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text);
const label = (text) => ({ learnt: "first task", instant: "instant commit", adapted: "adapted" })[text] ?? short(text);

/** The same figures for a screen reader. */
function table(rows, history) {
  const head = make("tr", {}, make("th", {}, "Classes"), ...history.map((entry) => make("th", {}, label(entry.label))));
  const body = rows.map(({ name, points }) => make("tr", {}, make("th", {}, name), ...points.map((one) => make("td", {}, percent(one)))));
  const whole = make("table", {}, make("caption", {}, "Accuracy by task"), head, ...body);
  return make("div", { className: "visually-hidden" }, whole); // a table cannot be made that small without the div
}
