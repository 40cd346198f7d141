"""What is said of rows: a line when they are measured, tables of them all."""


def notes(row, memory=True):
    """What a row says beside its times; memory: that of both sides, too."""
    for key, bound in (("share_of_copy", "the copy rate"), ("share_of_products", "the product rate")):
        if key in row:
            yield f"{row[key]:.0%} of {bound}"
    if memory and "extra_mb" in row:
        yield "{} MB".format(" / ".join(f"{x:,}" for x in row["extra_mb"]))
    if "peak_gb" in row:
        yield "{peak_gb:.1f} GB at most ({peak_gb_generate:.1f} up to learn), {planned_gb:.1f} planned".format(**row)
    for key in ("phases_s", "split_s"):
        if key in row:
            whole = sum(row[key].values())
            yield ", ".join(f"{name} {part / whole:.0%}" for name, part in row[key].items())
    if "tokens_s" in row:
        yield "tokens/s: " + ", ".join(f"{x:,.0f} {name}" for name, x in row["tokens_s"].items())
    if "learn" in row and row["device"] == "cuda":
        rate = row["learn"]["flops"] / row["learn"]["s"] / 1e9
        yield f"MFU of learn {rate / row['ceilings']['matrix_gflop_s']:.0%} of the product rate"
    if "step" in row and row["device"] == "cuda":
        rate = row["step"]["bytes"] / row["step"]["s"] / 1e9
        yield f"a step {1e3 * row['step']['s']:.2f} ms: {rate / row['ceilings']['copy_gb_s']:.0%} of the copy rate"
    if "copies_mb" in row:
        yield (
            "{copied:.1f} MB copied, {ids:.1f} of them ids, for {pictures:.1f} MB of pictures ({share:.2f} each "
            "without ids); {before:.1f} at {commit}".format(**row["copies_mb"])
        )
    if "starts" in row:
        yield from starts(**row["starts"])
    if "backend" in row:
        yield f"backend {row['backend']}"
    if "counters" in row:
        yield ", ".join(f"{name} {value}" for name, value in row["counters"].items())
    if "failed" in row:
        yield f"failed: {row['failed']}"
    if "why_not" in row:
        yield f"not run: {row['why_not']}"
    if "dry" in row:
        yield row["dry"]


def starts(curve, per_file_us, path_bytes, before=()):
    """Of bench/data.py: CPU time and memory a file above the smallest number of them, and the curves."""
    for name, found in per_file_us.items():
        yield f"{name} {found['cpu_us']:.2f} µs and {found['bytes']:.0f} bytes a file, paths of {path_bytes:.0f}"
    if before:
        yield f"CPU {per_file_us['ours']['cpu_us'] / per_file_us['before']['cpu_us']:.3f} of before"
    for name, points in (("ours", curve), ("before", before)):
        for point in points:
            yield f"{name} {point['count']:,}: {point['cpu_s']:.2f} s, {point['grown'] / 1e6:.1f} MB"


def line(row) -> str:
    """One that has just been measured."""
    parts = [row["bench"]]
    if "ours_s" in row:
        parts.append(" / ".join(f"{1e3 * row[side]:,.2f} ms" for side in ("ours_s", "peer_s") if side in row))
    if "ratio" in row:
        parts.append(f"x{row['ratio']:.2f}" + (f" (goal {row['goal']})" if row["goal"] else ""))
    return " | ".join(filter(None, [*parts, *notes(row), row["what"], row["against"]]))


def table(head, rows) -> str:
    """Markdown of a table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def against(row) -> str:
    """The peer, its version where it was noted, and what memory both took."""
    version = f" ({row['peer']})" if "peer" in row else ""
    memory = " ({:,} / {:,} MB)".format(*row["extra_mb"]) if len(row.get("extra_mb", ())) == 2 else ""
    return row["against"] + version + memory


def compared(rows) -> str:
    """Those that have a ratio."""
    head = ["what", "against (extra memory, ours / theirs)", "ours, ms", "peer, ms", "peer / ours", "goal"]
    return table(
        head,
        [
            [
                row["what"],
                against(row),
                f"{1e3 * row['ours_s']:,.1f}",
                f"{1e3 * row['peer_s']:,.1f}",
                f"**{row['ratio']:.2f}**" if "failed" not in row else "failed",
                row["goal"],
            ]
            for row in rows
            if "ratio" in row
        ],
    )


def wanting(rows) -> str:
    """Those that have none, or are wrong, and why."""
    return table(
        ["what", "against", "why not"],
        [
            [row["what"], row["against"], row.get("failed") or row.get("why_not", "")]
            for row in rows
            if "failed" in row or "why_not" in row
        ],
    )


def counted(rows) -> str:
    """Those that count something, which needs no peer and no clock."""
    kept = [row for row in rows if "copies_mb" in row or "counters" in row]
    return table(["what", "found"], [[row["what"], "; ".join(notes(row))] for row in kept])


def on_gpu(rows) -> str:
    """All of a GPU's; ms to two places, since some are short."""
    found = []
    for row in rows:
        times = [f"{1e3 * row[side]:,.2f}" if side in row else "" for side in ("ours_s", "peer_s")]
        said = list(notes(row, memory=False))
        if "ours_s" not in row and not said:
            times[0] = "not run"
        ratio = f"**{row['ratio']:.2f}**" if "ratio" in row else ""
        found.append([row["what"], against(row), *times, ratio, row["goal"], "; ".join(said)])
    return table(
        ["what", "against (extra memory, ours / theirs)", "ours, ms", "peer, ms", "peer / ours", "goal", "notes"], found
    )
