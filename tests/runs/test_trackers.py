"""TensorBoard's files and Weights & Biases, the latter in a stand-in: it is imported for nobody who hasn't asked."""

import sys
from types import SimpleNamespace

import pytest

from sslr1 import config
from sslr1.errors import UserError
from sslr1.runs.trackers import Trackers
from sslr1.setup import entry

OFF = {"log": {"tensorboard": False, "wandb": None}}


def record(step):
    return {"step": step, "reward": step / 10, "rewards/rotation/mean": float("nan") if step == 2 else 0.5}


def scalars(folder):
    """{name: [(step, value)]} as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_tensorboard_forgets_what_a_killed_run_wrote_too_far(tmp_path):
    settings = {"log": {"tensorboard": True, "wandb": None}}
    for done, steps in ((None, range(0, 6)), (3, range(4, 7)), (None, range(0, 3))):  # begun, gone on, begun anew
        trackers = Trackers(tmp_path, done, settings)
        for k in steps:
            trackers.write(record(k))
        trackers.close()
        found = scalars(tmp_path / "tensorboard")
        assert set(found) == {"reward", "rewards/rotation/mean"}
        last = steps[-1] + 1
        assert found["reward"] == [(k, pytest.approx(k / 10)) for k in range(last)]
        assert [s for s, v in found["rewards/rotation/mean"]] == list(range(last))


def test_nothing_is_written_or_imported_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trackers = Trackers(tmp_path, None, OFF)
    trackers.write(record(1))
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_wandb_gets_every_record_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    calls = []

    def note(name):
        return lambda *arguments, **named: calls.append((name, arguments, named))

    run = SimpleNamespace(log=note("log"), define_metric=note("define_metric"), finish=note("finish"))
    stand_in = SimpleNamespace(init=lambda **named: (calls.append(("init", (), named)), run)[1], Error=KeyError)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    settings = {"log": {"tensorboard": False, "wandb": "puzzles"}, "train": {"steps": 2}}
    for done in (None, 1):
        trackers = Trackers(tmp_path, done, settings)
        trackers.write(record(1))
        trackers.close()
    first, second = (named for name, _, named in calls if name == "init")
    assert first == second and first["project"] == "puzzles" and first["config"] == settings
    assert first["resume"] == "allow" and len(first["id"]) == 16 and first["name"] == tmp_path.name
    assert "mode" not in first  # or WANDB_MODE=offline would not be heard
    names = [name for name, _, _ in calls]
    assert names == ["init", "define_metric", "define_metric", "log", "finish"] * 2
    assert calls[3][1] == (record(1),) and calls[2][1:] == (("*",), {"step_metric": "step"})
    stand_in.init = lambda **named: {}["no key"]
    with pytest.raises(UserError, match=r"log\.wandb is 'puzzles': 'no key'"):
        Trackers(tmp_path, None, settings)


def test_a_run_without_the_package_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, "log": {"wandb": "puzzles"}}
    with pytest.raises(
        UserError, match=r"log\.wandb is 'puzzles', and the package wandb is not installed: pip install"
    ):
        entry.Claim(tmp_path / "run", config.check(tree))
    assert not (tmp_path / "run").exists()
    entry.Claim(tmp_path / "run", config.check({**tree, "log": {}})).give_up(begun=True)
