// Draws the charts of report.html and compare.html, from what charts.py says of them.

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-6); k * step <= high + step * 1e-6; k++) out.push(k * step);
  return out;
}

function smoothed(values) {  // mean over the neighbours within a fortieth of the run, of those that are there
  const reach = Math.round(values.length / 40);
  const end = values.findLastIndex((v) => v !== null);  // of two runs one may be shorter
  return values.map((_, i) => {
    if (i > end) return null;
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

function decades(low, high) {  // of a logarithmic axis: all powers of ten, or as many as there is room for
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), by = Math.ceil((last - first + 1) / 5);
  return Array.from({ length: Math.floor((last - first) / by) + 1 }, (_, k) => 10 ** (first + k * by));
}

function bounds(chart, layers) {
  if (chart.range) return chart.range;
  const drawn = chart.stack ? layers.flatMap((s) => s.upper) : chart.series.flatMap((s) => s.values);
  const found = drawn.filter((v) => v !== null && (!chart.log || v > 0));
  if (chart.log) {  // what is 0 lies at the bottom
    const high = Math.max(...found);
    return [Math.max(Math.min(...found), high / 1e6) / 1.1, high * 1.1];
  }
  let low = Math.min(...found), high = Math.max(...found);
  if (chart.zero) { low = Math.min(0, low); high *= 1.04; }
  if (low < high) return [low, high];
  if (found.length && low) return [Math.min(0, 2 * low), Math.max(0, 2 * low)];
  return [0, chart.percent ? 0.01 : 1];  // zero throughout, or nothing
}

function draw(svg, chart, steps) {
  const width = svg.clientWidth, height = 200, layers = chart.stack ? stacked(chart.series) : [];
  const [low, high] = bounds(chart, layers);
  const marks = chart.log ? decades(low, high) : ticks(low, high, 4), labels = marks.map((v) => worded(v, chart.percent));
  const left = 12 + 7 * Math.max(...labels.map((l) => l.length)), right = width - 8, top = 8, bottom = height - 20;
  const evaluated = (chart.points ?? []).flatMap((p) => p.steps);
  const first = Math.min(steps[0], ...evaluated), last = Math.max(steps[steps.length - 1], ...evaluated);
  const x = (step) => left + (right - left) * (step - first) / Math.max(1, last - first);
  const scale = chart.log ? Math.log : (value) => value;
  const y = (value) => bottom - (bottom - top) * (scale(Math.min(Math.max(value, low), high)) - scale(low)) / (scale(high) - scale(low));
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
  for (const { steps: at, values, errors, colour: number } of chart.points ?? []) {
    const stroke = colour(number);
    add("path", { class: "line", d: path(values, at), stroke, "stroke-opacity": 0.35 });
    values.forEach((v, i) => {
      if (errors) add("line", { x1: x(at[i]), x2: x(at[i]), y1: y(v - errors[i]), y2: y(v + errors[i]), stroke, "stroke-width": 1.5 });
      add("circle", { cx: x(at[i]), cy: y(v), r: 3.2, fill: stroke });
    });
  }
  return { left, right, first, last, x, top, bottom };
}

function legend(chart) {
  if (chart.series.length === 1 && chart.series[0].name === chart.title && !chart.log) return "";
  const entry = (kind, hue, name) => {
    const key = element("i", { class: kind });
    key.style[kind === "dashed" ? "borderColor" : "background"] = hue;
    return element("span", {}, key, name);
  };
  const out = chart.series.map((s) => entry("", colour(s.colour), s.name));
  for (const line of chart.lines ?? []) out.push(entry("dashed", colour(line.colour), `${line.name}: ${worded(line.value, chart.percent)}`));
  for (const points of chart.points ?? []) if (points.steps.length) out.push(entry("dot", colour(points.colour), points.name));
  if (chart.log) out.push(element("span", {}, "logarithmic"));
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
    for (const { steps: at, values, errors, name, colour: number } of chart.points ?? []) {
      const k = at.findIndex((s) => s <= steps[i] && s > steps[i] - per);
      if (k < 0) continue;
      const key = element("i");
      if (number >= 0) key.style.background = colour(number);
      const error = errors ? ` ± ${worded(errors[k], chart.percent)}` : "";
      const whose = number < 0 ? "held out " : `${name.replace(/, ± s\.e\.$/, "")} `;
      tip.append(element("div", {}, key, whose, element("b", {}, worded(values[k], chart.percent) + error)));
    }
    for (const { step, words } of chart.marks ?? [])
      if (step <= steps[i] && step > steps[i] - per) tip.append(element("div", {}, words));
    tip.hidden = false;
    const mine = out.getBoundingClientRect(), plot = svg.getBoundingClientRect();
    const above = plot.top - mine.top - tip.offsetHeight - 2;
    tip.style.top = `${mine.top + above >= 0 ? above : plot.bottom - mine.top + 2}px`;  // the curves stay in sight
    const x = plot.left - mine.left + at;
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

