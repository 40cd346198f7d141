"""What every name in metrics.jsonl means. docs/metrics.md is made from this, and a test holds a real run's records to
it.

A pattern names a family: <puzzle> stands for a puzzle's name, <k> for a level, <alarm> for an alarm's kind. To add a
metric, add its entry under a heading.
"""

import re
from typing import NamedTuple

from sslr1.puzzles.curriculum import FALL, HORIZON, PLATEAU_STEPS, RISE


class Metric(NamedTuple):
    """unit: or the range; meaning: of what, over what; source: the file and function that make it; reading: what good
    and bad look like, empty where there is no such thing."""

    unit: str
    meaning: str
    source: str
    reading: str = ""


GLOSSARY = {
    "Learning": {
        "step": Metric(
            "1, 2, …", "optimiser steps taken; 0 is the record of the first held-out evaluation", "run.Run.record"
        ),
        "reward": Metric(
            "0 to the rule's highest",
            "mean reward of all completions, of the first puzzle of every slot",
            "runs.metrics.StepTotals",
            "rises. Flat at what a random well-formed answer earns (see puzzles.md): the format is learnt and nothing "
            "else. 0: look at `format`",
        ),
        "reward_std": Metric(
            "0 …",
            "mean over groups of the standard deviation of their rewards (G - 1)",
            "runs.metrics.StepTotals",
            "0 means that no group has a gradient. Small is normal at the start and when a level is solved",
        ),
        "frac_reward_zero_std": Metric(
            "0 to 1",
            "share of the groups trained on whose rewards are all equal, which have no gradient",
            "runs.metrics.StepTotals",
            "high wastes the step: the level is too hard or too easy for the group size; see `rollout.resample` and "
            "`puzzles.curriculum`",
        ),
        "format": Metric(
            "0 to 1",
            "share of completions that keep the format: one box, and with puzzles.thinking one thought before it",
            "runs.metrics.StepTotals",
            "should reach nearly 1 early on; everything else earns 0",
        ),
        "loss": Metric(
            "any sign",
            "the loss that was differentiated, entropy bonus included",
            "learner.Learner.step",
            "no guide to progress: its mean says little on-policy",
        ),
        "policy_loss": Metric("any sign", "the loss without the entropy bonus", "ops.grpo_loss", "as `loss`"),
        "kl": Metric(
            "nats, 0 …",
            "mean distance to the reference per completion token, e^r - r - 1 with r = log-prob under the reference "
            "minus log-prob; absent where loss.kl_coef is 0",
            "ops.grpo_loss",
            "rises slowly. A jump: lower optim.lr, or raise loss.kl_coef",
        ),
        "entropy": Metric(
            "nats, 0 to log V",
            "mean entropy of the next-token distribution over completion tokens, at rollout.temperature",
            "ops.grpo_loss",
            "falls slowly. Near 0 early: collapse, all completions of a group become one. Rising without end: the "
            "policy dissolves",
        ),
        "grad_norm": Metric(
            "0 …",
            "norm of the whole gradient, before it is clipped to optim.clip_norm",
            "model.parallel.clip_gradients",
            "even. 0: no group has a gradient. nan or inf: the update was skipped, see `skipped_steps`",
        ),
        "learning_rate": Metric("0 to optim.lr", "of this step's update", "learner.Learner.learning_rate"),
        "skipped_steps": Metric(
            "0, 1, …",
            "updates skipped so far because their gradient was not finite",
            "learner.Learner.step",
            "0. Ten in a row end the run",
        ),
        "alarm/<alarm>": Metric(
            "1, or absent",
            "the step of an alarm. entropy: completions hardly differ any more, and the puzzles are not solved; "
            "lost: completions kept the format and no longer do; format: few completions keep it, step after step; "
            "reward: completions earn what the format earns, and nothing for their answers",
            "runs.alarms.Alarms",
            "absent; raised once a run. See troubleshooting.md",
        ),
        "clip_ratio/low_mean": Metric(
            "0 to 1",
            "share of completion tokens whose ratio is below 1 - loss.clip_low at a negative advantage",
            "ops.grpo_loss",
            "0 by construction with loss.updates=1",
        ),
        "clip_ratio/high_mean": Metric(
            "0 to 1",
            "share of completion tokens whose ratio is above 1 + loss.clip_high at a positive advantage (cispo: at "
            "any)",
            "ops.grpo_loss",
            "0 by construction with loss.updates=1",
        ),
        "ratio/mean": Metric(
            "0 …", "mean ratio of new to old probability of completion tokens", "ops.grpo_loss", "1 on-policy"
        ),
        "ratio/min": Metric("0 to 1", "smallest ratio of the step", "ops.grpo_loss", "1 on-policy"),
        "ratio/max": Metric("1 …", "largest ratio of the step", "ops.grpo_loss", "1 on-policy"),
    },
    "Puzzles": {
        "rewards/<puzzle>/mean": Metric(
            "as `reward`", "mean reward of this puzzle's completions, all levels", "runs.metrics.StepTotals"
        ),
        "accuracy/<puzzle>/level<k>": Metric(
            "0 to 1",
            "mean share of right places (exactness for single answers), sampled at rollout.temperature",
            "runs.metrics.StepTotals",
            "compare with chance: 1 / choices, and 1 / K for the places of an ordering of K tiles",
        ),
        "exact/<puzzle>/level<k>": Metric(
            "0 to 1",
            "share of completions whose whole answer is right",
            "runs.metrics.StepTotals",
            "compare with chance: 1 / choices, and 1 / K! for an ordering of K tiles",
        ),
        "chance/<puzzle>/level<k>": Metric(
            "0 to 1",
            "mean probability that a random valid answer to these puzzles is exact",
            "runs.metrics.StepTotals",
        ),
        "curriculum/<puzzle>/level": Metric(
            "a level",
            "the puzzle's main level after this step; step k + 2 is the first that it rules",
            "puzzles.curriculum",
        ),
        "curriculum/<puzzle>/mean": Metric(
            "at most 1",
            f"exponential mean ({HORIZON} steps) of chance-corrected exactness at the main level: 0 is guessing, 1 is "
            "solved",
            "puzzles.curriculum",
            f"the adaptive curriculum raises the level above {RISE} and lowers it below {FALL}",
        ),
        "curriculum/<puzzle>/plateau": Metric(
            "1, or absent",
            f"the step of an alarm: for {PLATEAU_STEPS} steps the puzzle has earned what random answers earn",
            "run.Run.record",
            "absent. See troubleshooting.md",
        ),
    },
    "Sampling": {
        "completions/mean_length": Metric(
            "tokens",
            "mean length of completions, stop token included",
            "runs.metrics.StepTotals",
            "drifting to rollout.max_tokens means that completions are about to be cut off",
        ),
        "completions/clipped_ratio": Metric(
            "0 to 1",
            "share of completions cut off at rollout.max_tokens",
            "runs.metrics.StepTotals",
            "near 0. By default (rollout.truncated=zero) each of them earns 0",
        ),
        "sampling/logp_difference/mean": Metric(
            "nats, 0 …",
            "mean absolute difference of the sampler's and the learner's log-prob of completion tokens",
            "learner.Learner.step",
            "rounding only; a test holds the largest of a run below 1e-4, in float32 on a CPU. If it grows from step "
            "to step, the sampler's weights are old",
        ),
        "sampling/logp_difference/max": Metric(
            "nats, 0 …", "the largest such difference of the step", "learner.Learner.step"
        ),
        "sampling/capped": Metric(
            "0 to 1",
            "share of completion tokens whose importance weight is capped at loss.is_cap; 0 without "
            "rollout.max_logp_gap",
            "learner.Learner._weights",
            "0, or nearly",
        ),
        "rollout/resampled": Metric(
            "groups",
            "groups trained on that are of another puzzle than their slot's first, since that one's rewards were all "
            "equal; absent where rollout.resample is 0",
            "train.resample",
            "many: the step costs more rollouts than it has slots; change the level instead",
        ),
    },
    "Time": {
        "timing_s/stream": Metric(
            "s",
            "waiting for puzzles, which are prepared one step ahead",
            "train.train",
            "near 0; otherwise decoding or drawing is the bottleneck",
        ),
        "timing_s/rollout": Metric("s", "drawing completions, resampled groups included", "train.roll_out"),
        "timing_s/reward": Metric("s", "scoring completions", "train.roll_out", "near 0"),
        "timing_s/learner": Metric("s", "forward, backward and optimiser", "train.train"),
        "timing_s/weights": Metric("s", "bringing the learner's weights to the sampler", "train.train"),
        "timing_s/step": Metric("s", "the sum of these; evaluations and checkpoints are not in it", "run.Run.record"),
        "timing_s/elapsed": Metric("s", "since this process began its run, all included", "run.Run.record"),
        "perf/tokens_per_second": Metric(
            "tokens/s", "completion tokens in the loss, of all ranks, a second of the step", "run.Run.record"
        ),
        "perf/learner_tokens_per_second": Metric(
            "tokens/s", "tokens that went through the learner, each prompt once, of all ranks", "run.Run.record"
        ),
        "perf/learner_effective_tokens_per_second": Metric(
            "tokens/s",
            "the same counted as if every completion had its own copy of the prompt, for comparison with trainers in "
            "which it has",
            "run.Run.record",
        ),
        "perf/learner_tflops": Metric(
            "10¹² operations/s", "of the learner, a rank, counted by `sslr1.model.cost`", "run.Run.record"
        ),
        "perf/mfu": Metric(
            "0 to 1", "that, as a share of the GPU's peak; only on GPUs whose peak is known", "run.Run.record"
        ),
        "perf/max_memory_allocated_gb": Metric(
            "GiB", "most GPU memory that tensors have taken so far, rank 0; only on GPUs", "run.Run.record"
        ),
        "perf/cpu_cores": Metric(
            "processors",
            "how many rank 0's process has kept busy since the last record, all its threads",
            "runs.usage.Usage",
            "on a CPU near the threads that the run was given",
        ),
        "perf/host_to_device_mb": Metric(
            "MB",
            "what rank 0 copied from the host to its GPU since the last record: pictures for the most part, each once; "
            "0 on a CPU",
            "runs.usage.Usage",
        ),
        "perf/host_memory_gb": Metric("GiB", "memory that rank 0's process holds now", "runs.usage.Usage", "level"),
        "perf/max_host_memory_gb": Metric(
            "GiB", "most memory that rank 0's process has taken so far", "runs.usage.Usage"
        ),
    },
    "Held out": {
        "eval/<puzzle>/exact": Metric(
            "0 to 1",
            "share of held-out puzzles solved, greedy, at the level that puzzles.levels names, whatever the curriculum "
            "does",
            "evaluate.held_out.Evaluator",
            "the number to trust: compare with `eval/<puzzle>/chance`. Its standard error is sqrt(p (1 - p) / n)",
        ),
        "eval/<puzzle>/accuracy": Metric(
            "0 to 1", "share of right places (`exact` for single answers)", "evaluate.held_out.Evaluator"
        ),
        "eval/<puzzle>/format": Metric("0 to 1", "share whose format is right", "evaluate.held_out.Evaluator"),
        "eval/<puzzle>/chance": Metric(
            "0 to 1", "mean probability that a random valid answer is right", "evaluate.held_out.Evaluator"
        ),
        "eval/<puzzle>/n": Metric("puzzles", "how many were asked; eval.count", "evaluate.held_out.Evaluator"),
    },
}


def regex(pattern: str) -> str:
    """A pattern as a regular expression for whole names."""
    return (
        re.escape(pattern).replace("<puzzle>", r"[a-z][a-z0-9_-]*").replace("<k>", r"\d+").replace("<alarm>", "[a-z]+")
    )


def find(name: str) -> str | None:
    """The pattern that a metric's name falls under, None if there is none."""
    patterns = (pattern for entries in GLOSSARY.values() for pattern in entries)
    return next((pattern for pattern in patterns if re.fullmatch(regex(pattern), name)), None)
