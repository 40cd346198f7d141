"""A task's row that won't do at the start of a run, and a function that fails in its middle: one line, nothing learnt
from it, nothing lost."""

import json

import pytest

from tests.faults.runs import command, finish, records, same
from tests.forks import launch

SETTINGS = ("train.steps=4", "train.warmup.steps=0", "checkpoint.every=3", "eval.every=4", "eval.count=4")


def line_of(folder, tmp_path, warm, scenes):
    rows = [{"images": str(p), "question": "A or B?", "answer": "A"} for p in sorted(scenes.iterdir())[:30]]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = f"tasks.vqa={{path: {tmp_path}/q.jsonl, share: 0.5, function: tests.data.judges:later}}"
    return command(folder, warm, scenes, *SETTINGS, task)


def test_a_row_that_will_not_do_ends_the_start_in_one_line(tmp_path, warm, scenes):
    """And leaves nothing."""
    line = line_of(tmp_path, tmp_path, warm, scenes)
    rows = (tmp_path / "q.jsonl").read_text().splitlines()
    (tmp_path / "q.jsonl").write_text("\n".join([*rows[:7], rows[7].replace("images", "image"), *rows[8:]]))
    _, err = finish(line, code=2)
    assert err.startswith(f"error: tasks.vqa: {tmp_path}/q.jsonl, line 8: no column 'images'") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "returns, said",
    [
        ("error", "raised ZeroDivisionError: no such thing as that"),
        pytest.param("nan", "returned nan, where a number from 0 to 1 is due", marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_in_one_line_and_goes_on(tmp_path, warm, scenes, returns, said):
    """After the first evaluation and two steps or so, where the newest checkpoint is of step 0."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    finish(line_of(tmp_path / "whole", tmp_path, warm, scenes))
    line = line_of(tmp_path / "broken", tmp_path, warm, scenes)
    _, err = finish(line, code=2, SSLR1_TEST_CALLS="9", SSLR1_TEST_RETURNS=returns)
    assert err.count("\n") == 1 and err.startswith("error: tasks.vqa.function tests.data.judges:later") and said in err
    done = int(records(run)[-1]["step"])
    assert 1 <= done <= 3 and (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert "going on from" in finish(line)[0] and same(run, whole)


@pytest.mark.slow
def test_two_ranks_of_which_one_fails(tmp_path, warm, scenes):
    line = line_of(tmp_path, tmp_path, warm, scenes)
    done = launch(*line[2:], ranks=2, check=False, SSLR1_TEST_CALLS="6", SSLR1_TEST_RETURNS="nan")
    assert done.returncode == 2 and "tasks.vqa.function" in done.stderr
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1].name
    assert int(newest[5:]) == int(records(tmp_path / "run")[-1]["step"])
