"""A loss that is not a number: the update is skipped, and a run that does nothing else ends."""

import json
import math

import pytest
import torch

from sslr1.runs import checkpoint
from tests.faults.runs import check_whole, command, finish, records
from tests.test_train import state


def numbers(run):
    return [{k: eval(v, {"nan": math.nan}) for k, v in row.items()} for row in records(run)]


@pytest.mark.slow
def test_one_is_skipped_and_counted(tmp_path, unbroken, warm, scenes):
    out, _ = finish(
        command(tmp_path, warm, scenes, "checkpoint.keep=9", program="tests.faults.nan"), SSLR1_TEST_NAN="3 3"
    )
    run = tmp_path / "run"
    rows = numbers(run)
    assert records(run)[:3] == records(unbroken)[:3] and "6 of 6 steps" in out
    assert math.isnan(rows[3]["grad_norm"]) and math.isnan(rows[3]["loss"])
    assert [row["skipped_steps"] for row in rows[1:]] == [0, 0, 1, 1, 1, 1]
    assert all(math.isfinite(row[key]) for row in rows[4:] for key in ("loss", "grad_norm", "reward", "entropy"))
    assert all(bool(torch.isfinite(x).all()) for x in state(checkpoint.newest(run / "checkpoints")).values())


@pytest.mark.slow
def test_ten_in_a_row_end_the_run(tmp_path, warm, scenes):
    """With the last one's samples, all checkpoints whole, and in the same step however often it is started again."""
    options = ["train.steps=40", "log.samples=1", "eval.every=40", "checkpoint.every=4"]
    line, run = command(tmp_path, warm, scenes, *options, program="tests.faults.nan"), tmp_path / "run"
    kept = []
    for _ in range(2):
        _, err = finish(line, code=2, SSLR1_TEST_NAN="3 40")
        assert err.startswith("error: 10 steps in a row, to step 12, ") and err.count("\n") == 1, err
        rows = numbers(run)
        assert [row["step"] for row in rows] == list(range(13)) and rows[-1]["skipped_steps"] == 10
        samples = [json.loads(row) for row in (run / "samples.jsonl").read_bytes().split(b"\n") if row]
        assert [s["step"] for s in samples] == [*range(1, 12), *[12] * 4]
        kept.append((records(run), [path.name for path in check_whole(run)]))
    assert kept[0] == kept[1] and kept[0][1][-1] == "step-000008"
    weights = [state(path) for path in check_whole(run)[-1:]]
    assert all(bool(torch.isfinite(x).all()) for x in weights[0].values())
    finish([*line, "train.steps=9"], SSLR1_TEST_NAN="40 40")
