"""SIGTERM and SIGUSR1: finish the step, checkpoint, exit 0. tests/test_train.py has the plain case of SIGTERM."""

import os
import signal
import time

import pytest

from tests.faults.runs import check_whole, command, finish, lines, records, start, wait_for


def stop(line, when, number=signal.SIGTERM):
    """Start, send the signal when the time has come; returns (exit code, seconds it took to leave, stdout, stderr)."""
    process = start(line)
    wait_for(when, process)
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - began, out, err


def test_sigusr1_saves_the_step(tmp_path, warm, scenes):
    run = tmp_path / "run"
    options = ["train.steps=10000", "checkpoint.every=10000", "eval.every=10000", "train.warmup.steps=0"]
    code, took, _, err = stop(
        command(tmp_path, warm, scenes, *options), lambda: lines(run / "metrics.jsonl") > 3, signal.SIGUSR1
    )
    assert code == 0 and took < 60, err
    assert check_whole(run)[-1].name == f"step-{int(records(run)[-1]['step']):06d}"


def test_in_the_warm_up_nothing_is_kept(tmp_path, tiny, scenes):
    run = tmp_path / "run"
    line = command(tmp_path, tiny, scenes, "train.warmup.steps=100000")
    code, took, out, err = stop(line, (run / "checkpoints").exists)
    assert code == 0 and took < 60 and "stopped during the warm-up, of which nothing is kept" in out, err
    assert not check_whole(run) and not lines(run / "metrics.jsonl")


@pytest.mark.slow
def test_in_the_first_evaluation_that_is_finished(tmp_path, warm, scenes):
    """And counts: the warm-up before it is not lost, and no step is trained any more."""
    run = tmp_path / "run"
    line = command(tmp_path, warm, scenes, "train.warmup.steps=0", "eval.count=200", "train.steps=1")
    code, took, _, err = stop(line, (run / "checkpoints").exists)
    assert code == 0 and took < 100, err
    assert [row["step"] for row in records(run)] == ["0"] and [p.name for p in check_whole(run)] == ["step-000000"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.slow
def test_torchrun_hands_it_on(tmp_path, warm, scenes, number):
    """SIGUSR1 where it is told to. The ranks save and leave with 0; torchrun itself then reports the signal."""
    run = tmp_path / "run"
    options = ["train.steps=10000", "checkpoint.every=10000", "eval.every=10000", "train.warmup.steps=0"]
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    line = command(tmp_path, warm, scenes, *options, ranks=2, torchrun=[handled])
    code, took, out, err = stop(line, lambda: lines(run / "metrics.jsonl") > 3, number)
    assert took < 60 and "steps in" in out and f"got signal: {int(number)}" in err, (code, err)
    last = int(records(run)[-1]["step"])
    assert check_whole(run)[-1].name == f"step-{last:06d}"
    finish(command(tmp_path, warm, scenes, *options, f"train.steps={last + 1}", ranks=2))
    assert [int(row["step"]) for row in records(run)] == list(range(last + 2))
