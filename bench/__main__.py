"""`python bench/` measures everything that this machine can run; `python bench/ NAME…` some of it.

Ours and the peer run in turn (A B A B …) in one process on the same random inputs, after a check that they agree; figures
are medians. One table is printed, and one JSON file a machine is written to bench/results/.
"""

import argparse
import json
import statistics
import time

import decode
import learner
import loss
import render
import rollout
import step
import stream
import torch
from machine import machine, results_file
from transformers.utils import logging as transformers_logging

BENCHES = {
    "render": render,
    "stream": stream,
    "loss": loss,
    "learner": learner,
    "rollout": rollout,
    "step": step,
    "decode": decode,
}


def interleaved(ours, peer, seconds):
    """Medians of both, in seconds a call: warmed up, then in turn until `seconds` have gone by, three rounds at least."""
    ours(), peer(), finish()
    times, start = ([], []), time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for run, found in zip((ours, peer), times):
            begin = time.perf_counter()
            run()
            finish()
            found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in times], len(times[0])


def finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(device="cpu"):
    """GB/s of a large copy, read and write counted: the ceiling beside which memory-bound rows stand."""
    a = torch.randint(0, 256, (1 << 28,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    finish()
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        b.copy_(a)
        finish()
        found.append(2 * len(a) / (time.perf_counter() - begin) / 1e9)
    return statistics.median(found)


def matrix_rate():
    """GFLOP/s of a float32 matrix product of 1,536."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    a @ b
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        found.append(2 * 1536**3 / (time.perf_counter() - begin) / 1e9)
    return statistics.median(found)


def main():
    parser = argparse.ArgumentParser(prog="python bench/", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(BENCHES)}")
    parser.add_argument("--seconds", type=float, default=20, help="time for each row")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in BENCHES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    found = {
        **machine(),
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "ceilings": {"copy_gb_s": copy_bandwidth(), "matrix_fp32_gflop_s": matrix_rate()},
        "rows": [],
    }
    if torch.cuda.is_available():
        found["ceilings"]["cuda_copy_gb_s"] = copy_bandwidth("cuda")
    for name in arguments.names or BENCHES:
        for row in BENCHES[name].rows():
            ours, peer = row.pop("ours"), row.pop("peer")
            if peer is None:  # can't run here; the row says why
                found["rows"].append({"bench": name, **row})
                continue
            (a, b), rounds = interleaved(ours, peer, arguments.seconds)
            moved, cuda = row.pop("bytes", None), row.get("device") == "cuda"
            ceiling = found["ceilings"]["cuda_copy_gb_s" if cuda else "copy_gb_s"]
            found["rows"].append(
                {"bench": name, **row, "ours_s": a, "peer_s": b, "ratio": b / a, "rounds": rounds}
                | ({"share_of_copy": moved / a / 1e9 / ceiling} if moved else {})
            )
    show(found)
    path = results_file("kernels", found)
    if path.exists():  # rows that were not run this time stay
        rerun = {row["bench"] for row in found["rows"]}
        found["rows"] = [r for r in json.loads(path.read_text())["rows"] if r["bench"] not in rerun] + found["rows"]
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(path)


def notes(row, ceilings):
    """Lines below a row: where its time goes, and on a GPU how near its steps come to reading what they must at the copy rate."""
    if "split_s" in row:
        whole = sum(row["split_s"].values())
        yield ", ".join(f"{name} {part / whole:.0%}" for name, part in row["split_s"].items())
    if "step" in row and row.get("device") == "cuda":
        s, moved = row["step"]["s"], row["step"]["bytes"]
        rate = moved / s / 1e9
        yield f"a step {1e3 * s:.2f} ms, {moved / 1e6:,.0f} MB: {rate / ceilings['cuda_copy_gb_s']:.0%} of the copy rate"


def show(found):
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found['cpu']}, {found['cores']} cores, {found['ceilings']['copy_gb_s']:.1f} GB/s copy, "
        f"{found['ceilings']['matrix_fp32_gflop_s']:.0f} GFLOP/s fp32"
    )
    for column in ("what", "against", "ours, ms", "peer, ms", "peer / ours", "goal", "of copy rate", "extra MB"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    for row in found["rows"]:
        row = {**row, "what": "\n".join([row["what"], *notes(row, found["ceilings"])])}
        if "ratio" not in row:
            table.add_row(row["what"], row["against"], "", "", row["why_not"], row["goal"], "", "")
            continue
        share = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
        table.add_row(
            row["what"],
            row["against"],
            f"{1e3 * row['ours_s']:.2f}",
            f"{1e3 * row['peer_s']:.2f}",
            f"{row['ratio']:.2f}",
            row["goal"],
            share,
            " / ".join(map(str, row.get("extra_mb", ()))),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
