"""GRPO on puzzles cut out of plain images.

torchrun --nproc_per_node=N -m sslr1.train CONFIG [section.key=value …]
python -m sslr1.train CONFIG [section.key=value …]
python -m sslr1.train CONFIG --plan N [section.key=value …]
"""

import argparse
from dataclasses import dataclass

import torch

from sslr1.setup import entry


def train(built, run):
    """The loop: stream, rollout with rewards, learner, sampler weights, log."""
    start = run.begin()
    stream = built.stream(levels=run.curriculum.level)
    for step in range(start, built.config.train.steps):
        if run.stopping():
            break
        with run.clock("stream"):
            batch = stream.get(step)
        drawn = roll_out(run, batch)
        trained = resample(run, stream, batch, drawn)
        with run.clock("learner"):
            learned = run.learner.step(run.learnable(trained.groups), trained.rewards)
        with run.clock("weights"):
            built.weights.refresh(built.policy)
        run.record(step + 1, batch, drawn, trained, learned)
    stream.close()
    run.end()


@dataclass
class Rollout:
    """A group of G completions for each of P puzzles, and what they earned."""

    groups: list
    scores: list  # P lists of G Scores
    rewards: torch.Tensor  # float32 [P, G]
    resampled: int = 0  # groups that are of another puzzle than their slot's first


def roll_out(run, batch, attempt=0) -> Rollout:
    """Draw each prompt's group and score it. attempt: which rollout of these slots this is within their step."""
    with run.clock("rollout"):
        groups = run.built.engine.generate(batch.prompts, step=batch.step, attempt=attempt, **run.sampling)
    with run.clock("reward"):
        scores = [
            [run.score(answer, sample) for sample in group.samples]
            for answer, group in zip(batch.puzzles.answers, groups)
        ]
        return Rollout(groups, scores, torch.tensor([[s.reward for s in row] for row in scores]))


def resample(run, stream, batch, drawn) -> Rollout:
    """What to train on: groups whose rewards are all equal have no gradient, so their slots draw another puzzle, whose
    group takes the old one's place if its own rewards differ; rollout.resample times at most.

    Each rank sees to its own slots, some oftener than others: no collective is in the stream or the sampler.
    """
    out = Rollout([*drawn.groups], [*drawn.scores], drawn.rewards.clone())
    for attempt in range(1, run.config.rollout.resample + 1):
        flat = (out.rewards.amax(1) == out.rewards.amin(1)).nonzero()[:, 0].tolist()
        if not flat:
            break
        with run.clock("stream"):
            other = stream.again(batch, flat)
        again = roll_out(run, other, attempt)
        for place, group, scores, rewards in zip(flat, again.groups, again.scores, again.rewards):
            if rewards.max() > rewards.min():
                out.groups[place], out.scores[place], out.rewards[place] = group, scores, rewards
                out.resampled += 1
    return out


def main():
    parser = argparse.ArgumentParser(
        prog="python -m sslr1.train", description="Train a multimodal language model on puzzles by GRPO."
    )
    parser.add_argument("config", help="a YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--plan",
        type=int,
        metavar="GPUS",
        help="print memory and communication of each of so many GPUs, and start nothing",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.plan is not None:
        return entry.plan(arguments.config, arguments.overrides, arguments.plan)
    with entry.built(arguments.config, arguments.overrides, run=True) as built:
        from sslr1.run import Run  # behind the configuration's check: what it imports takes seconds

        with Run(built) as run:
            train(built, run)


if __name__ == "__main__":
    main()
