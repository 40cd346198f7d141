"""GRPO on puzzles cut out of plain images.

torchrun --nproc_per_node=N -m sslr1.train CONFIG [section.key=value …]
python -m sslr1.train CONFIG [section.key=value …]
python -m sslr1.train [CONFIG] --plan N [--size NAME] [--card NAME] [section.key=value …]
"""

from contextlib import closing
from dataclasses import dataclass, replace

import torch

from sslr1.__main__ import parsed
from sslr1.setup import entry


def train(session, run):
    """The loop: stream, rollout with rewards, learner, sampler weights, curriculum, log, evaluation, checkpoint."""
    c = session.config
    start = run.begin()
    with closing(session.stream(levels=run.curriculum.level)) as stream:
        for step in range(start, c.train.steps):
            if run.stopping():
                break
            with run.clock("stream"):
                batch = stream.get(step)
            drawn = roll_out(session, batch, run.clock)
            trained = resample(session, stream, batch, drawn, run.clock)
            run.check_judges()
            session.make_room()
            with run.clock("learner"):
                learned = run.learner.step(learnable(trained.groups, c.rollout.truncated), trained.rewards)
            with run.clock("weights"):
                session.weights.refresh(session.policy)
            totals = run.count(batch, drawn, trained)
            events = run.curriculum.update(step, totals.levels)
            run.record(step + 1, batch, drawn, totals, events, learned)
            evaluates = run.step % c.eval.every == 0 or run.step == c.train.steps
            if evaluates:
                run.evaluate()
            run.log(report=evaluates)
            if run.step % c.checkpoint.every == 0 or run.step == run.best_step:
                run.checkpoint()
    run.end()


@dataclass(kw_only=True)
class Rollout:
    """A group of G completions for each of P puzzles, and what they earned."""

    groups: list
    scores: list  # P lists of G Scores
    rewards: torch.Tensor  # float32 [P, G]
    resampled: int = 0  # groups that are of another puzzle than their slot's first


def roll_out(session, batch, clock, attempt=0) -> Rollout:
    """Draw each prompt's group and score it. attempt: which rollout of these slots this is within their step."""
    c = session.config
    with clock("rollout"):
        groups = session.engine.generate(
            batch.prompts,
            group_size=c.rollout.group_size,
            seed=c.train.seed,
            step=batch.step,
            attempt=attempt,
            temperature=c.rollout.temperature,
            top_p=c.rollout.top_p,
            top_k=c.rollout.top_k,
        )
    with clock("reward"):
        scores = [
            [score(session, answer, sample) for sample in group.samples]
            for answer, group in zip(batch.puzzles.answers, groups)
        ]
    return Rollout(groups=groups, scores=scores, rewards=torch.tensor([[s.reward for s in row] for row in scores]))


def score(session, answer, sample):
    """A completion's Score. One that was cut off is scored as empty, so that stopping pays, unless rollout.truncated
    says otherwise."""
    cut_off = sample.finish == "length" and session.config.rollout.truncated == "zero"
    return session.score(answer, "" if cut_off else sample.text)


def resample(session, stream, batch, drawn, clock) -> Rollout:
    """What to train on: groups whose rewards are all equal have no gradient, so their slots draw another puzzle, whose
    group takes the old one's place if its own rewards differ; rollout.resample times at most.

    Each rank sees to its own slots, some oftener than others: no collective is in the stream or the sampler.
    """
    out = Rollout(groups=[*drawn.groups], scores=[*drawn.scores], rewards=drawn.rewards.clone())
    for attempt in range(1, session.config.rollout.resample + 1):
        flat = (out.rewards.amax(1) == out.rewards.amin(1)).nonzero()[:, 0].tolist()
        if not flat:
            break
        with clock("stream"):
            other = stream.again(batch, flat)
        again = roll_out(session, other, clock, attempt)
        for place, group, scores, rewards in zip(flat, again.groups, again.scores, again.rewards):
            if rewards.max() > rewards.min():
                out.groups[place], out.scores[place], out.rewards[place] = group, scores, rewards
                out.resampled += 1
    return out


def learnable(groups, truncated) -> list:
    """The groups as the loss sees them: under rollout.truncated=mask, completions that were cut off have no tokens
    there. Their rewards still count in their groups' means."""
    if truncated != "mask":
        return groups
    empty = {"tokens": torch.zeros(0, dtype=torch.int64), "logprobs": torch.zeros(0)}
    return [
        replace(group, samples=[replace(s, **empty) if s.finish == "length" else s for s in group.samples])
        for group in groups
    ]


def main():
    arguments = parsed("train")
    if arguments.plan is not None:
        return entry.plan(arguments.config, arguments.overrides, arguments.plan, arguments.size, arguments.card)
    allowed = arguments.allow_functions
    with entry.session(arguments.config, arguments.overrides, run=True, allow_functions=allowed) as session:
        from sslr1.run import Run  # after the configuration's check: what it imports takes seconds

        with Run(session) as run:
            train(session, run)


if __name__ == "__main__":
    main()
