"""`python bench/` measures everything that this machine can run; `python bench/ NAME…` some of it.

Ours and the peer run in turn (A B A B …) in one process on the same random inputs, after a check that they agree; figures
are medians. One table is printed, and one JSON file a machine is written to bench/results/. Where no peer can run, ours is timed
alone. On a GPU, rows say what share they reach of the rates of a large copy and of a large bfloat16 matrix product.
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
import sampling
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
    "sampling": sampling,
    "decode": decode,
}


def interleaved(runs, seconds):
    """Medians of each, in seconds a call: warmed up, then in turn until `seconds` have gone by, three rounds at least."""
    for run in runs:
        run()
    finish()
    times, start = tuple([] for _ in runs), time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for run, found in zip(runs, times):
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


def matrix_rate(n=1536, **options):
    """GFLOP/s of a matrix product of n x n."""
    a, b = torch.randn(2, n, n, **options)
    a @ b
    finish()
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        finish()
        found.append(2 * n**3 / (time.perf_counter() - begin) / 1e9)
    return statistics.median(found)


def rows_of(name):
    """A benchmark's rows, or one that says which package it lacks."""
    try:
        yield from BENCHES[name].rows()
    except ModuleNotFoundError as problem:
        yield {"what": name, "against": "", "goal": "", "ours": None, "peer": None, "why_not": f"needs {problem.name}"}


def shares(row, seconds, ceilings) -> dict:
    """How near a row comes to what bounds it: the bytes that it has to move at the rate of a copy, its operations at that of a
    matrix product (bfloat16's on a GPU)."""
    moved, flops, out = row.pop("bytes", None), row.pop("flops", None), {}
    cuda = row.get("device") == "cuda"
    if moved:
        out["share_of_copy"] = moved / seconds / 1e9 / ceilings["cuda_copy_gb_s" if cuda else "copy_gb_s"]
    if flops and cuda:
        out["share_of_products"] = flops / seconds / 1e9 / ceilings["cuda_matrix_bf16_gflop_s"]
    return out


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
        found["ceilings"]["cuda_matrix_bf16_gflop_s"] = matrix_rate(8192, device="cuda", dtype=torch.bfloat16)
    for name in arguments.names or BENCHES:
        for row in rows_of(name):
            sides = {"ours_s": row.pop("ours"), "peer_s": row.pop("peer")}
            runs = {side: run for side, run in sides.items() if run}  # what can't run here; the row says why
            times, rounds = interleaved([*runs.values()], arguments.seconds) if runs else ([], 0)
            row |= dict(zip(runs, times)) | ({"rounds": rounds} if runs else {})
            if len(runs) == 2:
                row["ratio"] = row["peer_s"] / row["ours_s"]
            bounds = shares(row, times[0], found["ceilings"]) if runs else {}
            found["rows"].append({"bench": name, **row, **bounds})
    show(found)
    path = results_file("kernels", found)
    if path.exists():  # rows that were not run this time stay
        rerun = {row["bench"] for row in found["rows"]}
        found["rows"] = [r for r in json.loads(path.read_text())["rows"] if r["bench"] not in rerun] + found["rows"]
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(path)


def notes(row, ceilings):
    """Lines below a row: where its time goes, and on a GPU how near its steps come to reading what they must at the copy rate."""
    if "peak_gb" in row:
        yield "{:.1f} GB at most, {:.1f} planned".format(*row["peak_gb"])
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

    ceilings = found["ceilings"]
    title = f"{found['cpu']}, {found['cores']} cores, {ceilings['copy_gb_s']:.1f} GB/s copy, {ceilings['matrix_fp32_gflop_s']:.0f} GFLOP/s fp32"
    if "gpu" in found:
        title += f"\n{found['gpu']}, {ceilings['cuda_copy_gb_s']:,.0f} GB/s copy, {ceilings['cuda_matrix_bf16_gflop_s'] / 1e3:.0f} TFLOP/s bf16"
    table = Table(title=title)
    for column in ("what", "against", "ours, ms", "peer, ms", "peer / ours", "goal", "of the bound", "extra MB"):
        table.add_column(column, justify="left" if column in ("what", "against") else "right")
    for row in found["rows"]:
        bounds = {"share_of_copy": "copy", "share_of_products": "products"}
        table.add_row(
            "\n".join([row["what"], *notes(row, ceilings)]),
            row["against"],
            *(f"{1e3 * row[side]:.2f}" if side in row else "" for side in ("ours_s", "peer_s")),
            f"{row['ratio']:.2f}" if "ratio" in row else row["why_not"],
            row["goal"],
            "\n".join(f"{row[key]:.0%} ({name})" for key, name in bounds.items() if key in row),
            " / ".join(map(str, row.get("extra_mb", ()))),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
