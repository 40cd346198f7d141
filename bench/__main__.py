"""`python bench/` measures everything that this machine can run; `python bench/ NAME…` some of it.

Ours and the peer run in turn (A B A B …) in one process on the same random inputs, after a check that they agree;
figures are medians. Each row is printed and kept as soon as it is measured, in bench/results/'s JSON file of this
machine: a run that is stopped leaves what it has, and --resume goes on after it. Where no peer can run, ours is timed
alone. On a GPU, rows say what share they reach of the rates of a large copy and of a large bfloat16 matrix product.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import journal
import shown
import torch
from benches import BENCHES, rows_of
from machine import machine, results_file
from row import ceilings_of, device_of, finish, let_go, measure
from transformers.utils import logging as transformers_logging

from sslr1 import distributed

DEVICE_LOST = 75  # exit status: the device answers no more, and --resume in a new process may go on


def main(arguments=None) -> int:
    """Exit status: 0; 1 if a row failed; DEVICE_LOST."""
    options = parse(arguments)
    mode = "dry" if options.dry else "cuda" if torch.cuda.is_available() else "cpu"
    here = {**machine(), "mode": mode}
    results = None if options.keep else results_file("kernels", here)
    kept = options.keep or results.with_suffix(".jsonl")
    try:
        done = prepared(kept, results, here, options)
    except ValueError as problem:
        sys.exit(f"python bench/: {problem}")
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # cuDNN would plan anew for each length of a peer
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    seed = time.time_ns() % 2**31
    torch.manual_seed(seed)
    ceilings = ceilings_of(device_of(mode))
    stamp = {"date": time.strftime("%Y-%m-%d"), "seed": seed, "ceilings": ceilings}
    journal.add(kept, process=here)
    print(
        here.get("gpu") or here["cpu"],
        "copy {copy_gb_s:,.1f} GB/s, products {matrix_gflop_s:,.0f} GFLOP/s".format(**ceilings),
        flush=True,
    )
    failed, todo = False, rows_of(mode, options.names)
    known = [[bench, row.what, row.against] for bench, row in todo]
    while todo:
        bench, row = todo.pop(0)  # and let go of what it shares with no other row
        if [bench, row.what, row.against] in done:
            continue
        journal.add(kept, begin=[bench, row.what, row.against])
        found = {"bench": bench, **measured(row, mode, ceilings, options), **stamp}
        journal.add(kept, row=found)
        failed |= "failed" in found
        print(shown.line(found), flush=True)
        if results:
            journal.write(results, whole(kept, results, options.names, known))
        if not alive():
            print("the device answers no more", file=sys.stderr)
            return DEVICE_LOST
    distributed.stop()
    rows = journal.gather(journal.read(kept))["rows"]
    if results:
        # A run that was stopped before may have kept a row that it didn't come to write
        journal.write(results, whole(kept, results, options.names, known))
        print(f"{shown.compared(rows)}\n\n{shown.wanting(rows)}\n\n{results}")
        kept.unlink(missing_ok=True)
    return int(failed)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python bench/", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(BENCHES)}; all unless given")
    parser.add_argument("--seconds", type=float, default=20, help="time for the rounds of each row, at least")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each row, at least")
    parser.add_argument(
        "--limit",
        type=float,
        default=0,
        help="seconds for each of a row's set-up, its peer's first call, and its rounds",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped, after its last row")
    parser.add_argument("--anew", action="store_true", help="drop all that the results file holds")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep rows as JSON lines, there only")
    parser.add_argument("--dry", action="store_true", help="try a GPU's rows at small shapes on the CPU; with --keep")
    options = parser.parse_args(arguments)
    options.names = options.names or list(BENCHES)
    for name in options.names:
        if name not in BENCHES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(BENCHES)}")
    if options.dry and not options.keep:
        parser.error("--dry needs --keep FILE: its rows are no results")
    return options


def prepared(kept, results, here, options) -> list:
    """Names of the rows that are measured already. ValueError if a file holds those of another machine or other
    versions."""
    if results and options.anew:
        results.unlink(missing_ok=True)
    if results and results.exists() and journal.common(journal.load(results)) != journal.common(here):
        raise ValueError(
            f"{results} holds rows of other versions ({journal.difference(journal.load(results), here)}), and one file "
            "can't hold both: --anew drops them, or move the file away"
        )
    if not options.resume:
        if results:
            kept.unlink(missing_ok=True)
        return []
    found = journal.gather(journal.read(kept))
    if found["rows"] and journal.common(found) != journal.common(here):
        raise ValueError(
            f"--resume: {kept} holds rows of other versions ({journal.difference(found, here)}); without it, all are "
            "measured anew"
        )
    return [journal.name(row) for row in found["rows"] if row.get("failed") != journal.LOST]


def measured(row, mode, ceilings, options) -> dict:
    let_go()  # of what only rows before this one held
    try:
        found = measure(
            row, device_of(mode), ceilings, seconds=options.seconds, rounds=options.rounds, limit_s=options.limit
        )
        return found | ({"dry": "needs a GPU: tried at a small shape on a CPU"} if mode == "dry" else {})
    finally:
        let_go()


def whole(kept, results, benches, known) -> dict:
    """The results file with this run's rows, and those that it held and this run hasn't come to, unless they are rows
    no more."""
    found = journal.gather(journal.read(kept))
    before = journal.load(results)["rows"] if results.exists() else []
    before = [row for row in before if row["bench"] not in benches or journal.name(row) in known]
    rows = {tuple(journal.name(row)): row for row in [*before, *found["rows"]]}
    return {**journal.common(found), "rows": list(rows.values())}


def alive() -> bool:
    try:
        finish()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
