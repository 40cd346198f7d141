"""Digests of the puzzles at 2,000 addresses, the same under every Python, NumPy, PyTorch and BLAS.

`python -m tests.puzzles.recorded` writes recorded.json beside this file anew: for a change that is meant to change
puzzles, no other. Images are drawn by integers alone, so that nothing but `make` stands between an address and its
digest. Plans count as they are rendered, in float32: the last bits of exp and sin in float64 are the machine's.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from sslr1 import ops, puzzles
from sslr1.ops import keys

RECORD = Path(__file__).with_name("recorded.json")
COUNT = 2000
PARTS = ("plan", "patches", "answer")
LENGTH = 8  # characters of a part's digest
SHAPES = ((240, 240), (224, 317), (301, 230), (128, 128), (120, 500), (260, 190))
SPECS = (
    ops.PatchSpec(max_pixels=112 * 112),
    ops.PatchSpec(max_pixels=224 * 224),
    ops.PatchSpec(patch=16, min_pixels=64 * 64, max_pixels=160 * 160),
    ops.PatchSpec(min_pixels=16 * 784, max_pixels=16 * 784),
)
SHEET = ops.PatchSpec(max_pixels=448 * 448)
KINDS = [(name, level) for level in (1, 2, 3, 4) for name in puzzles.NAMES[:5]]


@lru_cache
def image(number):
    """uint8 [H, W, 3]: squares of 48, 16, 6 and 1 px, each of a random colour, added up."""
    height, width = SHAPES[number % len(SHAPES)]
    rng = keys.generator("recorded", "image", number)
    total = np.zeros((height, width, 3), np.int64)
    for side, most in ((48, 120), (16, 70), (6, 50), (1, 16)):
        cells = rng.integers(0, most, (height // side + 1, width // side + 1, 3))
        total += cells.repeat(side, 0).repeat(side, 1)[:height, :width]
    return torch.from_numpy(total.astype(np.uint8))


@lru_cache
def pictures():
    """Measured once, as in training."""
    return [puzzles.Picture(image(number)) for number in range(4 * len(SHAPES))]


def made(number):
    """The puzzle at the `number`-th address: every puzzle at every level in turn, the rest by key."""
    rng = keys.generator("recorded", number)
    name, level = KINDS[number % len(KINDS)]
    composed, thinking, plain = (bool(rng.integers(0, 2)) for _ in range(3))
    seed, epoch, attempt, index = (int(rng.integers(0, most)) for most in (1000, 50, 3, 10**6))
    return puzzles.make(
        [pictures()[int(rng.integers(0, len(pictures())))]],
        name,
        level=level,
        seed=seed,
        epoch=epoch,
        attempt=attempt,
        index=[index],
        thinking=thinking,
        pool=pictures(),
        spec=SHEET if composed else SPECS[int(rng.integers(0, len(SPECS)))],
        composed=composed,
        wordings=1 if plain else None,
    )


def digests(number):
    """One for each of PARTS: the tables that are rendered, the pixel values, and all that is said and decided."""
    puzzle = made(number)
    plan = puzzle.plan
    tables = plan.sources_int, plan.sources_float, plan.canvases, plan.tiles_int, plan.tiles_float
    (answer,), (chance,) = puzzle.answers, puzzle.chance
    words = puzzle.questions, answer.kind, answer.value, answer.choices, chance.hex(), puzzle.decidable
    words += [puzzle[0].marks], [puzzle[0].sheet]
    return [_digest(*tables), _digest(*puzzle.render_patches()), _digest(repr(words))]


def _digest(*parts):
    """Of strings and tensors; 0.0 and -0.0 are the same."""
    found = hashlib.blake2b(digest_size=LENGTH // 2)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else (part + 0).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    RECORD.write_text(json.dumps(["".join(digests(number)) for number in range(COUNT)], indent=0) + "\n")
