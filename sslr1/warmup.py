"""Warm-up: the right format around a uniformly random valid answer. It teaches the form and no skill, unless
train.warmup.answers=right, which is supervised fine-tuning. A run that may change levels is shown the neighbouring ones
too.

Meant for models that can't produce a boxed answer at all, such as the tiny one with random weights.
    torchrun … -m sslr1.warmup CONFIG OUT [section.key=value …]     writes the warmed-up model to the folder OUT
"""

from contextlib import closing

import torch

from sslr1 import puzzles
from sslr1.learner import Learner
from sslr1.model import Group, Sample
from sslr1.ops import keys
from sslr1.puzzles import random_answer_text
from sslr1.runs.progress import Progress

THOUGHT = "Let me look."


def warm_up(session, progress=None, stopping=lambda: False) -> bool:
    """`train.warmup.steps` updates towards `train.warmup.answers`; the sampler's weights follow at the end. Returns
    whether it got there: `stopping`, asked on all ranks before each step, ends it. progress: a `Progress` to show them
    on."""
    config = session.config
    options = config.train.warmup
    progress = progress or Progress(False)
    optim = config.optim.model_copy(update={"lr": options.lr, "warmup_steps": 5, "schedule": "constant"})
    plain = {"loss_type": "dapo", "entropy_coef": 0.0, "kl_coef": 0.0, "updates": 1}
    loss = config.loss.model_copy(update=plain)
    learner = Learner(
        session.policy,
        session.world,
        optim=optim,
        loss=loss,
        temperature=1.0,
        max_tokens=config.rollout.max_tokens,
        token_budget=config.train.token_budget,
        steps=options.steps,
        spec=session.spec,
        keep_seen=session.keep_seen,
    )
    progress.start("format warm-up" if options.answers == "random" else "warm-up", options.steps)
    with closing(session.stream(options.batch, _levels(config))) as stream:
        for step in range(options.steps):
            if stopping():
                progress.stop()
                return False
            batch = stream.get(step)
            groups = []
            for prompt, name, answer in zip(batch.prompts, batch.puzzles.names, batch.puzzles.answers):
                rng = keys.generator("warmup", config.train.seed, step, prompt.id)
                right = options.answers == "right" and name in (options.right_for or [name])
                content = answer.text if right else random_answer_text(answer, rng)
                text = f"\\boxed{{{content}}}"
                if config.puzzles.thinking:
                    text = f"<think>{THOUGHT}</think>{text}".removeprefix(session.opening)
                tokens = torch.tensor(
                    session.tokenizer(text, add_special_tokens=False)["input_ids"] + [session.tokenizer.eos_token_id]
                )
                groups.append(Group(prompt, [Sample(tokens, torch.zeros(len(tokens)), text, "stop")]))
            ones = torch.ones(len(groups), 1)
            # advantage 1 everywhere makes the loss's gradient that of -log-prob
            learned = learner.step(groups, ones, advantages=ones)
            progress.show(step + 1, {"entropy": learned.metrics["entropy"]})
    progress.stop()
    session.weights.refresh(session.policy)
    return True


def _levels(config):
    """(step, slot, puzzle) -> level: where an adaptive curriculum begins or next to it, by key. None: the configured
    ones."""
    c = config.puzzles
    if c.curriculum == "fixed":
        return None
    near = {name: [n for n in puzzles.LEVELS[name] if abs(n - level) <= 1] for name, level in c.levels.items()}

    def level(step, slot, name):
        return near[name][keys.fold("warmup level", config.train.seed, step, slot) % len(near[name])]

    return level


def main():
    from pathlib import Path

    from sslr1.__main__ import parsed
    from sslr1.model import lora
    from sslr1.model.folder import base_of
    from sslr1.runs import checkpoint
    from sslr1.setup import entry

    arguments = parsed("warmup")
    allowed = arguments.allow_functions
    with entry.session(arguments.config, arguments.overrides, allow_functions=allowed) as session:
        warm_up(session, Progress(session.world.main))
        out, tokenizer, network = Path(arguments.out), session.tokenizer, session.policy.model
        adapters, source = lora.gathered(network), base_of(session.model_path)
        if session.world.main:
            if adapters:
                checkpoint.save_adapter(out, adapters, lora.lora_of(network), tokenizer, source)
            else:
                checkpoint.save_hf(out, session.weights.model, tokenizer, source)
            print(arguments.out)


if __name__ == "__main__":
    main()
