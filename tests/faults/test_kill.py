"""SIGKILL at random moments: no half checkpoint, and the same command makes the run that nothing befell."""

import contextlib
import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.runs import check_whole, command, finish, kill, lines, records, same, start, wait_for


def test_the_run_that_is_compared_with_learns(unbroken):
    rows = records(unbroken)
    assert [int(row["step"]) for row in rows] == list(range(7))
    assert any(float(row["grad_norm"]) > 0 for row in rows[1:])


def start_and_kill(line, run, draw):
    """Start, and kill a random while after a sign that is drawn: a record, a checkpoint that is being written, or life.
    Returns what was there by then: records, the newest checkpoint, whether one was under way, and whether the run had
    ended."""
    sign, records_then = int(draw.integers(0, 3)), int(draw.integers(1, 7))
    process = start(line)
    wait_for(lambda: (run / "run.lock").exists() or process.poll() is not None)

    def seen():
        partial = any((run / "checkpoints").glob("partial-*"))
        return (sign == 0, lines(run / "metrics.jsonl") >= records_then, partial)[sign] or process.poll() is not None

    wait_for(seen)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(draw.uniform(0, (8.0, 0.5, 0.1)[sign]))
    ended = process.poll() is not None
    kill(process)
    found = [path.name for path in check_whole(run)]
    under_way = any((run / "checkpoints").glob("partial-*"))
    return lines(run / "metrics.jsonl"), found[-1] if found else None, under_way, ended


def test_a_run_killed_early_and_late_is_the_unbroken_one(tmp_path, unbroken, warm, scenes, draw):
    """Once before its first checkpoint is whole, whose record of step 0 must not stay, and once in its middle."""
    line, run = command(tmp_path, warm, scenes), tmp_path / "run"
    for reached in (
        lambda: lines(run / "metrics.jsonl") >= 1 or any((run / "checkpoints").glob("partial-*")),
        lambda: lines(run / "metrics.jsonl") >= 2 + draw.integers(0, 4),
    ):
        process = start(line)
        wait_for(reached, process)
        kill(process)
        check_whole(run)
    assert "going on from" in finish(line)[0]
    assert same(run, unbroken)
    assert [path.name for path in check_whole(run)] == [path.name for path in check_whole(unbroken)]
    made = [json.loads((r / "checkpoints/step-000006/state/trainer.json").read_text()) for r in (run, unbroken)]
    assert made[0] == made[1]


def test_a_run_of_adapters_killed_in_its_middle_is_the_unbroken_one(tmp_path, warm, scenes, draw):
    """With a reference at step 0, whose adapters the warm-up has moved."""
    own = ["model.lora={rank: 4, vision: all-linear}", "loss.kl_coef=0.1", "train.steps=4"]
    whole, run = tmp_path / "whole", tmp_path / "broken" / "run"
    finish(command(whole, warm, scenes, *own))
    line = command(tmp_path / "broken", warm, scenes, *own)
    process = start(line)
    wait_for(lambda: lines(run / "metrics.jsonl") >= 2 + draw.integers(0, 2), process)
    kill(process)
    check_whole(run)
    assert "going on from" in finish(line)[0]
    assert same(run, whole / "run") and [path.name for path in check_whole(run)] == ["step-000000", "step-000004"]
    assert any(float(row["kl"]) > 0 for row in records(run)[1:])
    for path in (run / "checkpoints").glob("step-*/**/*.safetensors"):
        mine, theirs = load_file(path), load_file(whole / path.relative_to(tmp_path / "broken"))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine), path


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(tmp_path, unbroken, warm, scenes, draw):
    """Start-up, warm-up, evaluations, steps, records and checkpoints: wherever the clock hits."""
    folder, reached = 0, []
    while len(reached) < 20:
        folder += 1
        place = tmp_path / str(folder)
        line = command(place, warm, scenes)
        for _ in range(min(20 - len(reached), int(draw.integers(1, 6)))):
            *where, ended = start_and_kill(line, place / "run", draw)
            if ended:
                break
            reached.append(where)
        finish(line)
        assert same(place / "run", unbroken), reached
        check_whole(place / "run")
    print(reached)
    assert len({tuple(where) for where in reached}) > 3  # they were moments of many kinds


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock(tmp_path, tiny, scenes):
    """And while it lives, nobody else gets into its folder."""
    line, run = command(tmp_path, tiny, scenes, "train.steps=1000"), tmp_path / "run"
    process = start(line)
    wait_for((run / "config.yaml").exists, process)
    _, err = finish(line, code=2)
    assert err.startswith("error: ") and "in use by another run" in err and err.count("\n") == 1
    kill(process)
    assert (run / "run.lock").exists()
    finish([*line, "train.steps=0"])


@pytest.mark.slow
def test_another_data_set_before_the_first_checkpoint_gets_its_own_list(tmp_path, tiny, scenes):
    """A start that came to nothing leaves no list of images to one with other settings."""
    other = tmp_path / "other"
    other.mkdir()
    for number, path in enumerate(sorted(scenes.iterdir())[:100]):
        os.link(path, other / f"{number}.jpg")
    process = start(command(tmp_path, tiny, scenes, "train.warmup.steps=1000"))
    wait_for((tmp_path / "run" / "config.yaml").exists, process)
    kill(process)
    assert "scene-00001.jpg" in (tmp_path / "run" / "files.txt").read_text()
    finish(command(tmp_path, tiny, other, "train.steps=0", "train.warmup.steps=0"))
    assert "scene" not in (tmp_path / "run" / "files.txt").read_text()
