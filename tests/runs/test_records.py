"""Records as lines of JSON."""

from sslr1.runs.records import JsonLines


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
