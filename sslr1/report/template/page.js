"use strict";
// What every page has: elements, pictures that a click enlarges, and the reloading of a page whose run goes on.
// Data is JSON in the page, from Python; text goes in as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const node = ["svg", "g", "path", "line", "circle", "text", "image"].includes(tag)
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const colour = (number) => number < 0 ? "var(--ink)" : `var(--c${number % 8})`;

function worded(value, percent) {
  if (value === null) return "–";
  if (percent) return `${+(100 * value).toPrecision(3)}%`;
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(3));
}

// ---- pictures --------------------------------------------------------------------------------------------------------

// A puzzle's pictures lie side by side in one: `picture` its address, `sizes` the [height, width] of each.
function crop(puzzle, k, attributes = {}) {
  const { sizes } = puzzle, [h, w] = sizes[k], left = sizes.slice(0, k).reduce((sum, [, w]) => sum + w, 0);
  const out = element("svg", { viewBox: `${left} 0 ${w} ${h}`, ...attributes });
  const width = sizes.reduce((sum, [, w]) => sum + w, 0), height = Math.max(...sizes.map(([h]) => h));
  if (puzzle.picture) out.append(element("image", { href: puzzle.picture, width, height }));
  return out;
}

// Its question, with the pictures where they belong: `tallest` px each at most, half of that where there are many.
function question(puzzle, tallest) {
  const out = element("div", { class: puzzle.sizes.length > 3 ? "question many" : "question" });
  let k = 0;
  for (const line of puzzle.question.split("\n")) {
    const pieces = line.split("<image>"), shown = element("div", { class: pieces.length > 1 ? "pictures" : "words" });
    pieces.forEach((piece, i) => {
      const words = piece.trim() ? [piece] : [];
      if (i === pieces.length - 1) return shown.append(...words);
      const [h, w] = puzzle.sizes[k], most = puzzle.sizes.length > 3 ? tallest / 2 : tallest, number = k++;
      const button = element("button", { type: "button", class: "picture", "aria-label": `enlarge picture ${k}` },
        crop(puzzle, number, { width: Math.min(w, w * most / h), role: "img", "aria-label": `picture ${k}` }));
      button.addEventListener("click", () => enlarge(puzzle, number, button));
      const label = /^\s*\w{1,3}:\s*$/.test(piece);  // which stays with its picture; other words may stand above it
      shown.append(element("span", label ? { class: "labelled" } : {}, ...words, button));
    });
    const row = out.lastElementChild;
    if (pieces.length > 1 && row?.className === "pictures") row.append(...shown.childNodes);  // labelled pictures stand in one row
    else out.append(shown);
  }
  return out;
}

// One picture as large as the screen; another click closes it, ← and → show the puzzle's others.
function enlarge(puzzle, k, from) {
  const dialog = element("dialog", { class: "enlarged", "aria-label": "an enlarged picture" }), count = puzzle.sizes.length;
  function show(number) {
    k = (number + count) % count;
    const [h, w] = puzzle.sizes[k], size = Math.min(innerWidth * 0.96 / w, innerHeight * 0.86 / h);
    const words = count > 1 ? `picture ${k + 1} of ${count} · ← → for the others` : "";
    dialog.replaceChildren(crop(puzzle, k, { width: w * size, height: h * size }), element("p", {}, words));
  }
  show(k);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => { dialog.remove(); from.focus({ preventScroll: true }); });
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) show(k + by);
    event.stopPropagation();
  });
  document.body.append(dialog);
  dialog.showModal();
}

// ---- following a run -------------------------------------------------------------------------------------------------

// The page loads itself again while its run goes on, but not under somebody's hands, and not for ever: a run that was
// killed has no last word. What is chosen and open stays so.
function follow({ every_s, written_s, stale_s }) {
  const key = `sslr1 ${location.pathname}`, inputs = () => [...document.querySelectorAll("form select, form input")];
  const folds = () => [...document.querySelectorAll("details")];
  try {
    const { values, open } = JSON.parse(sessionStorage.getItem(key)) ?? { values: [], open: [] };
    folds().forEach((fold, i) => { fold.open = open[i] ?? fold.open; });
    inputs().forEach((input, i) => {
      if (values[i] == null || input.value === values[i]) return;
      input.value = values[i];
      input.dispatchEvent(new Event(input.type === "range" ? "input" : "change"));
    });
  } catch { /* a browser that keeps nothing for a page from disk */ }
  const kept = ({ type, value, max }) => type === "range" && value === max ? null : value;  // at the newest: stays there
  function look() {
    if (Date.now() / 1000 - written_s > stale_s) {
      document.getElementById("refresh").textContent =
        `nothing new for ${Math.round(stale_s / 60)} minutes: the run has ended without a word, or takes long over a step; load this page again to see`;
      return;
    }
    const busy = document.hidden || document.querySelector("dialog, .tip:not([hidden])") || document.activeElement?.matches("select, input");
    if (busy) return setTimeout(look, 1000);
    try {
      sessionStorage.setItem(key, JSON.stringify({ values: inputs().map(kept), open: folds().map((f) => f.open) }));
    } catch { /* as above */ }
    location.reload();
  }
  setTimeout(look, 1000 * every_s);
}
addEventListener("load", () => { if (data.refresh) follow(data.refresh); });

