"""`make`: images in, a batch of puzzles out. To add a puzzle: one file beside this one, its name in NAMES
(docs/adding-a-puzzle.md)."""

import math
from importlib import import_module

import torch

from sslr1.ops import keys
from sslr1.ops.render import PatchSpec
from sslr1.puzzles import NAMES, prompts, sheet
from sslr1.puzzles.picture import Picture, Pictures
from sslr1.puzzles.plan import Extent, largest_canvas
from sslr1.puzzles.puzzle import Address, Form, Puzzle, PuzzleBatch

# The version of what an address gives. A run keeps to the one it was started under: count on where a change moves
# puzzles (tests/puzzles/recorded.py), or what is decidable.
RULES = 3
_PUZZLES = {name: import_module(f"sslr1.puzzles.{name}") for name in NAMES}
QUESTIONS = {name: module.QUESTIONS for name, module in _PUZZLES.items()}
LEVELS = {name: tuple(module.LEVELS) for name, module in _PUZZLES.items()}
START_LEVEL = {name: module.START_LEVEL for name, module in _PUZZLES.items()}
MIXTURE = {name: module.SHARE for name, module in _PUZZLES.items()}  # default shares; need not add up to 1

# The paper (arXiv 2604.20705) names its five puzzles and an equal number of questions of each, but no grid, candidate
# count or augmentation: the levels of this preset are an ASSUMPTION.
PAPER_MIXTURE = dict.fromkeys(("rotation", "similarity", "inpainting", "ordering", "correspondence"), 0.2)
PAPER_LEVEL = {**START_LEVEL, "ordering": 3}
PRESETS = {"default": START_LEVEL, "paper": PAPER_LEVEL}


def _per_item(value, B, what):
    """B values: those of a list, or one B times."""
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

    images: uint8 [B, H, W, 3] on any device, or a list of uint8 [H, W, 3] or of `Picture`s, which remember what was
    measured of them. puzzle: a name or B names. index: B integers that name the images (default 0…B-1). epoch, attempt,
    level: a number or B of them; level None: where training starts under the preset. pool: other images or Pictures by
    position (len, [i]) that similarity's candidates, and inpainting's at level 1, come from, drawn by key; None means
    this call's own images, so those puzzles then depend on the call. composed: all pictures of a puzzle on one canvas,
    with marks. preset: "default", or "paper", an assumption about the unpublished settings of arXiv 2604.20705.
    wordings: use only the first so many wordings of each question.

    The same (seed, epoch, attempt, index, puzzle, level, spec's geometry, pool) gives the same puzzle, always. Raises
    ValueError for unknown names, levels and presets, and where the spec leaves no canvas; PoolError, which is one,
    where the pool has too few different images.
    """
    images = list(images)
    B = len(images)
    for i, image in enumerate(images):
        image = image.pixels if isinstance(image, Picture) else image
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images[{i}] must be a uint8 tensor [H, W, 3]")
        if not image.numel():
            raise ValueError(f"images[{i}] has no pixels: {list(image.shape)}")
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {tuple(PRESETS)}")
    given = {"puzzle": puzzle, "level": level, "epoch": epoch, "attempt": attempt}
    given["index"] = list(range(B)) if index is None else [int(i) for i in index]
    names, levels, epochs, attempts, index = (_per_item(value, B, what) for what, value in given.items())
    form = Form(spec=spec or PatchSpec(), thinking=thinking, wordings=wordings, composed=composed)
    pictures = Pictures(images)
    others = pictures if pool is None else Pictures(pool)
    puzzles = []
    for i, name in enumerate(names):
        if name not in _PUZZLES:
            raise ValueError(f"puzzle {name!r} is not one of {NAMES}")
        at = PRESETS[preset][name] if levels[i] is None else levels[i]
        if at not in LEVELS[name]:
            raise ValueError(f"{name} has no level {at}; it has {LEVELS[name]}")
        address = Address(name, at, seed, epochs[i], attempts[i], index[i])
        puzzles.append(puzzle_at(address, pictures[i], form, others))
    return PuzzleBatch(puzzles, form)


def puzzle_at(address, picture, form, pool) -> Puzzle:
    """The puzzle of an address: of that image as a `Picture`, in a Form, beside a pool of images or Pictures. Errors as
    `make`'s of the spec and the pool."""
    pool = pool if isinstance(pool, Pictures) else Pictures(pool)
    module, level, spec = _PUZZLES[address.puzzle], address.level, form.spec
    geometry = (spec.patch, spec.merge, spec.min_pixels, spec.max_pixels)
    named = (*geometry, len(pool)) if level in module.POOLED else geometry
    at = (address.seed, address.epoch, address.attempt, address.index)
    rng = keys.generator("puzzle", *at, address.puzzle, level, *named)
    picture = picture.piece(rng)
    puzzle = _built(module, rng, picture, level, spec, pool, form.composed)
    puzzle.address, puzzle.form, puzzle.picture = address, form, picture
    puzzle.question, puzzle.answer = prompts.question(
        QUESTIONS[address.puzzle][level],
        puzzle.readings,
        puzzle.marks,
        lambda n: int(rng.integers(0, n)),
        form.thinking,
        form.wordings,
        sheet=len(puzzle.plan.sizes) < len(puzzle.marks),
    )
    return puzzle


def _built(module, rng, image, level, spec, pool, composed):
    """The puzzle as its file draws it; composed onto one canvas where it has several."""
    if not composed:
        return module.build(rng, image, level, spec, pool)
    for cells in sheet.cells(spec):
        made = module.build(rng, image, level, cells, pool)
        if len(made.marks) == 1:  # nothing to compose
            return module.build(rng, image, level, spec, pool)
        try:
            made.plan = sheet.compose(made.plan, made.marks, made.sheet, spec)
            return made
        except ValueError as error:
            problem = error  # a mark and a gap more than a small picture leaves room for: smaller ones
    raise problem


def most_pixels(name, level, spec, side=None, composed=False, canvases=1) -> int:
    """px of all canvases of a puzzle together at most, of images whose sides are `side` px at most (None: any). Of a
    puzzle whose file has no `extents` the largest legal canvas, `canvases` times."""
    side = side or 1 << 20
    find = getattr(_PUZZLES[name], "extents", None)

    def rows(spec):
        whole = math.isqrt(largest_canvas(side * side, spec))
        return find(level, spec, side) if find else [[Extent.square(whole)] * canvases]

    alone = rows(spec)
    if composed and sum(map(len, alone)) > 1:
        return sheet.largest(rows(next(sheet.cells(spec))), spec)
    return sum(extent.area for row in alone for extent in row)


def describe(name, level) -> str:
    """What a puzzle is like at a level, in a few words."""
    return _PUZZLES[name].LEVELS[level]
