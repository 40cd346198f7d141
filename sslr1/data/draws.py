"""Which image a slot of the stream shows: the one at its place, or by the weights of the sources."""

from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate

from sslr1.ops import keys
from sslr1.sums import plain_sum


class Draws:
    """numbers: images to train on, in order. sources: [(numbers of its images, a range; weight)], () where none has a
    weight.

    An epoch has a place for each image. Without weights place v is image v. With them each source has its share of the
    places, w of a sum W of weights (largest remainders), and goes through its own images in the order of a keyed
    permutation of its own, pass after pass, across epochs: none is met twice before all of its source were met.
    """

    def __init__(self, numbers, seed, sources=()):
        self.numbers, self.seed = numbers, seed
        self._firsts = [bisect_left(numbers, of.start) for of, _ in sources]  # of each source, among `numbers`
        ends = [bisect_left(numbers, of.stop) for of, _ in sources]
        self._counts = [end - first for first, end in zip(self._firsts, ends)]
        shares = dealt(len(numbers), [w if n else 0.0 for (_, w), n in zip(sources, self._counts)]) if sources else []
        self._ends = list(accumulate(shares))
        self._order = lru_cache(2 * len(sources))(
            lambda at, turn: keys.generator("source", seed, at, turn).permutation(self._counts[at])
        )

    def __len__(self):
        return len(self.numbers)

    def at(self, epoch, place) -> tuple[int, int]:
        """(how often all of its source's images had their turn before, image) of a place in an epoch."""
        if not self._ends:
            return epoch, self.numbers[place]
        source = bisect_right(self._ends, place)
        first = self._ends[source - 1] if source else 0
        drawn = epoch * (self._ends[source] - first) + int(place) - first  # from this source, before
        turn, place = divmod(drawn, self._counts[source])
        return turn, self.numbers[self._firsts[source] + int(self._order(source, turn)[place])]


def dealt(places, weights) -> list:
    """Places for each of some weights, as exactly as whole numbers allow; at least one for each above 0."""
    exact = [places * weight / plain_sum(weights) for weight in weights]
    found = [max(int(share), 1 if share else 0) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda at: (found[at] - exact[at], at))
    for turn in range(abs(places - sum(found))):
        at = by_rest[turn % len(exact)] if sum(found) < places else max(range(len(found)), key=found.__getitem__)
        found[at] += 1 if sum(found) < places else -1
    return found
