"""The curriculum: when levels move, what a step may know, what is drawn, and that nothing depends on how a run is cut
up."""

import json
from collections import Counter
from itertools import permutations
from math import erfc, factorial, sqrt

import numpy as np
import pytest

from sslr1.puzzles import curriculum
from sslr1.puzzles.curriculum import HORIZON, LAG, NEIGHBOURS, PLATEAU_STEPS, Curriculum, chance_reward, gain, margin
from sslr1.puzzles.reward import RULES, Answer, score, to_text

LEVELS = {"rotation": (1, 2, 3, 4), "ordering": (1, 2, 3, 4)}
START = {"rotation": 2, "ordering": 2}


def made(mode="adaptive", seed=0, levels=LEVELS, start=START):
    return Curriculum(mode, levels, start, seed)


def sums(level, gain, margin=1.0, n=16, name="rotation"):
    return {name: {level: {"n": n, "gain": gain * n, "margin": margin * n}}}


def main_levels(c, step, name="rotation"):
    """The level of most of a step's slots."""
    return Counter(c.level(step, slot, name) for slot in range(100)).most_common(1)[0][0]


def run(c, steps, gain, margin=1.0):
    """Feed one result for so many steps, always at the main level of the step; returns [(step, event)]."""
    events = []
    for step in range(c.step, c.step + steps):
        events += [(step, event) for event in c.update(step, sums(main_levels(c, step), gain, margin))]
    return events


@pytest.mark.parametrize("value, kind, then, last", [(0.66, "up", [3, 4], 4), (0.19, "down", [1], 1)])
def test_levels_move_to_the_bound_and_not_beyond(value, kind, then, last):
    c = made()
    events = run(c, 200, value)
    assert [(e.kind, e.new_level) for _, e in events] == [(kind, level) for level in then]
    assert all(e.puzzle == "rotation" and e.mean == pytest.approx(value) for _, e in events)
    first = [
        HORIZON - 1 + i * (HORIZON + LAG - 1) for i in range(len(then))
    ]  # steps on the way count for neither level
    assert [step for step, _ in events] == first
    assert main_levels(c, c.step) == last and main_levels(c, c.step, "ordering") == 2
    assert {c.level(c.step, slot, "rotation") for slot in range(400)} == {last, last - 1 if last == 4 else 2}


@pytest.mark.parametrize("value", [0.21, 0.4, 0.64])
def test_levels_stay_between_the_bounds(value):
    c = made()
    assert not run(c, 100, value) and main_levels(c, c.step) == 2
    assert c.metrics()["curriculum/rotation/level"] == 2
    assert c.metrics()["curriculum/rotation/mean"] == pytest.approx(value)
    assert "curriculum/ordering/mean" not in c.metrics()


def test_fixed_levels_stay():
    c = made("fixed")
    assert [e.kind for _, e in run(c, 100, 0.9)] == []
    assert {c.level(step, slot, "rotation") for step in (0, 5, 10**6) for slot in range(50)} == {2}


def test_the_mean_is_the_bias_corrected_exponential_one(draw):
    c, total, weight = made(), 0.0, 0.0
    for step in range(60):
        x = draw.uniform(0.3, 0.6)
        c.update(step, sums(2, x) if step % 3 else {})  # a step without samples changes nothing
        if step % 3:
            total, weight = (1 - 1 / HORIZON) * total + x / HORIZON, (1 - 1 / HORIZON) * weight + 1 / HORIZON
            assert c.metrics()["curriculum/rotation/mean"] == pytest.approx(total / weight)
    assert main_levels(c, 60) == 2


def test_only_the_main_level_counts():
    c = made()
    found = {level: {"n": 16, "gain": 16.0 * value, "margin": 16.0} for level, value in ((1, 1.0), (2, 0.4), (3, 0.0))}
    for step in range(60):
        assert not c.update(step, {"rotation": found})
    assert c.metrics()["curriculum/rotation/mean"] == pytest.approx(0.4)
    before = c.state()["puzzles"]
    assert not c.update(60, sums(2, 0.0, n=0)) and c.state()["puzzles"] == before


def test_the_mean_starts_again_when_the_level_moves():
    """And steps that were under way at the old level are not taken for the new one's, though some of their samples are
    at it."""
    c = made()
    run(c, HORIZON, 0.9)
    assert c.metrics() == {"curriculum/rotation/level": 3, "curriculum/ordering/level": 2}
    for step in range(HORIZON, HORIZON + LAG - 1):
        assert main_levels(c, step) == 2
        c.update(step, {"rotation": sums(2, 0.9)["rotation"] | sums(3, 0.9)["rotation"]})
        assert "curriculum/rotation/mean" not in c.metrics()
    assert main_levels(c, HORIZON + LAG - 1) == 3
    assert not run(c, HORIZON - 1, 0.0)  # the fewest steps at a level
    assert c.metrics()["curriculum/rotation/mean"] == 0.0
    ((step, event),) = run(c, 1, 0.0)
    assert (event.kind, event.level, event.new_level) == ("down", 3, 2)


def chi_square_p(observed, expected):
    """One degree of freedom or two: the closed forms."""
    x = sum((o - e) ** 2 / e for o, e in zip(observed, expected))
    return erfc(sqrt(x / 2)) if len(observed) == 2 else np.exp(-x / 2)


@pytest.mark.parametrize("start, shares", [(1, {1: 0.8, 2: 0.2}), (2, {1: 0.1, 2: 0.8, 3: 0.1}), (4, {3: 0.2, 4: 0.8})])
def test_a_fifth_of_the_samples_is_on_neighbouring_levels(seed, start, shares):
    assert NEIGHBOURS == 0.2
    c = made(seed=seed, start={**START, "rotation": start})
    counts = Counter(c.level(step, slot, "rotation") for step in range(LAG) for slot in range(10_000))
    assert counts.keys() == shares.keys()
    assert chi_square_p([counts[k] for k in shares], [20_000 * share for share in shares.values()]) > 1e-6
    alone = made(seed=seed, levels={"rotation": (2,)}, start={"rotation": 2})
    assert {alone.level(0, slot, "rotation") for slot in range(100)} == {2}


def test_levels_are_drawn_by_seed_step_and_slot():
    c = made()
    run(c, 5, 0.5)
    drawn = [[c.level(step, slot, "rotation") for slot in range(300)] for step in (5, 6)]
    assert drawn == [[c.level(step, slot, "rotation") for slot in range(300)] for step in (5, 6)]
    first, other = ([made(seed=s).level(0, slot, "rotation") for slot in range(300)] for s in (0, 1))
    assert drawn[0] != drawn[1] and first != other


def test_a_step_knows_what_was_settled_lag_steps_before():
    """Step k's levels are there before the update of step k - 1, and that update can't change them."""
    low, high = made(), made()
    for step in range(HORIZON):
        low.update(step, sums(2, 0.5))
        high.update(step, sums(2, 0.5 if step < HORIZON - 1 else 9.0))  # the mean jumps over the bound
    assert low.metrics() != high.metrics()
    for slot in range(300):
        assert low.level(HORIZON, slot, "rotation") == high.level(HORIZON, slot, "rotation")
    assert main_levels(low, HORIZON - 1 + LAG) == 2 and main_levels(high, HORIZON - 1 + LAG) == 3


def test_unsettled_steps_and_steps_out_of_turn_are_errors():
    c = made()
    c.level(LAG - 1, 0, "rotation")
    with pytest.raises(ValueError, match=f"step {LAG} follow from the update of step 0"):
        c.level(LAG, 0, "rotation")
    c.update(0, {})
    c.level(LAG, 0, "rotation")
    for step in (0, 2):
        with pytest.raises(ValueError, match=f"step {step} came where that of step 1"):
            c.update(step, {})
    with pytest.raises(ValueError, match="'fixed' or 'adaptive'"):
        made("eager")
    with pytest.raises(ValueError, match="rotation can't start at level 5"):
        made(start={**START, "rotation": 5})


def restored(c, **changes):
    other = made(**changes)
    other.load(json.loads(json.dumps(c.state())))
    return other


def test_a_restored_curriculum_has_the_same_future(draw):
    """At every step, behind moves included, which are still under way for LAG steps."""
    c, moved = made(seed=7), 0
    for step in range(120):
        other = restored(c, seed=7)
        assert other.state() == c.state()
        slots = [(s, slot) for s in (step, step + LAG - 1) for slot in range(40)]
        assert [c.level(s, slot, "rotation") for s, slot in slots] == [
            other.level(s, slot, "rotation") for s, slot in slots
        ]
        found = sums(main_levels(c, step), float(draw.uniform(0, 0.2) + 0.7 * (step // 30 % 2)))
        events = c.update(step, found)
        assert other.update(step, found) == events and other.state() == c.state()
        moved += len(events)
    assert moved >= 2


def test_changed_settings_meet_an_old_state():
    old = made(levels={"rotation": (1, 2, 3, 4)}, start={"rotation": 2})
    run(old, HORIZON, 0.9)
    new = restored(old)
    assert main_levels(new, new.step, "ordering") == 2 and main_levels(new, HORIZON - 1 + LAG) == 3
    fixed = restored(old, mode="fixed")
    assert fixed.level(fixed.step, 0, "rotation") == 2
    fixed.update(fixed.step, sums(2, 0.5))
    assert fixed.metrics()["curriculum/rotation/mean"] == 0.5


def test_the_alarm_is_raised_once_and_lowers_the_level():
    c = made()
    events = run(c, PLATEAU_STEPS - 1, 0.4, margin=0.019)
    assert not events
    ((step, alarm), (_, move)) = run(c, 1, 0.4, margin=0.019)
    assert step == PLATEAU_STEPS - 1 and (alarm.kind, alarm.level) == ("plateau", 2)
    assert (move.kind, move.level, move.new_level) == ("down", 2, 1) and "random answers" in str(alarm)
    later = run(c, 200, 0.4, margin=-0.019)  # the lowest level: nothing left to lower
    assert [e.kind for _, e in later] == ["plateau"] and main_levels(c, c.step) == 1
    for distance in (0.021, -0.021):
        assert not run(made(), 200, 0.4, margin=distance)
    fixed = run(made("fixed"), 200, 0.0, margin=0.0)
    assert [(step, e.kind) for step, e in fixed] == [(PLATEAU_STEPS - 1, "plateau")]


def test_the_alarm_wants_its_steps_in_a_row():
    c = made()
    run(c, PLATEAU_STEPS - 1, 0.4, margin=0.0)
    run(c, 1, 0.4, margin=0.5)  # a fortieth of it is in the mean, for some steps
    assert c.state()["puzzles"]["rotation"]["near"] == 0
    assert not run(c, PLATEAU_STEPS, 0.4, margin=0.0)
    assert [e.kind for _, e in run(c, HORIZON, 0.4, margin=0.0)] == ["plateau", "down"]


def test_levels_are_the_same_however_samples_are_shared_out(draw):
    """Sums over ranks come in any order; not even the last bit of the state may depend on it."""
    answer, chance = Answer("sequence", (2, 1, 3, 5, 4, 6)), 1 / 720
    states = []
    results = [[to_text(tuple(map(int, draw.permutation(6) + 1))) for _ in range(48)] for _ in range(30)]
    for world_size in (1, 2, 3, 7):
        c = made()
        for step, texts in enumerate(results):
            scores = [score(answer, f"\\boxed{{{text}}}", thinking=False) for text in texts]
            ranks = [scores[rank::world_size] for rank in range(world_size)]
            draw.shuffle(ranks)
            found = {"n": 48.0}
            found["gain"] = sum(sum(gain(answer, s, chance) for s in rank) for rank in ranks)
            found["margin"] = sum(sum(margin(answer, s) for s in rank) for rank in ranks)
            c.update(step, {"ordering": {main_levels(c, step, "ordering"): found}})
        states.append(c.state())
    assert all(state == states[0] for state in states) and states[0]["puzzles"]["ordering"]["steps"] < 30


def test_gain_is_one_for_right_and_zero_for_chance():
    for answer, chance in (
        (Answer("number", 90, (0, 90, 180, 270)), 1 / 4),
        (Answer("choice", "B", tuple("ABCDEF")), 1 / 6),
    ):
        found = [gain(answer, score(answer, f"\\boxed{{{v}}}", thinking=False), chance) for v in answer.choices]
        assert max(found) == 1.0 and sum(found) == pytest.approx(0, abs=1e-5)
    for K in range(2, 7):
        answer = Answer("sequence", range(1, K + 1))
        orders = list(permutations(answer.value))
        found = [
            gain(answer, score(answer, f"\\boxed{{{to_text(v)}}}", thinking=False), 1 / len(orders)) for v in orders
        ]
        assert max(found) == 1.0 and sum(found) / len(orders) == pytest.approx(0, abs=1e-5)
        assert (K >= 4) == (len(set(found)) > 2)  # from four places on, each right one counts
    assert gain(Answer("sequence", (1, 2, 3, 4)), score(Answer("sequence", (1, 2, 3, 4)), ""), 1 / 24) < 0


@pytest.mark.parametrize("rule", RULES)
def test_chance_reward_is_the_mean_over_all_answers(rule, draw):
    def mean(answer, values):
        return np.mean([score(answer, f"\\boxed{{{to_text(v)}}}", rule, thinking=False).reward for v in values])

    for K in range(1, 7):
        truth = Answer("sequence", draw.permutation(K) + 1)
        assert chance_reward(truth, rule) == pytest.approx(mean(truth, permutations(range(1, K + 1))), abs=1e-12), K
    for choices in ((0, 90, 180, 270), tuple(range(0, 360, 45)), tuple(range(0, 360, 30))):
        truth = Answer("number", choices[2], choices)
        assert chance_reward(truth, rule) == pytest.approx(mean(truth, choices), abs=1e-12)
    for n in (4, 6, 8):
        truth = Answer("choice", "C", tuple("ABCDEFGH"[:n]))
        assert chance_reward(truth, rule) == pytest.approx(mean(truth, truth.choices), abs=1e-12)
    nine = Answer("sequence", range(1, 10))
    right = score(nine, "\\boxed{1,2,3,4,5,6,7,8,9}", rule, thinking=False)
    if (
        rule == "exact"
    ):  # all draws but one in 362,880 earn the same: no sample's spread says how far its mean may be off
        wrong = score(nine, "\\boxed{2,3,4,5,6,7,8,9,1}", rule, thinking=False).reward
        assert chance_reward(nine, rule) == pytest.approx(wrong + (right.reward - wrong) / factorial(9), abs=1e-12)
    else:
        drawn = [draw.permutation(9) + 1 for _ in range(20_000)]
        rewards = [score(nine, f"\\boxed{{{to_text(tuple(map(int, v)))}}}", rule, thinking=False).reward for v in drawn]
        assert abs(np.mean(rewards) - chance_reward(nine, rule)) < 5 * np.std(rewards) / sqrt(len(rewards))
    assert margin(nine, right, rule) == pytest.approx(right.reward - chance_reward(nine, rule), abs=1e-6)


def test_chance_reward_needs_the_choices():
    with pytest.raises(ValueError, match="choice answer without choices"):
        chance_reward(Answer("choice", "A"))


def test_derangements():
    assert [curriculum._derangements(n) for n in range(10)] == [1, 0, 1, 2, 9, 44, 265, 1854, 14833, 133496]


def test_the_setting(tmp_path):
    from sslr1 import config

    tree = {"model": {"path": "m"}, "data": {"path": "d"}}
    assert config.check(tree).puzzles.curriculum == "fixed"
    with pytest.raises(config.ConfigError, match=r"puzzles\.curriculum is 'eager': one of 'fixed', 'adaptive'"):
        config.check({**tree, "puzzles": {"curriculum": "eager"}})
    started = tmp_path / "config.yaml"
    started.write_text(config.dump(config.check(tree)))
    with pytest.raises(config.ConfigError, match=r"puzzles\.curriculum: fixed → adaptive"):
        config.check_unchanged(started, config.check({**tree, "puzzles": {"curriculum": "adaptive"}}))
