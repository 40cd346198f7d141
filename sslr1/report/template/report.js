"use strict";
// Draws the charts and the samples of report.html. Data comes from charts.py and report.py; text goes in as text, never as HTML.
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

// ---- charts ----------------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-6); k * step <= high + step * 1e-6; k++) out.push(k * step);
  return out;
}

function smoothed(values) {  // mean over the neighbours within a fortieth of the run, of those that are there
  const reach = Math.round(values.length / 40);
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((v) => v !== null);
    return near.length ? near.reduce((a, b) => a + b) / near.length : null;
  });
}

function stacked(series) {  // each with its lower and upper edge, smoothed so that the layers can be told apart
  let below = series[0].values.map(() => 0);
  return series.map((one) => {
    const lower = below;
    below = smoothed(one.values).map((v, i) => lower[i] + (v ?? 0));
    return { ...one, lower, upper: below };
  });
}

function bounds(chart, layers) {
  if (chart.range) return chart.range;
  const drawn = chart.stack ? layers.flatMap((s) => s.upper) : chart.series.flatMap((s) => s.values);
  const found = drawn.filter((v) => v !== null);
  let low = Math.min(...found), high = Math.max(...found);
  if (chart.zero) { low = Math.min(0, low); high *= 1.04; }
  if (low < high) return [low, high];
  if (found.length && low) return [Math.min(0, 2 * low), Math.max(0, 2 * low)];
  return [0, chart.percent ? 0.01 : 1];  // zero throughout, or nothing
}

function draw(svg, chart, steps) {
  const width = svg.clientWidth, height = 200, layers = chart.stack ? stacked(chart.series) : [];
  const [low, high] = bounds(chart, layers);
  const marks = ticks(low, high, 4), labels = marks.map((v) => worded(v, chart.percent));
  const left = 12 + 7 * Math.max(...labels.map((l) => l.length)), right = width - 8, top = 8, bottom = height - 20;
  const first = chart.points ? Math.min(steps[0], ...chart.points.steps) : steps[0], last = steps[steps.length - 1];
  const x = (step) => left + (right - left) * (step - first) / Math.max(1, last - first);
  const y = (value) => bottom - (bottom - top) * (Math.min(Math.max(value, low), high) - low) / (high - low);
  const path = (values, at = steps) => values.map((v, i) => v === null ? "" : `${x(at[i]).toFixed(1)},${y(v).toFixed(1)}`)
    .filter(Boolean).map((point, i) => (i ? "L" : "M") + point).join("");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const add = (tag, attributes, ...children) => svg.append(element(tag, attributes, ...children));

  marks.forEach((v, i) => {
    add("line", { class: "grid", x1: left, x2: right, y1: y(v), y2: y(v) });
    add("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, labels[i]);
  });
  for (const v of ticks(first, Math.max(last, first + 1), width / 90).map(Math.round))
    add("text", { x: x(v), y: height - 4, "text-anchor": x(v) > right - 12 ? "end" : "middle" }, (v || 0).toLocaleString("en"));
  for (const { step, alarm } of chart.marks ?? []) {
    add("line", { x1: x(step), x2: x(step), y1: top, y2: bottom, stroke: "var(--muted)", "stroke-dasharray": "1 3" });
    if (alarm) add("text", { x: x(step), y: top + 4, "text-anchor": "middle" }, "⚠");
  }
  for (const line of chart.lines ?? [])
    add("line", { x1: left, x2: right, y1: y(line.value), y2: y(line.value), stroke: colour(line.colour), "stroke-dasharray": "5 4" });
  for (const layer of layers) {
    const back = path([...layer.lower].reverse(), [...steps].reverse()).replace("M", "L");
    add("path", { d: `${path(layer.upper)}${back}Z`, fill: colour(layer.colour), "fill-opacity": 0.75 });
  }
  if (!chart.stack) for (const one of chart.series) {
    const line = { class: "line", stroke: colour(one.colour) };
    if (!chart.raw) add("path", { ...line, d: path(one.values), "stroke-opacity": chart.series.length > 2 ? 0.12 : 0.25 });
    add("path", { ...line, d: path(chart.raw ? one.values : smoothed(one.values)), "stroke-width": 2 });
  }
  if (chart.points) {
    const { steps: at, values, errors } = chart.points;
    add("path", { class: "line", d: path(values, at), stroke: "var(--ink)", "stroke-opacity": 0.35 });
    values.forEach((v, i) => {
      if (errors) add("line", { x1: x(at[i]), x2: x(at[i]), y1: y(v - errors[i]), y2: y(v + errors[i]), stroke: "var(--ink)", "stroke-width": 1.5 });
      add("circle", { cx: x(at[i]), cy: y(v), r: 3.2, fill: "var(--ink)" });
    });
  }
  return { left, right, first, last, x, top, bottom };
}

function legend(chart) {
  if (chart.series.length === 1 && chart.series[0].name === chart.title) return "";
  const entry = (kind, hue, name) => {
    const key = element("i", { class: kind });
    key.style[kind === "dashed" ? "borderColor" : "background"] = hue;
    return element("span", {}, key, name);
  };
  const out = chart.series.map((s) => entry("", colour(s.colour), s.name));
  for (const line of chart.lines ?? []) out.push(entry("dashed", colour(line.colour), `${line.name}: ${worded(line.value, chart.percent)}`));
  if (chart.points?.steps.length) out.push(entry("dot", "var(--ink)", chart.points.name));
  return element("div", { class: "legend" }, ...out);
}

function figure(chart, { steps, per }) {
  const svg = element("svg", { class: "plot", role: "img", "aria-label": chart.title });
  const tip = element("div", { class: "tip", hidden: "" });
  const out = element("figure", {}, element("figcaption", {}, chart.title), legend(chart), svg, tip);
  let frame, cursor;
  new ResizeObserver(() => { if (svg.clientWidth) { frame = draw(svg, chart, steps); leave(); } }).observe(svg);

  function leave() { tip.hidden = true; cursor?.remove(); }
  function point(event) {
    const place = event.clientX - svg.getBoundingClientRect().left;
    const aimed = frame.first + (frame.last - frame.first) * (place - frame.left) / (frame.right - frame.left);
    const i = steps.reduce((best, s, k) => Math.abs(s - aimed) < Math.abs(steps[best] - aimed) ? k : best, 0);
    leave();
    const at = frame.x(steps[i]);
    cursor = element("line", { x1: at, x2: at, y1: frame.top, y2: frame.bottom, stroke: "var(--muted)" });
    svg.append(cursor);
    const rows = chart.series.map((s) => [s.colour, s.name, s.values[i]]);
    if (chart.stack) rows.push([null, "all", rows.reduce((sum, r) => sum + r[2], 0)]);
    tip.replaceChildren(per > 1 ? `mean of steps ${Math.max(1, steps[i] - per + 1)} to ${steps[i]}` : `step ${steps[i]}`);
    for (const [hue, name, value] of rows) {
      const key = element("i");
      if (hue !== null) key.style.background = colour(hue);
      tip.append(element("div", {}, key, `${name} `, element("b", {}, worded(value, chart.percent))));
    }
    const k = (chart.points?.steps ?? []).findIndex((s) => s <= steps[i] && s > steps[i] - per);
    if (k >= 0) {
      const { values, errors } = chart.points;
      const error = errors ? ` ± ${worded(errors[k], chart.percent)}` : "";
      tip.append(element("div", {}, "held out ", element("b", {}, worded(values[k], chart.percent) + error)));
    }
    for (const { step, words } of chart.marks ?? [])
      if (step <= steps[i] && step > steps[i] - per) tip.append(element("div", {}, words));
    tip.hidden = false;
    tip.style.top = `${svg.offsetTop + 4}px`;
    const x = svg.offsetLeft + at;
    tip.style.left = `${x + 12 + tip.offsetWidth < out.clientWidth ? x + 12 : Math.max(4, x - 12 - tip.offsetWidth)}px`;
  }
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
  return out;
}

for (const section of data.sections) {
  const charts = element("div", { class: "charts" }, ...section.charts.map((chart) => figure(chart, section)));
  const title = element("h2", {}, section.title), id = section.title.toLowerCase().replace(" ", "-");
  const folded = section.folded ? [element("details", {}, element("summary", {}, title), charts)] : [title, charts];
  document.getElementById("charts").append(element("section", { id }, ...folded));
}

// ---- samples ---------------------------------------------------------------------------------------------------------

const SHOWN = 6, TALLEST = 260;  // samples at a time; px of a picture, half of that where there are many
const SIGNS = { exact: "✓", partly: "◐", wrong: "✗", "no format": "∅", "cut off": "✂" };
const GROUPS = {
  "all": () => true,
  "some right, some not": (right, G) => right > 0 && right < G,
  "all right": (right, G) => right === G,
  "none right": (right) => right === 0,
};

function question(sample) {
  const out = element("div", { class: "question" }), width = sample.sizes.reduce((sum, [, w]) => sum + w, 0);
  const height = Math.max(...sample.sizes.map(([h]) => h)), tallest = sample.sizes.length > 3 ? TALLEST / 2 : TALLEST;
  let k = 0, left = 0;
  for (const line of sample.question.split("\n")) {
    const pieces = line.split("<image>"), shown = element("div", { class: pieces.length > 1 ? "pictures" : "words" });
    pieces.forEach((piece, i) => {
      const words = piece.trim() ? [piece] : [];
      if (i === pieces.length - 1) return shown.append(...words);
      const [h, w] = sample.sizes[k++], size = Math.min(w, w * tallest / h);
      const crop = element("svg", { viewBox: `${left} 0 ${w} ${h}`, width: size, role: "img", "aria-label": `picture ${k}` });
      if (sample.picture) crop.append(element("image", { href: sample.picture, width, height }));
      left += w;
      shown.append(element("span", {}, ...words, crop));  // a label stays with its picture
    });
    const row = out.lastElementChild;
    if (pieces.length > 1 && row?.className === "pictures") row.append(...shown.childNodes);  // labelled pictures stand in one row
    else out.append(shown);
  }
  return out;
}

const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;

function card(sample) {
  const right = sample.completions.filter((c) => c.outcome === "exact").length;
  const head = element("h3", {}, `${sample.puzzle}, level ${sample.level}`, element("span", { class: "muted" },
    `step ${sample.step}, slot ${sample.slot} · ${right} of ${sample.completions.length} exact`));
  const answers = sample.completions.map((c) => element("li", { class: `o-${c.outcome.replace(" ", "-")}` },
    element("div", { class: "facts" }, element("b", {}, `${SIGNS[c.outcome]} ${c.outcome}`), ...[
      `reward ${worded(c.reward)}`, `advantage ${signed(c.advantage)}`, `${c.tokens} tokens`, `finish: ${c.finish}`,
    ].map((fact) => element("span", {}, fact))), element("pre", {}, c.text)));
  const missing = sample.picture ? [] : [element("p", { class: "muted" }, "Its picture is not in the run folder.")];
  return element("article", {}, head, ...missing, question(sample), element("p", { class: "expected" }, "Answer: ",
    element("b", {}, sample.answer)), element("ul", { class: "answers" }, ...answers));
}

function browse(root) {
  const { puzzle, outcome, place, back, on } = root.querySelector("form").elements;
  const says = root.querySelector("output"), cards = root.querySelector(".cards");
  const names = ["all", ...new Set(data.samples.map((s) => s.puzzle))];
  puzzle.append(...names.map((name) => element("option", {}, name)));
  outcome.append(...Object.keys(GROUPS).map((name) => element("option", {}, name)));
  let chosen = [];

  function choose() {
    chosen = data.samples.filter((s) => (puzzle.value === "all" || s.puzzle === puzzle.value) &&
      GROUPS[outcome.value](s.completions.filter((c) => c.outcome === "exact").length, s.completions.length));
    place.max = Math.max(0, chosen.length - SHOWN);
    place.value = place.max;  // the newest
    show();
  }
  function show() {
    const start = +place.value, some = chosen.slice(start, start + SHOWN);
    says.textContent = some.length ? `steps ${some[0].step} to ${some[some.length - 1].step}` : "none";
    back.disabled = start === 0;
    on.disabled = start >= +place.max;
    cards.replaceChildren(...some.map(card));
  }
  function turn(by) { place.value = +place.value + by; show(); }
  puzzle.addEventListener("change", choose);
  outcome.addEventListener("change", choose);
  place.addEventListener("input", show);
  back.addEventListener("click", () => turn(-SHOWN));
  on.addEventListener("click", () => turn(SHOWN));
  root.hidden = false;
  choose();
}

if (data.samples.length) browse(document.getElementById("samples"));
