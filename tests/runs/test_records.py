"""Records as lines of JSON."""

import io

from rich.console import Console

from sslr1.runs.records import JsonLines, final_table


def test_lines_are_cut_at_a_step_whatever_they_hold(tmp_path):
    """Characters that some take for the end of a line, and a line that was cut short within one."""
    lines = JsonLines(tmp_path / "lines.jsonl")
    assert lines.read() == []
    records = [{"step": k, "text": f"{k} \u2028 \x85 \n \x1e é"} for k in range(5)]
    for record in records:
        lines.write(record)
    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole[: whole.rindex("é".encode()) + 1])
    assert lines.read() == records[:4]
    lines.cut(2)
    lines.write(records[3])
    assert lines.read() == records[:4] and whole.startswith(lines.path.read_bytes())


def test_the_last_table_fits_a_narrow_terminal():
    """Names whole, whatever the headings take."""
    names = ("correspondence", "similarity")
    found = {f"eval/{name}/{key}": 0.25 for name in names for key in ("exact", "chance")}
    found |= {f"eval/{name}/n": 400 for name in names}
    table = final_table([{"step": 0, **found}, {"step": 120, **found}], names, dict.fromkeys(names, 1), 60)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    shown = console.export_text()
    assert all(f" {name} " in shown for name in names) and "…" not in shown and "warm-up" in shown
