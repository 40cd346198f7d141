// The quiz of the preview: a puzzle at a time, answered by a click or a key, and a score beside chance.
const TALLEST = 420;  // px of a picture, half of that where there are many
const LETTERS = "abcdefghijklmnopqrstuvwxyz";

function quiz(root, score) {
  const { puzzle, level, back, on } = root.querySelector("form").elements;
  const says = root.querySelector("output"), card = root.querySelector(".card"), asked = data.puzzles;
  const given = asked.map(() => null), begun = asked.map(() => []);  // answers; of a sequence what was chosen so far
  let chosen = [], place = 0;

  const right = (k) => String(given[k]) === String(asked[k].answer);
  const worded = (one, value) => one.kind === "number" ? `${value}°` : String(value);
  function key(one, option, i) {  // that answers it: the letter or number itself where it is one
    return one.kind === "number" ? LETTERS[i] : String(option).toLowerCase();
  }

  function choose() {
    chosen = asked.map((_, k) => k).filter((k) => (puzzle.value === "all" || asked[k].puzzle === puzzle.value) &&
      (level.value === "all" || String(asked[k].level) === level.value));
    const open = chosen.findIndex((k) => given[k] === null);
    turn(open < 0 ? 0 : open);
  }
  function turn(to) {
    place = Math.max(0, Math.min(to, chosen.length - 1));
    back.disabled = place === 0;
    on.disabled = place >= chosen.length - 1;
    says.textContent = chosen.length ? `${place + 1} of ${chosen.length}` : "none";
    show();
  }

  function option(one, k, value, i) {
    const out = element("button", { type: "button", class: "option" }, worded(one, value), element("kbd", {}, key(one, value, i)));
    out.addEventListener("click", () => take(k, value));
    if (one.kind === "sequence") out.disabled = begun[k].includes(value);
    if (given[k] === null) return out;
    out.disabled = true;
    if (one.kind !== "sequence" && value === one.answer) out.classList.add("right");
    else if (value === given[k]) out.classList.add("wrong");
    return out;
  }
  function grid(one, k) {  // a sequence's places, with the tiles that were put there
    const done = given[k] !== null, shown = done ? one.answer : begun[k], [rows, columns] = one.grid;
    const out = element("div", { class: "grid" });
    const [h, w] = one.sizes[0], room = Math.min(TALLEST, card.clientWidth - 36);
    const size = Math.min(w, room / columns - 8, (w / h) * (TALLEST / rows));
    out.style.gridTemplateColumns = `repeat(${columns}, auto)`;
    for (let i = 0; i < rows * columns; i++) {
      const cell = element("div", { class: "cell" });
      cell.style.width = `${size}px`, cell.style.height = `${size * h / w}px`;
      if (i < shown.length) cell.append(crop(one, shown[i] - 1, { width: size }), element("span", {}, String(shown[i])));
      if (done && given[k]) cell.classList.add(given[k][i] === one.answer[i] ? "right" : "wrong");
      out.append(cell);
    }
    return out;
  }
  function verdict(one, k) {
    const answer = Array.isArray(one.answer) ? one.answer.join(", ") : worded(one, one.answer);
    const chance = `A guess is right ${one.chance >= 0.001 ? `${+(100 * one.chance).toPrecision(3)} % of the time` : `once in ${Math.round(1 / one.chance).toLocaleString("en")}`}.`;
    if (given[k] === "") return element("p", {}, element("b", {}, `It is ${answer}.`), ` ${chance}`);
    let words = right(k) ? "Right." : `No: it is ${answer}.`;
    if (Array.isArray(one.answer) && !right(k))
      words += ` ${given[k].filter((v, i) => v === one.answer[i]).length} of ${one.answer.length} places are right.`;
    return element("p", { class: right(k) ? "better" : "worse" }, element("b", {}, words), element("span", { class: "muted" }, ` ${chance}`));
  }
  function show() {
    if (!chosen.length) return card.replaceChildren(element("p", {}, "There is no such puzzle."));
    const k = chosen[place], one = asked[k], done = given[k] !== null;
    const head = element("h3", {}, `${one.puzzle}, level ${one.level}`, element("span", { class: "muted" }, one.about));
    const options = element("div", { class: "options" }, ...one.options.map((value, i) => option(one, k, value, i)));
    if (!done && one.kind === "sequence" && begun[k].length) options.append(button("undo", "⌫", () => undo(k)));
    if (!done) options.append(button("I can’t tell", "0", () => end(k, "")));
    const parts = [head, question(one, TALLEST), element("p", { class: "muted told" }, `The model is also told: ${one.told}`)];
    if (one.kind === "sequence") parts.push(grid(one, k));
    parts.push(options);
    if (done) parts.push(element("div", { class: "verdict", "aria-live": "polite" }, verdict(one, k)));
    if (done && place < chosen.length - 1) parts.push(button("next", "⏎", () => turn(place + 1)));
    card.replaceChildren(element("article", {}, ...parts));
    if (done) card.querySelector("article > .option")?.focus({ preventScroll: true });
  }
  function button(words, hint, act) {
    const out = element("button", { type: "button", class: "option" }, words, element("kbd", {}, hint));
    out.addEventListener("click", act);
    return out;
  }

  function take(k, value) {
    const one = asked[k];
    if (given[k] !== null) return;
    if (one.kind !== "sequence") return end(k, value);
    if (begun[k].includes(value)) return;
    begun[k].push(value);
    if (begun[k].length === one.answer.length) return end(k, [...begun[k]]);
    show();
  }
  function undo(k) { begun[k].pop(); show(); }
  function end(k, value) {
    given[k] = value;
    show();
    tell();
  }

  function tell() {
    const rows = new Map();
    asked.forEach((one, k) => {
      if (given[k] === null) return;
      const name = `${one.puzzle} ${one.level}`, row = rows.get(name) ?? { one, n: 0, right: 0, chance: 0 };
      row.n += 1, row.right += right(k), row.chance += one.chance;
      rows.set(name, row);
    });
    const found = [...rows.values()].sort((a, b) => a.one.puzzle.localeCompare(b.one.puzzle) || a.one.level - b.one.level);
    const total = found.reduce((sum, row) => ({ n: sum.n + row.n, right: sum.right + row.right, chance: sum.chance + row.chance }), { n: 0, right: 0, chance: 0 });
    const line = (name, at, { n, right, chance }) => element("tr", {}, ...[name, at, `${right} of ${n}`, percent(right / n), rare(chance / n)]
      .map((text, i) => element("td", {}, i === 3 ? element("b", {}, text) : text)));
    const percent = (share) => `${+(100 * share).toPrecision(3)}%`;
    const rare = (share) => share >= 0.001 ? percent(share) : `1 in ${Math.round(1 / share).toLocaleString("en")}`;
    score.hidden = false;
    score.querySelector("tbody").replaceChildren(...found.map((row) => line(row.one.puzzle, row.one.level, row)), line("all", "", total));
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input") || !chosen.length) return;
    const k = chosen[place], one = asked[k], pressed = event.key.toLowerCase();
    const i = one.options.findIndex((value, i) => key(one, value, i) === pressed);
    if (event.key === "ArrowLeft") turn(place - 1);
    else if (event.key === "ArrowRight") turn(place + 1);
    else if (given[k] !== null) return;
    else if (event.key === "Backspace") undo(k);
    else if (pressed === "0") end(k, "");
    else if (i >= 0) take(k, one.options[i]);
    else return;
    event.preventDefault();
  });
  puzzle.append(...["all", ...new Set(asked.map((one) => one.puzzle))].map((name) => element("option", {}, name)));
  level.append(...["all", ...[...new Set(asked.map((one) => one.level))].sort()].map((n) => element("option", {}, String(n))));
  puzzle.addEventListener("change", choose);
  level.addEventListener("change", choose);
  back.addEventListener("click", () => turn(place - 1));
  on.addEventListener("click", () => turn(place + 1));
  root.hidden = false;
  choose();
}

quiz(document.getElementById("quiz"), document.getElementById("score"));
