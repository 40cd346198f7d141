"""Blind solvers: shortcuts by which a puzzle could be solved without seeing what is in the picture.

A puzzle that such a solver answers is worthless as a reward. Each probe is scored beside chance; where a bound is
stated, the one-sided 95 % upper limit of its score must be at most chance + 5 points. It is broken where the lower
limit is above it, and undecided in between: too few puzzles, or images. A solver gets a Case: what a model would see,
plus where marks stand; never the answer, the plan or the source image.
"""

import itertools
import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from sslr1 import ops, puzzles
from sslr1.evaluate.textures import Textures
from sslr1.ops.render import FILL
from sslr1.puzzles.picture import Pictures
from sslr1.puzzles.series import decidable
from sslr1.sums import plain_sum

SLACK = 0.05


@dataclass
class Case:
    """canvases: float32 [H, W, 3] arrays; choices: the valid single answers, or () for a sequence; grid: (rows,
    columns) of an ordering puzzle; rings: places (y, x as shares of the canvas) of the rings on each canvas; rng: a
    NumPy generator."""

    canvases: list
    choices: tuple
    grid: tuple
    rings: list
    rng: np.random.Generator


@dataclass(kw_only=True)
class Finding:
    """exact: the share of `n` puzzles solved, cut from `images` images; limit: its one-sided 95 % upper limit, in which
    puzzles of one image count as alike as they were found; bound: chance + 5 points, None where the probe is only
    reported; accuracy: mean share of right places."""

    puzzle: str
    level: int
    probe: str
    n: int
    images: int
    chance: float
    exact: float
    accuracy: float
    limit: float
    bound: float | None

    @property
    def holds(self) -> bool:
        return self.bound is None or self.limit <= self.bound

    @property
    def verdict(self) -> str:
        """On the bound; empty where it holds, or there is none."""
        half = self.limit - self.exact
        if self.holds:
            return ""
        if self.exact - half > self.bound:
            return "broken"
        return "undecided: too few" if half > SLACK / 2 else "undecided: at the bound"

    def enough(self) -> tuple[int, int]:
        """(puzzles, images) with which an interval is half as wide as the bound allows, so that 95 % of what solvers
        score who guess is shown to be within it. More puzzles of the same images say less, where those are guessed
        alike, so it is as many times as many of both."""
        times = ((self.limit - self.exact) / (SLACK / 2)) ** 2
        return math.ceil(self.n * times), math.ceil(self.images * times)


def cases(images, name, level, count, seed=0, first=0):
    """`count` decidable puzzles as (Case, Puzzle), each image in turn in epoch after epoch; `first` is the first
    image's number. Raises ValueError if the images give too few."""
    form, n = puzzles.Form(), len(images)
    tried = (puzzles.Address(name, level, seed, i // n, 0, first + i % n) for i in range(100 * count + 1000))
    made = decidable(lambda number: images[number - first], tried, form, Pictures(images))
    turn = -1
    for turn, puzzle in enumerate(islice(made, count)):
        shown = [canvas.cpu().numpy().astype(np.float32) for canvas in puzzle.render()]
        grid = (len(puzzle.sheet), len(puzzle.sheet[0])) if name == "ordering" else ()
        rng = ops.generator("probe", seed, name, level, turn)
        yield Case(shown, puzzle.answer.choices, grid, puzzle.points, rng), puzzle
    if turn + 1 < count:
        raise ValueError(f"the images give {turn + 1} of {count} {name} puzzles of level {level}")


def detail(grey):
    """Absolute Laplacian of a grey picture, without its rim."""
    inner = grey[1:-1, 1:-1]
    return np.abs(4 * inner - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:])


def sharpness(canvas):
    return float(detail(canvas.mean(2)).mean())


def small(canvas, n=8):
    return F.adaptive_avg_pool2d(torch.from_numpy(canvas).permute(2, 0, 1), n).permute(1, 2, 0).numpy()


# --- solvers: Case -> a choice (or a permutation) ---------------------------------------------------------------------


def constant(case):
    return case.choices[0] if case.choices else tuple(range(1, len(case.canvases) + 1))


def at_random(case):
    if case.choices:
        return case.choices[int(case.rng.integers(0, len(case.choices)))]
    return tuple(int(v) + 1 for v in case.rng.permutation(len(case.canvases)))


def by(score, best=np.argmin):
    """The solver that takes the candidate with the least of the scores of all, or with the greatest by np.argmax."""
    return lambda case: case.choices[int(best(score(case)))]


def histogram(case):
    """How differently a candidate's colours are distributed from the reference's: 16 bins a channel, L1."""

    def bins(canvas):
        return np.stack([np.histogram(canvas[..., c], 16, (0, 256), density=True)[0] for c in range(3)])

    reference, *others = map(bins, case.canvases)
    return [np.abs(reference - other).sum() for other in others]


def _distances(case):
    looks = [small(canvas) for canvas in case.canvases[1:]]
    return np.array([[min(np.abs(a - b).mean(), np.abs(a - b[:, ::-1]).mean()) for b in looks] for a in looks])


def unlikeness(case):
    """How unlike the other candidates one is, mirrored or not."""
    return _distances(case).sum(1)


def in_a_pair(case):
    """One of the two candidates that are most alike, mirrored or not."""
    apart = _distances(case) + 1e9 * np.eye(len(case.choices))
    return case.choices[int(case.rng.permutation(np.unravel_index(np.argmin(apart), apart.shape))[0])]


def sharpnesses(case):
    return [sharpness(canvas) for canvas in case.canvases[1:]]


def middling(case):
    """Of middling sharpness: neither enlarged nor reduced."""
    order = np.argsort(sharpnesses(case))
    return case.choices[int(order[len(order) // 2 - int(case.rng.integers(0, 2))])]


def visible_copy(case):
    """The candidate that is hardest to find in what is visible of the image: normalised correlation, reduced."""
    shown = torch.from_numpy(case.canvases[0]).permute(2, 0, 1)
    hole = (shown == FILL).all(0)
    short = int(hole.sum().sqrt()) if hole.any() else 8
    n = 8
    scale = n / short
    size = [max(n + 1, round(side * scale)) for side in shown.shape[1:]]
    grey = F.interpolate(shown.mean(0)[None, None], size, mode="area")
    free = F.interpolate((~hole).float()[None, None], size, mode="area")
    patches = torch.stack([torch.from_numpy(small(c, n)).mean(2) for c in case.canvases[1:]])[:, None]
    patches = patches - patches.mean((2, 3), keepdim=True)
    patches = patches / patches.norm(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    ones = torch.ones(1, 1, n, n)
    energy = F.conv2d(grey**2, ones) - F.conv2d(grey, ones) ** 2 / n**2
    match = F.conv2d(grey, patches) / energy.clamp(min=1e-6).sqrt()
    match = match.masked_fill(F.conv2d(free, ones) < 0.7 * n * n, -1)
    return case.choices[int(match.amax((0, 2, 3)).argmin())]


def continuity(case):
    """The arrangement whose tiles continue each other best across their edges; greedy, place by place, from every
    start."""
    rows, columns = case.grid
    K = len(case.canvases)
    right = np.array([[np.abs(a[:, -1] - b[:, 0]).mean() for b in case.canvases] for a in case.canvases])
    below = np.array([[np.abs(a[-1] - b[0]).mean() for b in case.canvases] for a in case.canvases])

    def cost(place, tile, order):
        out = right[order[place - 1], tile] if place % columns else 0.0
        return out + (below[order[place - columns], tile] if place >= columns else 0.0)

    best, least = None, math.inf
    starts = itertools.permutations(range(K)) if K <= 6 else [(first,) for first in range(K)]
    for start in starts:
        order, total = [], 0.0
        for place in range(K):
            left = [start[place]] if place < len(start) else [t for t in range(K) if t not in order]
            costs = [cost(place, tile, order) for tile in left]
            total += min(costs)
            order.append(left[int(np.argmin(costs))])
        if total < least:
            best, least = order, total
    return tuple(tile + 1 for tile in best)


def from_ref(case):
    return np.linalg.norm(case.rings[1] - case.rings[0][0], axis=1)


def from_centre(case):
    return np.linalg.norm(case.rings[1] - 0.5, axis=1)


def from_others(case):
    return np.linalg.norm(case.rings[1] - case.rings[1].mean(0), axis=1)


# --- features of a rotated picture, for solvers that are fitted on one half of the puzzles and scored on the other
# -------


def shape_features(case):
    h, w = case.canvases[-1].shape[:2]
    return [h, w, h / w]


def border_features(case):
    """How near the rim and the corners are to the fill colour, and how uniform."""
    c = case.canvases[-1]
    rim = [c[0], c[-1], c[:, 0], c[:, -1]]
    n = max(2, len(c) // 10)
    corners = [c[:n, :n], c[:n, -n:], c[-n:, :n], c[-n:, -n:]]
    filled = [np.isclose(part, FILL).all(-1).mean() for part in (*rim, *corners)]
    return [max(filled), sum(filled), np.mean([part.std() for part in corners]) / (c.std() + 1e-6)]


def sharpness_features(case):
    """Fine detail, alone and relative to coarser detail; by directions taken together."""
    c = case.canvases[-1]
    fine, mid = sharpness(c), sharpness(small(c, len(c) // 2))
    return [math.log(fine + 1), math.log(mid + 1), math.log((fine + 0.1) / (mid + 0.1)), math.log(c.std() + 1)]


def phase_features(case):
    """How far fine detail varies periodically from row to row, column to column and along diagonals, as it does where
    the pixel grid of the source was met at regular intervals."""
    fine = detail(case.canvases[-1].mean(2))
    fine = np.minimum(fine, 4 * fine.mean() + 1e-6)
    n = len(fine)
    y, x = np.mgrid[0:n, 0:n]

    def diagonals(numbers):
        means = np.bincount(numbers.ravel(), fine.ravel()) / np.bincount(numbers.ravel())
        return means[n // 2 : -n // 2]

    out = []
    for line in (fine.mean(1), fine.mean(0), diagonals(y + x), diagonals(y - x + n - 1)):
        line = np.log(line + 1e-3)
        line = line - np.convolve(line, np.ones(9) / 9, "same")
        spectrum = np.abs(np.fft.rfft(line[5:-5] * np.hanning(len(line) - 10)))
        high = spectrum[len(spectrum) // 5 :]
        out += [math.log(high.max() + 1e-6), math.log(high.max() / (np.median(high) + 1e-9) + 1e-6)]
    return [*out, out[0] - out[4], out[2] - out[6], out[0] - out[2]]


@dataclass
class Fitted:
    """Least squares from features and their products to the answers, fitted on one half of the puzzles; guesses the
    other's."""

    features: object

    def guess(self, vectors, answers, choices):
        x = np.array(vectors, float)
        x = (x - x.mean(0)) / (x.std(0) + 1e-9)
        i, j = np.triu_indices(x.shape[1])
        x = np.concatenate([np.ones((len(x), 1)), x, x[:, i] * x[:, j]], 1)
        half = len(x) // 2
        y = np.array([[answer.value == choice for choice in choices] for answer in answers[:half]], float)
        weights = np.linalg.solve(x[:half].T @ x[:half] + 1e-2 * half * np.eye(x.shape[1]), x[:half].T @ y)
        return [choices[k] for k in (x[half:] @ weights).argmax(1)]


ALL = (1, 2, 3, 4)
# puzzle: {probe: (solver, levels at which its bound is stated)}
PROBES = {
    "rotation": {
        "aspect": (Fitted(shape_features), ALL),
        "border": (Fitted(border_features), ALL),
        "sharpness": (Fitted(sharpness_features), ALL),
        "grid phase": (Fitted(phase_features), ALL),
    },
    "similarity": {"colour histogram": (by(histogram), (3, 4))},
    "inpainting": {
        "medoid": (by(unlikeness), (2, 3, 4)),
        "odd one out": (by(unlikeness, np.argmax), (2, 3, 4)),
        "belongs to a pair": (in_a_pair, (2, 3, 4)),
        "untouched: sharpest": (by(sharpnesses, np.argmax), (2, 3, 4)),
        "untouched: middling": (middling, (2, 3, 4)),
        "visible copy": (visible_copy, ()),
    },
    "ordering": {"edge continuity": (continuity, ())},
    "correspondence": {
        "nearest position": (by(from_ref), ALL),
        "farthest position": (by(from_ref, np.argmax), ALL),
        "central mark": (by(from_centre), ALL),
        "peripheral mark": (by(from_others, np.argmax), ALL),
    },
}
FOR_ALL = {"constant": (constant, ALL), "random": (at_random, ALL)}


def halves(name) -> int:
    """How many times as many puzzles are drawn as are asked for: solvers that are fitted have as many to learn from."""
    return 1 + any(isinstance(solver, Fitted) for solver, _ in PROBES.get(name, {}).values())


def probe(images, name, level, count=2000, seed=0, only_bounded=False, told=lambda: None) -> list:
    """Findings of every probe of a puzzle at one level on `count` puzzles (a fitted one has as many others to learn
    from). told: called after each puzzle. Raises ValueError if the images give too few."""
    probes = {**FOR_ALL, **PROBES.get(name, {})}
    probes = {probe: entry for probe, entry in probes.items() if level in entry[1] or not only_bounded}
    fitted = {probe: solver for probe, (solver, _) in probes.items() if isinstance(solver, Fitted)}
    answers, chances, sources, guesses = [], [], [], {probe: [] for probe in probes}
    halves = [images[0::2], images[1::2]] if fitted else [images]  # what is learnt is scored on other images
    for half, part in enumerate(halves):
        for case, puzzle in cases(part, name, level, count, seed, first=half * len(images)):
            answers.append(puzzle.answer)
            chances.append(puzzle.chance)
            sources.append(puzzle.address.index)
            choices = case.choices
            for probe, (solver, _) in probes.items():
                guesses[probe].append(solver.features(case) if probe in fitted else solver(case))
            told()
    for probe, solver in fitted.items():
        guesses[probe] = solver.guess(guesses[probe], answers, choices)
    scored = answers[-count:], chances[-count:], sources[-count:]
    return [
        _finding(name, level, probe, found[-count:], *scored, level in probes[probe][1])
        for probe, found in guesses.items()
    ]


def _finding(name, level, probe, guesses, answers, chances, sources, bounded):
    n, chance = len(answers), plain_sum(chances) / len(chances)
    hits = np.array([guess == answer.value for guess, answer in zip(guesses, answers)], float)
    exact = accuracy = float(hits.mean())
    if answers[0].kind == "sequence":
        accuracy = plain_sum(np.mean(np.equal(guess, answer.value)) for guess, answer in zip(guesses, answers)) / n
    _, image = np.unique(sources, return_inverse=True)
    groups = np.bincount(image, hits - exact)  # each image is one draw: its puzzles may be guessed alike
    limit = exact + 1.645 * float(np.linalg.norm(groups)) / n
    bound = chance + SLACK if bounded else None
    about, rates = {"puzzle": name, "level": level, "probe": probe}, {"exact": exact, "accuracy": float(accuracy)}
    return Finding(**about, n=n, images=len(groups), chance=chance, **rates, limit=limit, bound=bound)


def pictures(folder=None) -> list:
    """Images to probe with: up to 400 of a folder's, or 200 procedural scenes; uint8 [H, W, 3]."""
    if folder is None:
        from sslr1.data.scenes import scene

        return [torch.from_numpy(scene(i, 320)) for i in range(200)]
    from sslr1.data import ImageStore

    store = ImageStore.scan(folder, threads=torch.get_num_threads())
    numbers = ops.generator("probes").permutation(len(store.folder))[:400].tolist()
    return [image for image in store.get(numbers) if image is not None]


def shown(name, images, count):
    """What a puzzle is probed on: rotation on `texture`s, for in a photograph what is up may be seen, which is no
    shortcut."""
    return Textures(range(2 * count)) if name == "rotation" else images
