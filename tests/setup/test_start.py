"""What a run refuses before it loads a model, in words that a user can act on; `test_train.py` has the same through the
command."""

import re
import shutil
from functools import partial

import pytest
import torch

from sslr1 import config, distributed, model
from sslr1.data import choose_held_out
from sslr1.errors import UserError
from sslr1.setup import build

SMALL = {"mixture": {"rotation": 0.5, "ordering": 0.5}, "levels": {"ordering": 2}}


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model would be loaded; `build`'s settings for a process of its own are left out."""
    monkeypatch.setattr(model, "skeleton", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def settings(tiny, scenes, **sections):
    tree = {"model": {"path": str(tiny)}, "data": {"path": str(scenes), "min_side": 112}, "puzzles": SMALL}
    return config.check(tree | sections)


def test_a_token_budget_below_a_prompt_and_its_completion(tmp_path, tiny, scenes, one_process, no_model):
    def problem(budget, **puzzles):
        train = {"token_budget": budget}
        sections = {"puzzles": {**SMALL, **puzzles}, "rollout": {"max_tokens": 100}, "train": train}
        with pytest.raises(UserError, match=rf"train\.token_budget is {budget}: .*rollout\.max_tokens=100") as caught:
            build.build(settings(tiny, scenes, **sections), one_process, tmp_path)
        found = re.search(r"prompt of (\d+) tokens \((\w+), level (\d)\).* set it to (\d+) or more", str(caught.value))
        length, name, level, needed = found.groups()
        assert int(length) + 100 == int(needed) > budget
        return int(needed), name, int(level)

    needed, name, level = problem(100)
    while True:  # each puzzle in turn
        try:
            needed, name, level = problem(needed)
        except pytest.fail.Exception:  # nothing is too long any more: the model is what comes next
            break
    assert (name, level) == ("ordering", 2)
    more, name, level = problem(needed, curriculum="adaptive")
    assert name == "ordering" and level > 2 and more > needed


def test_bfloat16_on_a_gpu_without_it(monkeypatch, tiny, scenes, no_model):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    world = distributed.World(0, 1, torch.device("cuda"))
    for dtype in ("auto", "bfloat16"):
        tree = {"path": str(tiny), "dtype": dtype}
        with pytest.raises(UserError, match=rf"model\.dtype is {dtype}, .* set model\.dtype=float32"):
            build.build(settings(tiny, scenes, model=tree), world)


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"rollout": {"prompts": 7}}, r"rollout\.prompts is 7, not divisible by the 2 ranks"),
        ({"train": {"replicate": 3}}, r"train\.replicate is 3, which does not divide the 2 ranks"),
    ],
)
def test_ranks_that_do_not_divide(tiny, scenes, no_model, sections, words):
    with pytest.raises(UserError, match=words):
        build.build(settings(tiny, scenes, **sections), distributed.World(0, 2, torch.device("cpu")))


def test_a_sheet_for_which_the_bounds_leave_no_room(tiny, scenes, one_process, no_model):
    with pytest.raises(
        UserError, match=r"ordering, level 2: a sheet of .* max_pixels = 12544: change them, or don't compose"
    ):
        build.build(settings(tiny, scenes, puzzles=SMALL | {"composed": True}), one_process)


def test_held_out_puzzles_are_chosen_once_a_run(tmp_path, tiny, scenes, one_process, monkeypatch):
    """A later start reads their addresses; other settings, or a damaged file, have them chosen anew; a picture that is
    gone is left out."""
    from sslr1.evaluate import held_out as evaluate

    images = tmp_path / "images"
    shutil.copytree(scenes, images)
    settings_of = partial(settings, tiny, images)
    times = []
    monkeypatch.setattr(evaluate, "choose_held_out", lambda *a, **k: times.append(1) or choose_held_out(*a, **k))

    def start(count=6):
        config = settings_of(eval={"count": count}, train={"threads": 1})
        return evaluate.Evaluator(build.build(config, one_process, tmp_path))

    first = start()
    asked = [len(batch) for batches in first.batches.values() for batch in batches]
    assert len(times) == 2 and asked == [6, 6] and start().addresses == first.addresses and len(times) == 2
    (tmp_path / evaluate.FROZEN).write_text("{")
    assert start().addresses == first.addresses and len(times) == 4
    assert start(count=3).addresses.keys() == first.addresses.keys() and len(times) == 6
    start()
    store = first.session.evaluation.store
    number = first.addresses["rotation"][0].index
    (images / store.folder.files[number][0]).unlink()
    again = start()
    assert again.addresses == first.addresses and len(times) == 8
    assert all(puzzle.address.index != number for batch in again.batches["rotation"] for puzzle in batch)
    assert sum(map(len, again.batches["rotation"])) < 6
    shutil.rmtree(images)
    nothing = start()
    assert nothing.batches == {"rotation": [], "ordering": []} and nothing.run()[0]["eval/rotation/n"] == 0


def test_runs_that_start_together_share_the_tiny_model(tmp_path, monkeypatch):
    """Neither reads what the other has half written, and the second one's copy is not left."""
    settings = config.check(
        {"data": {"path": "photos"}, "model": {"path": "builtin:tiny"}, "log": {"dir": str(tmp_path)}}
    )
    home = tmp_path / "builtin"

    def build_tiny(folder, family):
        assert not (home / "tiny").exists()
        other, _ = build.builtin(settings) if calls.pop() else (None, None)  # starts while this one writes
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("by the second" if other is None else "by the first")
        return folder

    calls = [False, True]
    monkeypatch.setattr("sslr1.model.tiny.build_tiny", build_tiny)
    path, _ = build.builtin(settings)
    assert [p.name for p in home.iterdir()] == ["tiny"] and (path / "config.json").read_text() == "by the second"
