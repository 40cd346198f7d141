"""Alarms: when each is raised, that it is raised once, and that a resumed run goes on as if never stopped."""

import json
import math

import pytest

from sslr1.puzzles.reward import RULES, Answer, score
from sslr1.runs import alarms
from sslr1.runs.alarms import Alarms

FINE = {"reward": 0.5, "format": 1.0, "entropy": 0.3}


def steps(watch, count, **changes):
    """Kinds raised by each of `count` steps that are fine but for `changes`."""
    return [[str(a.kind) for a in watch.update(**{**FINE, **changes})] for _ in range(count)]


def raised(found):
    return [kind for kinds in found for kind in kinds]


def test_a_run_that_goes_well_raises_none():
    watch = Alarms("default")
    assert not raised(steps(watch, 200))
    assert not raised(steps(watch, 200, entropy=0.031))  # more certain with time
    assert not raised(steps(watch, 200, format=0.5, reward=0.09))  # 0.04 of it for answers
    assert not raised(steps(watch, 200, entropy=1e-4, reward=0.95))  # solved: there is nothing left to be uncertain of


@pytest.mark.parametrize(
    "kind, changes, after",
    [
        ("entropy", {"entropy": 0.029}, alarms.COLLAPSE_STEPS),
        ("format", {"format": 0.29, "reward": 0.2}, alarms.PLATEAU_STEPS),
        ("reward", {"reward": 0.11}, alarms.PLATEAU_STEPS),
        ("reward", {"reward": 0.06, "format": 0.5}, alarms.PLATEAU_STEPS),
    ],
)
def test_raised_once_and_after_enough_steps(kind, changes, after):
    watch = Alarms("default")
    assert not raised(steps(watch, alarms.EARLY_STEPS))
    assert not raised(steps(watch, after - 1, **changes))
    assert not raised(steps(watch, 1))  # a step that is fine begins the count anew
    found = steps(watch, 3 * after, **changes)
    assert found[after - 1] == [kind] == raised(found)
    assert not raised(steps(watch, 5)) and not raised(steps(watch, 3 * after, **changes))


def test_no_entropy_from_the_start():
    assert raised(steps(Alarms("default"), 30, entropy=0.004)) == ["entropy"]


@pytest.mark.parametrize("rule", RULES)
def test_what_the_format_earns_is_the_rules(rule):
    answer = Answer("choice", "C")
    wrong, right = (score(answer, f"<think>x</think>\\boxed{{{x}}}", rule).reward for x in "AC")
    assert raised(steps(Alarms(rule), 60, reward=wrong)) == ["reward"]
    assert not raised(steps(Alarms(rule), 60, reward=wrong + 0.03))
    assert not raised(steps(Alarms(rule), 60, reward=0.91 * right, entropy=0.0))
    assert raised(steps(Alarms(rule), 60, reward=0.89 * right, entropy=0.0)) == ["entropy"]


def test_a_skipped_step_says_nothing_of_entropy():
    watch = Alarms("default")
    steps(watch, 3, entropy=math.nan)
    assert raised(steps(watch, 10)) == [] and math.isfinite(watch.early) and watch.early_steps == 10
    assert raised(steps(watch, 20, entropy=0.02)) == ["entropy"]


@pytest.mark.parametrize("stop", [4, 25, 31, 40])
def test_going_on_from_a_checkpoint(stop):
    whole, first, second = Alarms("paper"), Alarms("paper"), Alarms("paper")
    entropies = [0.1 + 0.01 * n for n in range(11)] + [0.001] * 60
    expected = [whole.update(0.11, 1.0, e) for e in entropies]
    found = [first.update(0.11, 1.0, e) for e in entropies[:stop]]
    second.load(json.loads(json.dumps(first.state())))
    found += [second.update(0.11, 1.0, e) for e in entropies[stop:]]
    assert found == expected and second.state() == whole.state()
    assert [str(a)[:8] for one in found for a in one] == ["warning:"] * 2


def test_advice_names_settings_that_exist():
    from sslr1 import config

    settings = config.check({"model": {"path": "m"}, "data": {"path": "d"}}).model_dump()
    for line in alarms.ADVICE.values():
        assert "\n" not in line
        for word in line.replace("=adaptive", "").split():
            section, _, path = word.strip(".,;").partition(".")
            if path and section in settings:
                node = settings[section]
                for key in path.split("."):
                    node = node[key]
