"""Alarms: when each is raised, that it is raised once, and that a resumed run goes on as if never stopped."""

import json
import math
import re

import pytest

from sslr1 import config, puzzles
from sslr1.puzzles.reward import RULES, Answer, score
from sslr1.runs import alarms
from sslr1.runs.alarms import Alarms

FINE = {"reward": 0.5, "format": 1.0, "entropy": 0.3}


def steps(watch, count, **changes):
    """Kinds raised by each of `count` steps that are fine but for `changes`."""
    return [watch.update(**{**FINE, **changes}) for _ in range(count)]


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
        ("lost", {"format": 0.49, "reward": 0.2}, alarms.LOST_STEPS),
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


def test_a_format_that_was_never_kept_is_not_lost():
    watch = Alarms("default")
    steps(watch, 20, format=0.49)
    assert raised(steps(watch, 100, format=0.2)) == ["format"]
    assert raised(steps(Alarms("default"), 100, format=0.2)) == ["format"]


def test_a_checkpoint_of_before_the_alarm_goes_on():
    """It doesn't know the best format."""
    watch, old = Alarms("default"), Alarms("default")
    steps(old, 15)
    state = old.state()
    del state["best"], state["low"]["lost"]
    watch.load(state)
    steps(watch, 1)
    assert raised(steps(watch, 30, format=0.4)) == ["lost"] and "lost" in watch.low


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
    assert raised(found) == ["entropy", "reward"]


BASE = {"model": {"path": "m"}, "data": {"path": "d"}}
LOW = {"puzzles": {"levels": dict.fromkeys(puzzles.NAMES, 1)}}
VARIANTS = [
    {},
    LOW,
    {"puzzles": {"curriculum": "adaptive", "rule": "exact"}},
    {"loss": {"updates": 2, "entropy_coef": 0.1}},
]
VARIANTS += [{"train": {"warmup": {"steps": 60}}, "puzzles": {"thinking": False}}]


def settings(**changes):
    return config.check(BASE | changes).model_dump(mode="json")


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", alarms.MESSAGES)
def test_advice_is_a_setting_that_exists_and_is_not_set_so(kind, changes):
    tree = settings(**changes)
    line = alarms.advice(kind, tree, "ordering" if kind == "plateau" else None)
    assert "\n" not in line and alarms.MESSAGES[kind]
    named = re.findall(r"((?:[a-z]+\.)+[a-z_]+)(?:=(\S+?))?(?=[,; ]|$)", line)
    named = [(path, value) for path, value in named if path.split(".")[0] in tree]
    assert named, line
    for path, value in named:
        node = tree
        for key in path.split("."):
            node = node[key]
        assert not value or str(node).lower() != value, line
        if value and ".warmup" not in path:
            config.load(None, ["model.path=m", "data.path=d", f"{path}={value}"])


def test_advice_follows_the_settings():
    """Nothing is clipped in one update; no level is lowered that is the lowest; no form is taught that isn't asked."""
    once, twice = (alarms.advice("entropy", settings(loss={"updates": n})) for n in (1, 2))
    assert "loss.clip_high" not in once and "raise loss.clip_high above 0.2" in twice and "below 1e-06" in once
    levels = {"puzzles": {"levels": {"ordering": 3, "rotation": 1}, "mixture": {"ordering": 1, "rotation": 1}}}
    assert "puzzles.levels.ordering=2, or puzzles.curriculum=adaptive" in alarms.advice("reward", settings(**levels))
    assert "puzzles.levels.ordering=2," in alarms.advice("plateau", settings(**levels), "ordering")
    lowest = alarms.advice("plateau", settings(**levels), "rotation")
    assert lowest.startswith("raise rollout.group_size above 8") and "teach rotation by" in lowest
    assert "puzzles.levels" not in alarms.advice("reward", settings(**LOW))
    adaptive = {"puzzles": levels["puzzles"] | {"curriculum": "adaptive", "rule": "paper"}}
    found = alarms.advice("plateau", settings(**adaptive), "ordering")
    assert found.startswith("the curriculum lowers") and "puzzles.rule=default" in found and "=adaptive" not in found
    form = alarms.advice("format", settings(puzzles={"thinking": False}))
    assert "thinking" not in form and "train.warmup.steps=60" in form
    assert "train.warmup.steps above 60" in alarms.advice("format", settings(train={"warmup": {"steps": 60}}))
