"""What a warm-up shows: the right form, around random answers or around right ones."""

from types import SimpleNamespace

import pytest

from sslr1 import config, warmup
from sslr1.runs.progress import Progress
from sslr1.setup import build


@pytest.fixture
def shown(monkeypatch):
    """The groups of each step that a warm-up would learn from."""
    groups_shown = []
    monkeypatch.setattr(
        warmup.Learner,
        "step",
        lambda self, groups, ones, advantages: groups_shown.append(groups) or SimpleNamespace(metrics={"entropy": 0.0}),
    )
    return groups_shown


@pytest.mark.parametrize("answers, right_for", [("random", []), ("right", []), ("right", ["rotation"])])
def test_what_is_shown(tiny, scenes, one_process, shown, answers, right_for, monkeypatch):
    settings = config.check(
        {
            "model": {"path": str(tiny)},
            "data": {"path": str(scenes), "min_side": 112},
            "puzzles": {"mixture": {"rotation": 1.0, "ordering": 1.0}, "thinking": False},
            "train": {"warmup": {"steps": 2, "batch": 16, "answers": answers, "right_for": right_for}},
        }
    )
    built = build.build(settings, one_process)
    steps, progress = [], Progress(False)
    monkeypatch.setattr(progress, "show", lambda step, values: steps.append((step, values)))
    warmup.warm_up(built, progress)
    stream = built.stream(16)
    made = [stream.build(step).puzzles for step in range(2)]
    names = [name for batch in made for name in batch.names]
    scores = [
        built.score(answer, group.samples[0].text)
        for batch, groups in zip(made, shown, strict=True)
        for answer, group in zip(batch.answers, groups, strict=True)
    ]
    stream.close()
    assert (
        steps == [(1, {"entropy": 0.0}), (2, {"entropy": 0.0})]
        and len(scores) == 32
        and all(s.format_ok for s in scores)
    )
    for name in ("rotation", "ordering"):
        exact = [s.exact for s, n in zip(scores, names) if n == name]
        assert len(exact) > 5
        assert all(exact) == (answers == "right" and name in (right_for or names))


@pytest.mark.parametrize("curriculum", ["fixed", "adaptive"])
def test_a_run_that_may_change_levels_is_shown_the_next_ones_too(tiny, scenes, one_process, shown, curriculum):
    settings = config.check(
        {
            "model": {"path": str(tiny)},
            "data": {"path": str(scenes), "min_side": 112},
            "puzzles": {"mixture": {"ordering": 1.0}, "thinking": False, "curriculum": curriculum},
            "train": {"warmup": {"steps": 6, "batch": 16}},
        }
    )
    warmup.warm_up(build.build(settings, one_process))
    lengths = {group.samples[0].text.count(",") + 1 for groups in shown for group in groups}
    at_level_2 = {3, 6}
    assert lengths & at_level_2 and lengths <= {2, 3, 4, 6, 9}
    assert bool(lengths & {2, 4}) == (9 in lengths) == (curriculum == "adaptive")
