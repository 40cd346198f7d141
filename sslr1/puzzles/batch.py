"""`make`: images in, a batch of puzzles out. To add a puzzle: one file with `build`, a line here, its wording in prompts.py."""

from dataclasses import dataclass, field

import torch

from sslr1.ops import keys
from sslr1.ops.render import PatchSpec, render, render_patches
from sslr1.puzzles import ordering, prompts, rotation, similarity
from sslr1.puzzles.plan import Plan

_PUZZLES = {"rotation": rotation, "similarity": similarity, "ordering": ordering}
NAMES = tuple(_PUZZLES)
LEVELS = {name: tuple(module.LEVELS) for name, module in _PUZZLES.items()}
START_LEVEL = {name: module.START_LEVEL for name, module in _PUZZLES.items()}
MIXTURE = {name: module.SHARE for name, module in _PUZZLES.items()}  # default shares; need not add up to 1


@dataclass
class PuzzleBatch:
    """B puzzles. `questions` hold `<image>` where each canvas goes; `answers` are `reward.Answer`; `decidable` is False
    where the puzzle's own test says that this image can't decide it; `chance` is a random valid answer's probability."""

    names: list
    levels: list
    questions: list
    answers: list
    chance: list
    decidable: list
    thinking: bool
    spec: PatchSpec
    plan: Plan = field(repr=False)
    images: list = field(repr=False)
    canvas_counts: list = field(repr=False)

    def __len__(self):
        return len(self.questions)

    def render(self, backend="auto"):
        """B lists of uint8 [H, W, 3] canvases on the images' device."""
        canvases = iter(render(self.images, self.plan, backend))
        return [[next(canvases) for _ in range(n)] for n in self.canvas_counts]

    def render_patches(self, spec=None, backend="auto"):
        """(pixel_values, image_grid_thw) of all canvases in order; ValueError for a spec of another patch*merge."""
        spec = spec or self.spec
        if spec.unit != self.spec.unit:
            raise ValueError(
                f"these puzzles were made for patch*merge = {self.spec.unit}, the spec has {spec.unit}: pass it to make()"
            )
        return render_patches(self.images, self.plan, spec, backend)


def _per_item(value, B, what):
    values = list(value) if isinstance(value, (list, tuple)) else [value] * B
    if len(values) != B:
        raise ValueError(f"{what} has {len(values)} entries for {B} images")
    return values


def make(
    images,
    puzzle="ordering",
    *,
    seed=0,
    index=None,
    epoch=0,
    attempt=0,
    level=None,
    thinking=True,
    pool=None,
    spec=None,
    composed=False,
    preset="default",
    wordings=None,
):
    """Cut a puzzle out of each image.

    images: uint8 [B, H, W, 3] on any device, or a list of uint8 [H, W, 3]. puzzle: a name or B names. index: B integers
    that name the images (default 0…B-1). level: a number or B of them (None: where training starts). pool: other images
    by position (len, [i]) that candidates come from, drawn by key; None means this call's own images, so those puzzles
    then depend on the call. wordings: use only the first so many wordings of each question.

    The same (seed, epoch, attempt, index, puzzle, level, spec, pool) gives the same puzzle, always. Raises ValueError for
    unknown names and levels, for options this version doesn't have, and where the pool has too few different images.
    """
    images = list(images)
    B = len(images)
    for i, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images[{i}] must be a uint8 tensor [H, W, 3]")
    if composed:
        raise ValueError("composed rendering is not in this version: canvases are separate images")
    if preset != "default":
        raise ValueError(f"preset {preset!r} is not in this version; it has 'default'")
    spec = spec or PatchSpec()
    index = range(B) if index is None else [int(i) for i in index]
    if len(index) != B:
        raise ValueError(f"index has {len(index)} entries for {B} images")
    names, levels, epochs, attempts = (
        _per_item(v, B, w) for v, w in ((puzzle, "puzzle"), (level, "level"), (epoch, "epoch"), (attempt, "attempt"))
    )
    batch = PuzzleBatch(names, levels, [], [], [], [], thinking, spec, Plan(), [], [])
    for i, (image, name) in enumerate(zip(images, names)):
        if name not in _PUZZLES:
            raise ValueError(f"puzzle {name!r} is not one of {NAMES}")
        levels[i] = START_LEVEL[name] if levels[i] is None else levels[i]
        if levels[i] not in LEVELS[name]:
            raise ValueError(f"{name} has no level {levels[i]}; it has {LEVELS[name]}")
        draw = keys.generator("puzzle", seed, epochs[i], attempts[i], index[i], name, levels[i])
        source = images if pool is None else pool
        made = _PUZZLES[name].build(draw, image, levels[i], spec, source)
        batch.plan.extend(made.plan, len(batch.images))
        batch.images += [image, *(source[j] for j in made.others)]
        batch.canvas_counts.append(len(made.plan.sizes))
        asked, answer = prompts.question(
            name, levels[i], made.readings, len(made.plan.sizes), lambda n: int(draw.integers(0, n)), thinking, wordings
        )
        batch.questions.append(asked)
        batch.answers.append(answer)
        batch.chance.append(made.chance)
        batch.decidable.append(made.decidable)
    return batch
