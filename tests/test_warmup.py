"""What a warm-up shows: the right form, around random answers or around right ones."""

import pytest

from sslr1 import build, config, warmup


@pytest.mark.parametrize("answers", ["random", "right"])
def test_what_is_shown(tiny, scenes, one_process, monkeypatch, answers):
    settings = config.check(
        {
            "model": {"path": str(tiny)},
            "data": {"path": str(scenes), "min_side": 112},
            "puzzles": {"mixture": {"rotation": 1.0, "ordering": 1.0}, "thinking": False},
            "train": {"warmup": {"steps": 2, "batch": 16, "answers": answers}},
        }
    )
    built = build.build(settings, one_process)
    shown, steps = [], []
    monkeypatch.setattr(
        warmup.Learner, "step", lambda self, groups, ones, advantages: shown.append(groups) or {"entropy": 0.0}
    )
    warmup.warm_up(built, lambda step, learned: steps.append(step))
    stream = built.stream(16)
    scores = [
        built.score(answer, group.samples[0].text)
        for step, groups in enumerate(shown)
        for answer, group in zip(stream.build(step).puzzles.answers, groups, strict=True)
    ]
    stream.close()
    assert steps == [1, 2] and len(scores) == 32 and all(s.format_ok for s in scores)
    right = sum(s.exact for s in scores)
    assert right == 32 if answers == "right" else right < 20
