"""Puzzle q of an endless series over some images: what an export writes, and what a data set for another trainer holds.

Puzzle q is cut out of place q mod n of epoch q div n's keyed permutation of the n images, and its kind is the (q mod k)-th of k. An
image that is missing, or that can't decide its puzzle, is replaced by another, by key; the others don't move.
"""

from dataclasses import astuple, dataclass
from functools import lru_cache

import torch

from sslr1.errors import UserError
from sslr1.ops import keys
from sslr1.puzzles.batch import LEVELS, NAMES, START_LEVEL, make

SUBSTITUTES = 1000  # images tried for one puzzle before they are taken to be unusable


@dataclass(frozen=True)
class Address:
    """What names a puzzle: `make([image], puzzle, level=…, seed=…, epoch=…, attempt=…, index=[index])` makes it again from the same
    image, pool and options."""

    puzzle: str
    level: int
    seed: int
    epoch: int
    attempt: int
    index: int

    def __str__(self):
        return "{}-{}/{}/{}/{}/{}".format(*astuple(self))


@dataclass(frozen=True)
class Drawn:
    """A puzzle, ready to be put to anybody: `<image>` stands in the question where each canvas goes, uint8 [H, W, 3]."""

    number: int
    address: Address
    question: str
    canvases: list
    answer: object
    thinking: bool
    chance: float


def kinds(puzzle=NAMES, level=None) -> list:
    """[(puzzle, level)] of every puzzle (a name or several) at every level (a number, several, or None for where its training
    starts). Raises UserError for one that doesn't exist."""
    names = [puzzle] if isinstance(puzzle, str) else list(puzzle)
    found = []
    for name in names:
        if name not in NAMES:
            raise UserError(f"puzzle {name!r} is not one of {', '.join(NAMES)}")
        for at in level if isinstance(level, (list, tuple)) else [level]:
            at = START_LEVEL[name] if at is None else at
            if at not in LEVELS[name]:
                raise UserError(f"{name} has no level {at}; it has {', '.join(map(str, LEVELS[name]))}")
            found.append((name, at))
    return found


def check(kinds, spec, composed=False) -> None:
    """Raises UserError where a spec's bounds on area leave one of [(puzzle, level)] no canvas, or composed no sheet: 16 of each are made
    of noise, enough to meet every layout."""
    noise = torch.randint(0, 256, (16, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, level in kinds:
        try:
            make(noise, name, level=level, spec=spec, composed=composed)
        except ValueError as error:
            raise UserError(f"{name}, level {level}: {error}") from None


class Series:
    """series[q] is the Drawn puzzle q.

    get: image number -> uint8 [H, W, 3], or None for a bad one; numbers: of the images; kinds: [(puzzle, level)]; pool and
    options: as for `make`."""

    def __init__(self, get, numbers, kinds, *, seed=0, pool, **options):
        self.get, self.numbers, self.kinds, self.seed = get, list(numbers), kinds, seed
        self.options = {"pool": pool, **options}
        self._permutation = lru_cache(2)(
            lambda epoch: keys.generator("series", seed, epoch).permutation(len(self.numbers))
        )

    def __getitem__(self, q: int) -> Drawn:
        """Raises UserError if no image can decide the puzzle after a fair number of tries."""
        name, level = self.kinds[q % len(self.kinds)]
        epoch, place = divmod(q, len(self.numbers))
        place = int(self._permutation(epoch)[place])
        for tried in range(SUBSTITUTES + 1):
            attempt = tried and q * SUBSTITUTES + tried  # no two puzzles' substitutes have one address
            if attempt:
                place = keys.fold("series", self.seed, attempt) % len(self.numbers)
            address = Address(name, level, self.seed, epoch, attempt, self.numbers[place])
            image = self.get(address.index)
            if image is None:
                continue
            made = make(
                [image],
                name,
                level=level,
                seed=self.seed,
                epoch=epoch,
                attempt=attempt,
                index=[address.index],
                **self.options,
            )
            if made.decidable[0]:
                (canvases,) = made.render()
                return Drawn(q, address, made.questions[0], canvases, made.answers[0], made.thinking, made.chance[0])
        raise UserError(f"no image can decide a {name} puzzle of level {level} after {SUBSTITUTES} tries")
