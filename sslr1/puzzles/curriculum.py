"""The curriculum: each puzzle's level follows how well it is solved, and a puzzle that is only guessed at raises an
alarm.

It knows numbers and names only: it is told a finished step's sums over all ranks and asked for the level of a slot. Two
things make the levels the same whatever the prefetching, the world size and the interruptions: step k follows from the
steps up to k - LAG alone, and what is summed lies on a grid on which float64 sums are exact in any order.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from math import comb, factorial

from sslr1.ops import keys
from sslr1.puzzles.reward import OWN, Answer, score, to_text
from sslr1.sums import plain_sum

LAG = 2  # while step k trains, step k + 1 is prepared: the last update that it can know of is that of step k - 1
HORIZON = 20  # steps that the exponential mean looks back on, and the fewest steps at a level before the next move
RISE, FALL = 0.65, 0.2  # bounds of the mean gain
NEIGHBOURS = 0.2  # share of the samples on neighbouring levels
PLATEAU, PLATEAU_STEPS = 0.02, 50  # the alarm: so near to what guessing earns, for so many steps
_GRID = 2**20  # sums of multiples of 2^-20 below 2^33 have no rounding error


def gain(answer, score, chance) -> float:
    """Chance-corrected exactness of one completion: 1 if it is right, 0 in the mean over random valid answers. For
    sequences of K >= 4, where exactness is too rare to steer by, the share of right places, corrected by 1/K."""
    K = len(answer.value) if answer.kind == "sequence" else 0
    value, chance = (score.accuracy, 1 / K) if K >= 4 else (score.exact, chance)
    return _on_grid((value - chance) / (1 - chance))


def margin(answer, score, rule="default") -> float:
    """By how much one completion earned more than a random well-formed answer would earn in the mean."""
    return _on_grid(score.reward - chance_reward(answer, rule))


def chance_reward(answer, rule="default") -> float:
    """Expected reward of a uniformly random well-formed answer, exact: over the choices of a single answer, over the K!
    permutations of a sequence. Of users' own questions whose valid answers can't be counted, what one earns that is
    wrong. ValueError for a puzzle's single answer that doesn't list its choices."""
    if answer.kind == "sequence":
        return _chance_of_sequence(len(answer.value), rule)
    if answer.kind in OWN and not answer.choices:
        return _earned(Answer("choice", "A"), "B", rule)
    if answer.kind == "quantity":
        return _chance_of_quantity(answer, rule)
    if not answer.choices:
        raise ValueError(f"a {answer.kind} answer without choices: what a random one earns is not known")
    return _chance_of_choice(answer.kind, answer.choices, rule)


@lru_cache(256)
def _chance_of_choice(kind, choices, rule):
    truth = Answer(kind, choices[0], choices)
    return plain_sum(_earned(truth, choice, rule) for choice in choices) / len(choices)


@lru_cache(256)
def _chance_of_quantity(truth, rule):
    return plain_sum(_earned(truth, choice, rule) for choice in truth.choices) / len(truth.choices)


@lru_cache(256)
def _chance_of_sequence(K, rule):
    """Rules look at the number of right places only, and C(K, f) D(K - f) permutations have f (rencontres numbers): the
    places that are right are chosen, the others deranged. One permutation of each kind is scored."""
    truth = Answer("sequence", range(1, K + 1))
    total = 0.0
    for right in range(K + 1):
        count = comb(K, right) * _derangements(K - right)
        if count:
            kept, moved = truth.value[:right], truth.value[right:]
            total += count * _earned(truth, kept + moved[1:] + moved[:1], rule)
    return total / factorial(K)


def _derangements(n):
    """Permutations of n that leave nothing in its place: n! (1 - 1/1! + 1/2! - …)."""
    return sum((-1) ** k * (factorial(n) // factorial(k)) for k in range(n + 1))


def _earned(truth, value, rule):
    return score(truth, f"\\boxed{{{to_text(value)}}}", rule, thinking=False).reward


def _on_grid(x):
    return round(x * _GRID) / _GRID


@dataclass(frozen=True)
class Event:
    """What an update brought about: kind "up", "down" or "plateau"; the level before and after it; the mean gain."""

    puzzle: str
    kind: str
    level: int
    new_level: int
    mean: float

    def __str__(self):
        if self.kind == "plateau":
            what = f"what random answers earn for {PLATEAU_STEPS} steps"
            return f"warning: {self.puzzle} at level {self.level} has earned {what}"
        move = f"{'rises' if self.kind == 'up' else 'falls'} from level {self.level} to {self.new_level}"
        return f"{self.puzzle} {move} (mean gain over chance {self.mean:.2f})"


@dataclass
class _Stay:
    """A puzzle's stay at a level. Every move begins a new one with nothing in its means: how well one level was solved
    doesn't say how well the next one is, and a mean that still held the old level would run on through several
    levels."""

    level: int
    steps: int = 0  # that had samples at this level
    weight: float = 0.0  # exponential sums over those steps; weight is that of the samples, so sum / weight has no bias
    gain: float = 0.0
    margin: float = 0.0
    near: int = 0  # steps in a row that the mean margin has been near 0
    alarmed: bool = False

    @property
    def mean(self) -> float:
        return self.gain / self.weight

    def add(self, sums):
        self.steps += 1
        decay = 1 - 1 / HORIZON
        self.weight = decay * self.weight + sums["n"]
        self.gain = decay * self.gain + sums["gain"]
        self.margin = decay * self.margin + sums["margin"]
        self.near = self.near + 1 if abs(self.margin / self.weight) <= PLATEAU else 0


class Curriculum:
    """mode: "fixed" (every sample at its puzzle's start level) or "adaptive". levels: {puzzle: its levels in order};
    start: {puzzle: level}. All ranks hold one each, feed it the same sums, and so agree without a word.

    Adaptive: above a mean gain of RISE a puzzle's level rises, below FALL it falls, a plateau lowers it; a share
    NEIGHBOURS of the samples is drawn, by (seed, step, slot), from the neighbouring levels and stays out of the means.
    Step k takes the levels that hold after the update of step k - LAG: the stream prepares step k + 1 in the
    background while step k trains, so its levels must be settled before step k has ended. Fixed: the same means and
    alarms, and nothing moves.
    """

    def __init__(self, mode, levels, start, seed):
        if mode not in ("fixed", "adaptive"):
            raise ValueError(f"curriculum {mode!r} is not 'fixed' or 'adaptive'")
        for name in levels:
            if start[name] not in levels[name]:
                raise ValueError(f"{name} can't start at level {start[name]}; it has {tuple(levels[name])}")
        self.mode, self.seed = mode, seed
        self.levels = {name: tuple(own) for name, own in levels.items()}
        self.start = {name: start[name] for name in levels}
        self.step = 0  # the step whose update comes next
        self._stays = {name: _Stay(level) for name, level in self.start.items()}
        self._plan = {step: dict(self.start) for step in range(-1, LAG)}  # main levels of LAG + 1 steps

    def level(self, step: int, slot: int, name: str) -> int:
        """Level for the puzzle `name` in a slot of a step (its number among the step's slots of all ranks). Raises
        ValueError for a step whose levels are not settled yet, or no longer known. Another thread may call it."""
        if self.mode == "fixed":
            return self.start[name]
        plan = self._plan  # replaced whole by update
        if step not in plan:
            raise ValueError(
                f"the levels of step {step} follow from the update of step {step - LAG}, and the last one was of step "
                f"{max(plan) - LAG}"
            )
        own = self.levels[name]
        place = own.index(plan[step][name])
        neighbours = own[max(place - 1, 0) : place] + own[place + 1 : place + 2]
        drawn = keys.fold("level", self.seed, step, slot) / 2**64 / NEIGHBOURS
        return neighbours[int(drawn * len(neighbours))] if neighbours and drawn < 1 else own[place]

    def update(self, step: int, sums: dict) -> list:
        """Take in a finished step, in order: sums[puzzle][level] holds the sums over all ranks' completions at that
        level, "n" (how many), "gain" and "margin"; what had none may be left out. Returns the Events."""
        if step != self.step:
            raise ValueError(f"the update of step {step} came where that of step {self.step} was due")
        events = []
        for name, stay in self._stays.items():
            found = sums.get(name, {}).get(stay.level)
            if self._plan[step][name] == stay.level and found and found["n"]:
                stay.add(found)
                events += self._judge(name, stay)
        settled = {s: self._plan[s] for s in range(step, step + LAG)}
        self._plan = {**settled, step + LAG: {name: stay.level for name, stay in self._stays.items()}}
        self.step = step + 1
        return events

    def _judge(self, name, stay):
        events, move = [], 0
        if stay.steps >= HORIZON:
            move = 1 if stay.mean > RISE else -1 if stay.mean < FALL else 0
        if stay.near >= PLATEAU_STEPS and not stay.alarmed:
            stay.alarmed, move = True, -1
            events.append(Event(name, "plateau", stay.level, stay.level, stay.mean))
        own = self.levels[name]
        place = own.index(stay.level) + move
        if self.mode == "adaptive" and move and 0 <= place < len(own):
            events.append(Event(name, "up" if move > 0 else "down", stay.level, own[place], stay.mean))
            self._stays[name] = _Stay(own[place])
        return events

    def metrics(self) -> dict:
        """curriculum/<puzzle>/level, and mean where the level has had samples: how things stand after the last
        update."""
        out = {}
        for name, stay in self._stays.items():
            out[f"curriculum/{name}/level"] = stay.level
            if stay.weight:
                out[f"curriculum/{name}/mean"] = stay.mean
        return out

    def state(self) -> dict:
        """Everything that later levels depend on, JSON-able."""
        plan = [dict(self._plan[step]) for step in sorted(self._plan)]
        return {"step": self.step, "plan": plan, "puzzles": {name: asdict(stay) for name, stay in self._stays.items()}}

    def load(self, state: dict) -> None:
        """Go on from `state()`. Puzzles that it doesn't know start at their start level, and so do, in fixed mode,
        those whose level has been set to another one since."""
        self.step = state["step"]
        plan = [{**self.start, **(levels if self.mode == "adaptive" else {})} for levels in state["plan"]]
        self._plan = {self.step - 1 + i: levels for i, levels in enumerate(plan)}
        for name, start in self.start.items():
            kept = state["puzzles"].get(name)
            same = kept and (self.mode == "adaptive" or kept["level"] == start)
            self._stays[name] = _Stay(**kept) if same else _Stay(start)
