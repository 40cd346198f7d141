"""Puzzle q of an endless series over some images: what an export writes, and what a data set for another trainer holds.

Puzzle q is cut out of place q mod n of epoch q div n's keyed permutation of the n images, and its kind is the (q mod
k)-th of k. An image that is missing, or that can't decide its puzzle, is replaced by another, by key; the others don't
move.
"""

from functools import lru_cache

import torch

from sslr1.errors import UserError
from sslr1.ops import keys
from sslr1.puzzles.batch import LEVELS, NAMES, START_LEVEL, make, puzzle_at
from sslr1.puzzles.picture import Picture
from sslr1.puzzles.puzzle import Address

SUBSTITUTES = 1000  # images tried for one puzzle before they are taken to be unusable


def kinds(puzzle=NAMES, level=None) -> list:
    """[(puzzle, level)] of every puzzle (a name or several) at every level (a number, several, or None for where its
    training starts). Raises UserError for one that doesn't exist."""
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


def check(kinds, spec, composed=False) -> dict:
    """{(puzzle, level): PuzzleBatch}: 16 of each of [(puzzle, level)] made of noise, enough to meet every layout.
    Raises UserError where a spec's bounds on area leave one of them no canvas, or composed no sheet."""
    noise = torch.randint(0, 256, (16, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, level in kinds:
        try:
            found[name, level] = make(noise, name, level=level, spec=spec, composed=composed)
        except ValueError as error:
            raise UserError(f"{name}, level {level}: {error}") from None
    return found


def decidable(get, addresses, form, pool):
    """The decidable puzzles among some addresses, in their order. get: image number -> uint8 [H, W, 3] or `Picture`, or
    None for a bad one, which is passed over; form, pool: as for `puzzle_at`."""
    for address in addresses:
        image = get(address.index)
        if image is not None:
            puzzle = puzzle_at(address, image if isinstance(image, Picture) else Picture(image), form, pool)
            if puzzle.decidable:
                yield puzzle


class Series:
    """series[q] is puzzle q, a `Puzzle`.

    get: image number -> uint8 [H, W, 3], or None for a bad one; numbers: of the images; kinds: [(puzzle, level)]; form,
    pool: as for `puzzle_at`."""

    def __init__(self, get, numbers, kinds, *, form, pool, seed=0):
        self.get, self.numbers, self.kinds, self.form, self.pool, self.seed = (
            get,
            list(numbers),
            kinds,
            form,
            pool,
            seed,
        )
        n = len(self.numbers)
        self._permutation = lru_cache(2)(lambda epoch: keys.generator("series", seed, epoch).permutation(n))

    def addresses(self, q: int):
        """Those tried for puzzle q, in turn."""
        name, level = self.kinds[q % len(self.kinds)]
        epoch, place = divmod(q, len(self.numbers))
        place = int(self._permutation(epoch)[place])
        for tried in range(SUBSTITUTES + 1):
            attempt = tried and q * SUBSTITUTES + tried  # no two puzzles' substitutes have one address
            if attempt:
                place = keys.fold("series", self.seed, attempt) % len(self.numbers)
            yield Address(name, level, self.seed, epoch, attempt, self.numbers[place])

    def __getitem__(self, q: int):
        """Raises UserError if no image can decide the puzzle after a fair number of tries."""
        puzzle = next(decidable(self.get, self.addresses(q), self.form, self.pool), None)
        if puzzle is None:
            name, level = self.kinds[q % len(self.kinds)]
            raise UserError(f"no image can decide a {name} puzzle of level {level} after {SUBSTITUTES} tries")
        return puzzle
