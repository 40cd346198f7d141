"""What a configuration comes to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from sslr1 import config, distributed, model, ops, puzzles
from sslr1.config import Config
from sslr1.data import ImageStore, PuzzleStream
from sslr1.data.tasks import LEVEL
from sslr1.errors import UserError
from sslr1.model import lora, shared_prefix
from sslr1.puzzles.reward import Score
from sslr1.rollout import Engine, SamplerWeights
from sslr1.setup import budget


@dataclass(frozen=True, kw_only=True)
class Images:
    """A store and its image numbers, to train on and held out."""

    store: ImageStore
    train: Sequence
    held_out: Sequence


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that a configuration names, built: what a training loop, an evaluation or a warm-up works with."""

    config: Config
    world: distributed.World
    folder: Path | None
    model_path: Path
    tokenizer: object
    spec: ops.PatchSpec
    images: Images | None
    evaluation: Images | None
    policy: object
    weights: SamplerWeights
    engine: Engine
    longest: int = 0  # tokens of a prompt at most, where a Learner will be given what is rolled out
    opening: str = ""  # what the chat template has written of every completion
    tasks: dict = field(default_factory=dict)  # {name: Task}

    def score(self, answer, text) -> Score:
        """Of a completion by the configuration's rule; its text is what the model wrote after the chat template's
        opening."""
        c = self.config.puzzles
        return puzzles.score(answer, self.opening + text, c.rule, c.thinking)

    def check_judges(self) -> None:
        """Raises UserError, on all ranks, where a task's function has failed on one. All ranks must call it."""
        judges = [task.judge for task in self.tasks.values() if task.judge]
        if judges:
            failed = next((judge.failed for judge in judges if judge.failed), None)
            distributed.agree(failed and UserError(failed), self.world)

    @property
    def keep_seen(self):
        """For a `Learner`: by the sampler's model, which is whole on each rank."""
        if shared_prefix.trains_tower(self.policy.model):
            return None
        return partial(shared_prefix.keep_seen, self.weights.model)

    @property
    def levels(self) -> dict:
        """{name: level} of every puzzle of the mixture and every task: of what is asked held out."""
        c = self.config.puzzles
        return {name: c.levels[name] for name in c.mixture} | dict.fromkeys(self.tasks, LEVEL)

    def summary(self) -> str:
        """One line for the start of a run: what was found, and what was chosen where there was a choice."""
        images, world = self.images, self.world
        return (
            f"{len(images.train)} images to train on, {len(self.evaluation.held_out)} held out, decoded by "
            f"{images.store.decoder.backend}, rendered by {ops.choose_backend('auto', world.device)}; "
            f"{world.size} {world.device.type} rank(s), {torch.get_num_threads()} thread(s) each, "
            f"{self.spec.dtype}".replace("torch.", "")
            + (f", attention by {ops.flash.library()}" if world.device.type == "cuda" else "")
            + "".join(
                f"; {name}: {len(task.train):,} questions to train on, {len(task.held_out):,} held out"
                for name, task in self.tasks.items()
            )
        )

    def not_read(self) -> list:
        """A line for each folder of images in which not all is read."""
        stores = {id(images.store): images.store for images in (self.images, self.evaluation)}.values()
        return [f"{store.folder.root}: {store.folder.about}" for store in stores if store.folder.about]

    def reference(self, path):
        """The frozen policy of loss.kl_coef from a checkpoint's hf/ folder, which holds it in the compute dtype; with
        adapters, theirs on the policy's own base. All ranks must call it. Raises UserError."""
        problem, train = None, self.config.train
        if self.world.main and not path.is_dir():
            problem = UserError(
                f"{path} is gone, which loss.kl_coef={self.config.loss.kl_coef} measures from: start a run of another "
                "log.name, or set loss.kl_coef=0 and checkpoint.allow_change=true"
            )
        distributed.agree(problem, self.world)
        if lora.lora_of(self.policy.model):
            return lora.Reference(self.policy, path)
        return model.load_reference(path, self.world, self.spec.dtype, train.replicate, train.compile)

    def make_room(self) -> None:
        """Before the learner's turn: has the engine give back what it keeps, where by the plan the GPU doesn't hold
        both."""
        budget.make_room(self.engine, lambda: self._memory, self.world.device)

    @cached_property
    def _memory(self) -> list:
        return budget.plan(self.config, self.model_path, self.world.size, longest=self.longest)[0]

    def form(self, thinking=None) -> puzzles.Form:
        """How the configuration's puzzles are put; thinking or not as given."""
        return form_of(self.config.puzzles, self.spec, thinking)

    def stream(self, batch=None, levels=None) -> PuzzleStream:
        """The training stream of this rank; `batch` puzzles a step (default rollout.prompts), at the levels that
        `levels` gives for (step, slot, puzzle) (default puzzles.levels)."""
        c = self.config
        return PuzzleStream(
            self.images.store,
            self.images.train,
            self.tokenizer,
            mixture=config.shares(c.model_dump()),
            levels=levels or (lambda step, slot, name: c.puzzles.levels[name]),
            batch=batch or c.rollout.prompts,
            seed=c.train.seed,
            form=self.form(),
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
            sources=self.images.store.folder.weighted(),
            tasks=self.tasks,
        )


def form_of(settings, spec, thinking=None) -> puzzles.Form:
    """How puzzles of the configuration's section are put; thinking or not as given."""
    thinking = settings.thinking if thinking is None else thinking
    return puzzles.Form(spec=spec, thinking=thinking, wordings=settings.wordings, composed=settings.composed)
