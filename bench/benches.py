"""Every benchmark by its name: a function of the mode (see bench/row.py) that lists its rows."""

import captures
import counts
import data
import decode
import delta
import hybrid
import learner
import lora
import loss
import render
import rollout
import sampling
import step
import stream
import transfers

BENCHES = {
    "step": step.rows,
    "sampling": sampling.rows,
    "decode": decode.rows,
    "delta": delta.rows,
    "render": render.rows,
    "stream": stream.rows,
    "transfers": transfers.rows,
    "data": data.rows,
    "loss": loss.rows,
    "rollout": rollout.rows,
    "captures": captures.rows,
    "counts": counts.rows,
    "learner": learner.rows,
    "lora": lora.rows,
    "hybrid": hybrid.rows,
    "trl": lambda mode: [] if mode == "cpu" else step.rows_against_trl(mode),  # a CPU's is step's
}


def rows_of(mode, benches=BENCHES):
    """(benchmark, row) of each."""
    return [(bench, row) for bench in benches for row in BENCHES[bench](mode)]
