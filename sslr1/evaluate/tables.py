"""What an evaluation prints: tables of the numbers that go to its JSON file."""

from rich.table import Table

from sslr1 import puzzles
from sslr1.evaluate import scoring


def puzzle_table(cells, trained) -> Table:
    """Puzzle by level; cells: `puzzle_report`'s; trained: the (puzzle, level) that the configuration trains on."""
    levels = sorted({cell["level"] for cell in cells})
    compared = any("difference" in cell for cell in cells)
    table = Table(
        title="Held-out puzzles",
        caption="Exact answers with their 95 % interval (Wilson)"
        + (", and the difference to the baseline with its own (paired bootstrap)" if compared else "")
        + "; chance; answers in the right form; puzzles"
        + (". * is trained on" if trained else ""),
    )
    for column in ("puzzle", "form", *(f"level {level}" for level in levels)):
        table.add_column(column, justify="left" if column in ("puzzle", "form") else "right", no_wrap=True)
    found = {(cell["puzzle"], cell["form"], cell["level"]): cell for cell in cells}
    own = dict.fromkeys(cell["puzzle"] for cell in cells if cell["puzzle"] not in puzzles.NAMES)
    for name in (*puzzles.NAMES, *own):
        for form in ("direct", "thinking"):
            row = {level: found[name, form, level] for level in levels if (name, form, level) in found}
            if row:
                texts = [_cell(row[level], (name, level) in trained) if level in row else "" for level in levels]
                table.add_row(name, form, *texts)
    return table


def _cell(cell, trained) -> str:
    lines = [f"{'*' if trained else ''}{cell['accuracy']:.1%} {_interval(cell)}"]
    if "difference" in cell:
        lines.append(_difference(cell))
    lines.append(f"chance {cell['chance']:.1%}")
    lines.append(f"form {cell['format']:.1%}, n {cell['n']}")
    return "\n".join(lines)


def _interval(cell) -> str:
    low, high = cell["interval"]
    return f"({100 * low:.1f}–{100 * high:.1f})"


def _difference(cell) -> str:
    low, high = cell["difference_interval"]
    return f"{100 * cell['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def benchmark_tables(numbers) -> list:
    """Measures, categories, and the paper's figures where it has the benchmark; numbers: what goes to the JSON file."""
    name, out = numbers["benchmark"], []
    for form, found in numbers["forms"].items():
        table = _table(f"{name}, {form} form", "measure", found["measures"].values())
        table.caption = f"{found['unreadable']} answers could not be read, {found['cut_off']} were cut off"
        for measure, cell in found["measures"].items():
            _add(table, measure, cell)
        out.append(table)
        for column, groups in found["groups"].items():
            table = _table(f"{name}, {form} form, by {column}", column, groups.values())
            for value, cell in groups.items():
                _add(table, value or "(none)", cell)
            out.append(table)
    return [*out, *_paper(name, numbers["forms"].get("direct"))]


def _paper(name, direct) -> list:
    """The paper's figures for this benchmark, if it has it, beside ours in the direct form, if that was asked."""
    known = scoring.paper_name(name)
    if not known:
        return []
    measure = scoring.PAPER_MEASURES.get(known, "plain accuracy")
    table = Table(
        title=f"{known} in the paper (arXiv 2604.20705), %",
        caption="Read off its figure: the last digit may be off by one. Direct answers, greedy",
    )
    for column in ("measured", *scoring.PAPER_MODELS, "this model"):
        table.add_column(column, justify="left" if column == "measured" else "right")
    rows = {"plain": (measure, scoring.PAPER[known])}
    if known == "MMVP":
        rows = {"pairs, legacy": (measure, scoring.PAPER[known]), "pairs": ("pairs, corrected", scoring.MMVP_CORRECTED)}
    for key, (what, values) in rows.items():
        ours = f"{100 * direct['measures'][key]['accuracy']:.2f}" if direct and known not in scoring.OTHERWISE else ""
        table.add_row(what, *("" if value is None else f"{value:.2f}" for value in values), ours)
    return [table]


def _table(title, first, cells) -> Table:
    table = Table(title=title)
    columns = [first, "n", "accuracy", "95 % interval", "chance"]
    if any("difference" in cell for cell in cells):
        columns += ["baseline", "difference (95 %)"]
    for column in columns:
        table.add_column(column, justify="left" if column == first else "right", no_wrap=column != first)
    return table


def _add(table, label, cell):
    texts = [str(cell["n"]), f"{cell['accuracy']:.1%}", _interval(cell), f"{cell['chance']:.1%}"]
    if "difference" in cell:
        texts += [f"{cell['baseline']:.1%}", _difference(cell)]
    table.add_row(label, *texts)
