// Draws the samples of report.html.

const SHOWN = 6, TALLEST = 260;  // samples at a time; px of a picture, half of that where there are many
const SIGNS = { exact: "✓", partly: "◐", wrong: "✗", "no format": "∅", "cut off": "✂" };
const GROUPS = {
  "all": () => true,
  "some right, some not": (right, G) => right > 0 && right < G,
  "all right": (right, G) => right === G,
  "none right": (right) => right === 0,
};

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
  return element("article", {}, head, ...missing, question(sample, TALLEST), element("p", { class: "expected" }, "Answer: ",
    element("b", {}, sample.answer)), element("ul", { class: "answers" }, ...answers));
}

function browse(root) {
  const { order, puzzle, outcome, place, back, on } = root.querySelector("form").elements;
  const says = root.querySelector("output"), cards = root.querySelector(".cards");
  const orders = { "over the steps": data.samples, "the hardest": data.hardest };
  const names = ["all", ...new Set(data.samples.map((s) => s.puzzle))];
  order.append(...Object.keys(orders).filter((name) => orders[name].length).map((name) => element("option", {}, name)));
  puzzle.append(...names.map((name) => element("option", {}, name)));
  outcome.append(...Object.keys(GROUPS).map((name) => element("option", {}, name)));
  let chosen = [];

  function choose() {
    chosen = orders[order.value].filter((s) => (puzzle.value === "all" || s.puzzle === puzzle.value) &&
      GROUPS[outcome.value](s.completions.filter((c) => c.outcome === "exact").length, s.completions.length));
    place.max = Math.max(0, chosen.length - SHOWN);
    place.value = order.selectedIndex ? 0 : place.max;  // the worst first; of all the newest
    show();
  }
  function show() {
    const start = +place.value, some = chosen.slice(start, start + SHOWN);
    const steps = some.map((s) => s.step);
    says.textContent = some.length ? `steps ${Math.min(...steps)} to ${Math.max(...steps)}` : "none";
    back.disabled = start === 0;
    on.disabled = start >= +place.max;
    cards.replaceChildren(...some.map(card));
  }
  function turn(by) { place.value = +place.value + by; show(); }
  order.addEventListener("change", choose);
  puzzle.addEventListener("change", choose);
  outcome.addEventListener("change", choose);
  place.addEventListener("input", show);
  back.addEventListener("click", () => turn(-SHOWN));
  on.addEventListener("click", () => turn(SHOWN));
  root.hidden = false;
  choose();
}

if (data.samples.length) browse(document.getElementById("samples"));
