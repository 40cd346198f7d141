"""Alarms of a run that goes wrong as a whole: no entropy left, no format, nothing earned but the format.

Users of comparable trainers report rewards that stay at the format's weight for thousands of steps and entropy that is
gone within 60 steps; they found out afterwards. The bounds below are ours. A puzzle that is only guessed at is the
curriculum's to see.
"""

import math
from dataclasses import dataclass

from sslr1.puzzles.reward import Answer, score

EARLY_STEPS = 10  # whose mean entropy is what later ones are compared with
COLLAPSE, FLOOR, COLLAPSE_STEPS = 0.1, 0.005, 20  # under this share of it, or this many nats a token, for so many steps
SOLVED = 0.9  # of the largest reward: whoever earns that may be certain
FORMAT = 0.3  # share of completions in format
PLATEAU, PLATEAU_STEPS = 0.02, 50  # reward beyond the format's; for so many steps, of either

ADVICE = {
    "entropy": f"entropy has been under {COLLAPSE:.0%} of what it was at first for {COLLAPSE_STEPS} steps and the "
    "puzzles are not solved: completions hardly differ any more. Raise loss.entropy_coef or loss.clip_high, or "
    "lower optim.lr",
    "format": f"under {FORMAT:.0%} of completions have kept the format for {PLATEAU_STEPS} steps. Look at "
    "samples.jsonl; raise rollout.max_tokens if they are cut off, else teach the format first by train.warmup.steps",
    "reward": f"for {PLATEAU_STEPS} steps completions have earned what the right format earns and nothing for their "
    "answers. Lower puzzles.levels, or set puzzles.curriculum=adaptive",
}


@dataclass(frozen=True)
class Alarm:
    kind: str  # a key of ADVICE, and of the mark alarm/<kind> in the step's metrics

    def __str__(self):
        return f"warning: {ADVICE[self.kind]}"


class Alarms:
    """Fed each step's metrics, in order; every alarm is raised once a run. All ranks may hold one: they agree.

    rule: the reward's, by which the format alone and a right answer earn what they earn."""

    def __init__(self, rule):
        wrong, right = (score(Answer("choice", "B"), f"\\boxed{{{x}}}", rule, thinking=False).reward for x in "AB")
        self.format_reward, self.solved = wrong, SOLVED * right
        self.early, self.early_steps = 0.0, 0  # sum of the first entropies
        self.low = dict.fromkeys(ADVICE, 0)  # steps in a row that look bad
        self.raised = []

    def update(self, reward: float, format: float, entropy: float) -> list:
        """Take in a step's mean reward, share of completions in format and mean entropy of a token (nats); returns the
        Alarms that it raises. An entropy that isn't finite, of a step that was skipped, says nothing."""
        if math.isfinite(entropy) and self.early_steps < EARLY_STEPS:
            self.early, self.early_steps = self.early + entropy, self.early_steps + 1
        usual = self.early / max(1, self.early_steps)
        bad = {
            "entropy": entropy < max(COLLAPSE * usual, FLOOR) and reward < self.solved,
            "format": format < FORMAT,
            "reward": format >= FORMAT and reward - self.format_reward * format <= PLATEAU,
        }
        enough = {"entropy": COLLAPSE_STEPS, "format": PLATEAU_STEPS, "reward": PLATEAU_STEPS}
        self.low = {kind: self.low[kind] + 1 if bad[kind] else 0 for kind in ADVICE}
        new = [kind for kind in ADVICE if self.low[kind] >= enough[kind] and kind not in self.raised]
        self.raised += new
        return [Alarm(kind) for kind in new]

    def state(self) -> dict:
        """Everything that later alarms depend on, JSON-able."""
        early = {"early": self.early, "early_steps": self.early_steps}
        return {**early, "low": dict(self.low), "raised": list(self.raised)}

    def load(self, state: dict) -> None:
        """Go on from `state()`."""
        self.early, self.early_steps = state["early"], state["early_steps"]
        self.low, self.raised = dict(state["low"]), list(state["raised"])
