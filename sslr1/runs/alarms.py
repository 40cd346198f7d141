"""Alarms of a run that goes wrong as a whole: no entropy left, the format lost, no format, nothing earned but the
format.

Users of comparable trainers report rewards that stay at the format's weight for thousands of steps and entropy that is
gone within 60 steps; they found out afterwards. The bounds below are ours. A puzzle that is only guessed at is the
curriculum's to see. Imports no torch: a report reads its words.
"""

import math

from sslr1.puzzles.reward import Answer, score

EARLY_STEPS = 10  # whose mean entropy is what later ones are compared with
COLLAPSE, FLOOR, COLLAPSE_STEPS = 0.1, 0.005, 20  # under this share of it, or this many nats a token, for so many steps
SOLVED = 0.9  # of the largest reward: whoever earns that may be certain
KEPT, LOST, LOST_STEPS = 0.5, 0.5, 10  # format: so much was kept once; under this share of its best for so many steps
FORMAT = 0.3  # share of completions in format
PLATEAU, PLATEAU_STEPS = 0.02, 50  # reward beyond the format's; for so many steps, of either

# What is the matter, by the alarm's kind: the names under which runs record them (`alarm/<kind>`, and for a puzzle's
# plateau `curriculum/<puzzle>/plateau`)
MESSAGES = {
    "entropy": f"entropy has been under {COLLAPSE:.0%} of what it was at first for {COLLAPSE_STEPS} steps and the "
    "puzzles are not solved: completions hardly differ any more",
    "lost": f"the format was kept, and for {LOST_STEPS} steps has been under {LOST:.0%} of its best: what the model "
    "could do is coming apart",
    "format": f"under {FORMAT:.0%} of completions have kept the format for {PLATEAU_STEPS} steps",
    "reward": f"for {PLATEAU_STEPS} steps completions have earned what the right format earns and nothing for their "
    "answers",
    "plateau": "a puzzle has earned what random answers earn, step after step",
}
RAISED = tuple(MESSAGES)[:4]  # of the run as a whole, by Alarms; a puzzle's plateau is the curriculum's to raise


def advice(kind, settings, puzzle=None) -> str:
    """What to do about an alarm in this run. settings: its configuration as a nested dict, as config.yaml holds it;
    puzzle: whose plateau it is."""
    return {"entropy": _entropy, "lost": _lost, "format": _format}.get(kind, _level)(settings, puzzle)


def _entropy(settings, _) -> str:
    loss, lr = settings["loss"], settings["optim"]["lr"]
    ways = [f"lower optim.lr below {lr:g}", f"raise loss.entropy_coef above {loss['entropy_coef']:g}"]
    if loss["entropy_coef"] == 0:
        ways[1] = "set loss.entropy_coef=0.001"
    if loss["updates"] > 1:  # else every token is on-policy, and nothing is clipped
        ways.append(f"raise loss.clip_high above {loss['clip_high']:g}")
    return _go_on(ways)


def _lost(settings, _) -> str:
    loss = settings["loss"]
    ways = [f"lower optim.lr below {settings['optim']['lr']:g}"]
    if loss["entropy_coef"]:
        ways.append(f"lower loss.entropy_coef below {loss['entropy_coef']:g}, which pays for every other token, too")
    return (
        f"begin a new run, or go back to an earlier checkpoint, and {' or '.join(ways)}: weights that have lost the "
        "format rarely find it again"
    )


def _format(settings, _) -> str:
    steps, longer = settings["train"]["warmup"]["steps"], f"above {settings['rollout']['max_tokens']}"
    if settings["puzzles"]["thinking"]:
        longer += " or set puzzles.thinking=false"
    taught = f"raise train.warmup.steps above {steps}" if steps else "set train.warmup.steps=60"
    return (
        f"where completions are cut off in samples.jsonl, raise rollout.max_tokens {longer}; where they end and lack "
        f"the form, {taught} in a new run, which teaches it"
    )


def _level(settings, puzzle) -> str:
    c = settings["puzzles"]
    names = [name for name, share in c["mixture"].items() if share and puzzle in (None, name)]
    lower = {name: c["levels"][name] - 1 for name in names if c["levels"][name] > 1}
    if lower and c["curriculum"] == "fixed":
        levels = " ".join(f"puzzles.levels.{name}={level}" for name, level in lower.items())
        return _go_on([f"set {levels}", "puzzles.curriculum=adaptive, which lowers levels by itself"])
    ways = [f"raise rollout.group_size above {settings['rollout']['group_size']}, so that some answer is right"]
    ways += [f"teach {puzzle or 'the puzzles'} by train.warmup.answers=right in a new run"]
    if c["rule"] != "default":
        ways.insert(0, "set puzzles.rule=default, which pays for answers that are partly right")
    wait = "the curriculum lowers levels by itself; where the lowest is no better, "
    return (wait if c["curriculum"] == "adaptive" else "") + _go_on(ways)


def _go_on(ways) -> str:
    return (
        f"{', '.join(ways[:-1])}, or {ways[-1]}; checkpoint.allow_change=true lets this run go on with other settings"
    )


class Alarms:
    """Fed each step's metrics, in order; every alarm is raised once a run. All ranks may hold one: they agree.

    rule: the reward's, by which the format alone and a right answer earn what they earn."""

    def __init__(self, rule):
        wrong, right = (score(Answer("choice", "B"), f"\\boxed{{{x}}}", rule, thinking=False).reward for x in "AB")
        self.format_reward, self.solved = wrong, SOLVED * right
        self.early, self.early_steps = 0.0, 0  # sum of the first entropies
        self.best = 0.0  # share of a step's completions in format
        self.low = dict.fromkeys(RAISED, 0)  # steps in a row that look bad
        self.raised = []

    def update(self, reward: float, format: float, entropy: float) -> list:
        """Take in a step's mean reward, share of completions in format and mean entropy of a token (nats); returns the
        kinds of the alarms that it raises. An entropy that isn't finite, of a step that was skipped, says nothing."""
        if math.isfinite(entropy) and self.early_steps < EARLY_STEPS:
            self.early, self.early_steps = self.early + entropy, self.early_steps + 1
        usual, self.best = self.early / max(1, self.early_steps), max(self.best, format)
        bad = {
            "entropy": entropy < max(COLLAPSE * usual, FLOOR) and reward < self.solved,
            "lost": self.best >= KEPT and format < LOST * self.best,
            "format": format < FORMAT,
            "reward": format >= FORMAT and reward - self.format_reward * format <= PLATEAU,
        }
        enough = {"entropy": COLLAPSE_STEPS, "lost": LOST_STEPS, "format": PLATEAU_STEPS, "reward": PLATEAU_STEPS}
        self.low = {kind: self.low[kind] + 1 if bad[kind] else 0 for kind in RAISED}
        new = [kind for kind in RAISED if self.low[kind] >= enough[kind] and kind not in self.raised]
        self.raised += new
        return new

    def state(self) -> dict:
        """Everything that later alarms depend on, JSON-able."""
        early = {"early": self.early, "early_steps": self.early_steps, "best": self.best}
        return {**early, "low": dict(self.low), "raised": list(self.raised)}

    def load(self, state: dict) -> None:
        """Go on from `state()`."""
        self.early, self.early_steps = state["early"], state["early_steps"]
        self.best = state.get("best", 0.0)  # checkpoints of before have neither it nor a count of "lost"
        self.low, self.raised = self.low | state["low"], list(state["raised"])
