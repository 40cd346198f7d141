"""What is written is the state of its step, whole or not at all; what is removed is never half removed under its
name."""

import shutil
import threading
from concurrent import futures
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

from sslr1 import config, model
from sslr1.errors import UserError
from sslr1.model import parallel
from sslr1.runs import checkpoint
from sslr1.runs.checkpointer import Background, Checkpointer
from tests.learner.test_learner import make_groups, make_learner


class Killed(BaseException):
    pass


@pytest.fixture
def taking(tmp_path, tiny, one_process):
    """(learner, take): `take(step, best)` is the function that writes checkpoint `step`."""
    learner, weights = make_learner(tiny, one_process)
    fixed = dict(learner=learner, sampler=weights.model, tokenizer=model.load_tokenizer(tiny), source=tiny)

    def take(step, best=None, keep=2, **options):
        return checkpoint.Snapshot(
            tmp_path,
            step,
            trainer={"step": step},
            world=one_process,
            also=[] if best is None else [best],
            keep=keep,
            **fixed,
            **options,
        ).write

    return learner, take


def names(folder):
    return [path.name for path in checkpoint.steps(folder)]


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("step-999999", "step-1000000", "step-000010", "step-old", "step-000011.bak", "partial-000012"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000013").write_text("")
    assert names(tmp_path) == ["step-000010", "step-999999", "step-1000000"]
    assert checkpoint.newest(tmp_path).name == "step-1000000" and checkpoint.newest(tmp_path / "none") is None


def test_what_is_written_is_the_state_of_its_step(tmp_path, tiny, photographs, seed, taking):
    """Whatever training does to weights and moments before they are written."""
    learner, take = taking
    groups, rewards = make_groups(tiny, photographs, seed)
    learner.step(groups, rewards)
    policy = {name: parallel.local(p).clone() for name, p in learner.policy.model.named_parameters()}
    moments = {
        name: parallel.local(learner.optimizer.state[p]["exp_avg"]).clone()
        for name, p in learner.policy.model.named_parameters()
    }
    write = take(1)
    learner.step(groups, rewards)
    path = write()
    state = {k: v for p in (path / "state").glob("*.safetensors") for k, v in load_file(p).items()}
    after = dict(learner.policy.model.named_parameters())
    assert sum(not torch.equal(policy[name], parallel.local(p)) for name, p in after.items()) > 0.9 * len(policy)
    for name, before in policy.items():
        assert torch.equal(state[f"model.{name}"], before), name
        assert torch.equal(state[f"optimizer.{name}.exp_avg"], moments[name]), name
        assert state[f"optimizer.{name}.step"] == 1
    written = dict(model.load_model(path / "hf").named_parameters())
    assert all(torch.equal(written[name], policy[name]) for name in policy)
    checkpoint.load(path, learner=learner)
    assert learner.step_number == 1 and all(torch.equal(parallel.local(after[n]), policy[n]) for n in policy)


def test_the_newest_and_the_best_stay(tmp_path, taking):
    _, take = taking
    for step, best in ((0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5)):
        take(step, best)()
    assert names(tmp_path) == ["step-000005", "step-000006"]
    take(7, 5)()
    take(8, 5)()
    assert names(tmp_path) == ["step-000005", "step-000007", "step-000008"]
    assert not list(tmp_path.glob("partial-*"))


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_kill_while_old_ones_are_removed_leaves_no_half(tmp_path, taking, monkeypatch, moment):
    _, take = taking
    for step in (0, 1):
        take(step, keep=2)()
    inner = shutil.rmtree

    def cut_short(path, **options):
        if path.name == "partial-step-000000" and path.exists():
            if moment == "within":
                (path / "state" / "trainer.json").unlink()
            raise Killed
        inner(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(Killed):
        take(2, keep=2)()
    assert names(tmp_path) == ["step-000001", "step-000002"]
    monkeypatch.undo()
    take(3, keep=2)()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_the_one_before_is_written_first(monkeypatch):
    """Taking the next one would clear away what of it lies there."""
    calls = []
    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}})
    this = MagicMock(session=MagicMock(config=settings))
    this.wait.side_effect = lambda: calls.append("wait")
    monkeypatch.setattr(checkpoint, "Snapshot", lambda *_, **options: calls.append("snapshot") or MagicMock())
    Checkpointer.save(this, 3, None, {})
    assert calls[:2] == ["wait", "snapshot"]


def test_a_step_is_written_again_whole(tmp_path, taking):
    _, take = taking
    take(1)()
    (tmp_path / "step-000001" / "hf" / "mark").write_text("the first one")
    take(1)()
    assert names(tmp_path) == ["step-000001"] and not (tmp_path / "step-000001" / "hf" / "mark").exists()


def test_records_reach_the_disk_before_the_checkpoint_counts(tmp_path, taking, monkeypatch):
    seen = []
    inner, replace = checkpoint.flush, checkpoint.os.replace
    monkeypatch.setattr(checkpoint, "flush", lambda path: (seen.append(path.name), inner(path)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (seen.append("renamed"), replace(a, b)))
    _, take = taking
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    take(1, records=(tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"))()
    renamed = seen.index("renamed")
    assert seen.index("metrics.jsonl") < renamed and seen.index("model.safetensors") < renamed
    assert seen.index("partial-000001") < renamed and seen[-1] == tmp_path.name


def test_one_at_a_time_and_errors_are_raised():
    background, gate, order = Background(), threading.Event(), []

    def slow():
        gate.wait(60)
        order.append("slow")
        raise UserError("no room")

    background.put(slow)
    assert not background.failed()
    gate.set()
    with pytest.raises(UserError, match="no room"):
        background.put(lambda: order.append("never"))
    assert order == ["slow"]
    background.put(slow)
    futures.wait([background._writing])
    assert background.failed()
    with pytest.raises(UserError, match="no room"):
        background.wait()
    background.wait()
    background.put(lambda: order.append("last"))
    background.close()
    assert order == ["slow", "slow", "last"]
