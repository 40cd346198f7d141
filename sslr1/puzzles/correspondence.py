"""Correspondence: two views of one image, a point marked REF in the first, lettered points in the second; which is the
same?"""

import math

import numpy as np

from sslr1.ops.atlas import CELL
from sslr1.ops.render import IDENTITY_COLOUR
from sslr1.puzzles.colour import jitter
from sslr1.puzzles.look import LUMA
from sslr1.puzzles.picture import corners
from sslr1.puzzles.plan import Extent, Plan
from sslr1.puzzles.points import SECTORS, Marks, balanced, distinct, label_places, surroundings
from sslr1.puzzles.prompts import LETTERS
from sslr1.puzzles.puzzle import Puzzle, lettered
from sslr1.sums import plain_sum

LEVELS = {
    1: "scale 0.8 to 1.25, 4 points far apart",
    2: "scale 0.6 to 1.6, turned by up to 30 degrees, mild perspective, colours changed, 4 points",
    3: "turned by up to 90 degrees, 6 points",
    4: "turned by up to 180 degrees, strong perspective, 8 points close together",
}
QUESTIONS = dict.fromkeys(
    LEVELS,
    (
        "{image}{image}\nThe ring REF in the first view marks a point. Which lettered ring in the second view marks "
        "the same point?",
        "View 1: {image}\nView 2: {image}\nWhich of the {count} letters in view 2 is at the place that REF marks in "
        "view 1?",
        "Both images show one scene. {image}{image}\nFind the point marked REF again: which letter is it in the "
        "second image?",
        "{image}\nREF marks a spot here. In the next view, {count} spots are marked.\n{image}\nGive the letter of "
        "the same spot.",
        "First: {image} Second: {image}\nMatch the point REF of the first picture to one of the lettered points of "
        "the second.",
        "{image}{image}\nThe camera moved between the two pictures. Where did REF go? Answer with its letter.",
    ),
)
SCALE = {1: (0.8, 1.25), 2: (0.6, 1.6), 3: (0.6, 1.6), 4: (0.6, 1.6)}
TURN = {1: 0, 2: 30, 3: 90, 4: 180}  # degrees, either way
SHIFT = {1: 0.0, 2: 0.04, 3: 0.08, 4: 0.15}  # of a corner along each axis, share of the view's side
POINTS = {1: 4, 2: 4, 3: 6, 4: 8}
VIEW = {1: 0.62, 2: 0.55, 3: 0.5, 4: 0.5}  # geometric mean of the views' sides, share of the image's short side
APART = {1: 0.22, 2: 0.18, 3: 0.15, 4: 0.12}  # least distance of two points, share of the canvas
START_LEVEL = 2
POOLED = ()  # levels that show other images too
SHARE = 0.20
LARGEST = 448  # px a side of a canvas
RING, LABEL, REF = 0.12, 0.14, 0.21  # sizes of marks' cells, shares of the canvas; one has 12 px at least
ROOM = 1.5  # times a ring's radius: how far others' labels stay from its middle
MARGIN = 0.09  # of points from a canvas's edge, share of the canvas
SURROUNDINGS = 0.18  # how far around two points they are told apart, share of the views' mean side
PLACES = 192  # where in view 1 the point could stand: samples a point
LATTICE = 0.08  # between points beside the corners, share of the views' mean side
TRIES = 40


def build(rng, image, level, spec, pool) -> Puzzle:
    """View 2 and its points are drawn without knowing which is the answer; which one is, and its rank among them by
    distance to the place where REF stands in view 1, are drawn so that both are uniform, and view 1 is then cut to make
    it so. Nothing about where points lie tells the answer."""
    short, count = min(image.height, image.width), POINTS[level]
    side = spec.square(min(1.4 * VIEW[level] * short, LARGEST))
    grey, step = image.grey()
    points, strong = _points(rng, image, grey, step, VIEW[level] * short)
    marks, decidable, chosen = _marks(side), False, None
    for _ in range(TRIES):
        extents, to_image = _second_view(rng, image, level)
        colour = jitter(rng, image.mean, 0.4, 0.4, 0.4, 0.1) if level > 1 else IDENTITY_COLOUR
        shown, places = _visible(points, to_image, image, extents[0], marks)
        if len(shown) < count:
            continue
        looks = surroundings(grey, points[shown] / step, SURROUNDINGS * VIEW[level] * short / step, _tones(colour))
        picked = _pick(rng, looks, places, shown < strong, level, count, marks)
        if picked is None:
            continue
        numbers, sides = picked
        chosen = _assign(rng, points[shown][numbers], places[numbers], image, extents[0])
        if chosen is not None:
            decidable = True
            break
    if chosen is None:  # no picture to tell points by: any will do
        grid = np.stack(np.meshgrid((0.2, 0.5, 0.8), (0.2, 0.5, 0.8), indexing="ij"), -1).reshape(-1, 2)[:count]
        spots, sides = np.array([_apply(to_image, *yx) for yx in grid]), [0] * count
        chosen = int(rng.integers(0, count)), np.array((0.5, 0.5)), spots, grid
    truth, ref, spots, places = chosen
    first = extents[0]
    ref = ref.copy()
    for axis, n in enumerate((image.height, image.width)):  # view 1 stays inside the image
        start = min(max(spots[truth, axis] - ref[axis] * first, 0.0), n - first)
        ref[axis] = (spots[truth, axis] - start) / first
    top, left = spots[truth] - ref * first
    plan = Plan()
    step = first / side
    plan.view(plan.canvas(side, side), 0, (step, 0.0, left, 0.0, step, top))
    matrix = to_image * (1 / side, 1 / side, 1.0)
    plan.view(plan.canvas(side, side), 0, tuple((matrix / matrix[2, 2]).ravel().tolist()), colour=colour)
    _mark(plan, 0, ref[None], ["REF"], [_free_side(rng, ref, _marks(side, "REF"))], (255.0, 224.0, 64.0))
    _mark(plan, 1, places, LETTERS, sides, (255.0, 255.0, 255.0))
    drawn = {"plan": plan, "decidable": decidable, "points": [ref[None], places]}
    return lettered(count, truth, marks=["1", "2"], sheet=[[0, 1]], **drawn)


def extents(level, spec, side) -> list:
    """Rows of the Extents of its canvases, of images whose sides are `side` px at most."""
    return [[Extent.square(spec.square(min(1.4 * VIEW[level] * side, LARGEST)))] * 2]


def _second_view(rng, image, level):
    """((side of view 1, of view 2) in image px, view 2's map from its unit square, (x, y, 1), to image px)."""
    short = min(image.height, image.width)
    ratio = math.exp(rng.uniform(*map(math.log, SCALE[level])))
    angle = math.radians(rng.uniform(-TURN[level], TURN[level]))
    shifts = rng.uniform(-SHIFT[level], SHIFT[level], (4, 2))
    unit = np.array(((0, 0), (1, 0), (1, 1), (0, 1)), float)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = (unit - 0.5 + shifts).T
    quad = np.stack([x * cos - y * sin, x * sin + y * cos], 1)
    low, high = quad.min(0), quad.max(0)
    reach = min(0.98 * image.width / (high - low)[0], 0.98 * image.height / (high - low)[1])
    second = min(VIEW[level] * short * math.sqrt(ratio), reach)
    first = min(second / ratio, 0.9 * short)
    corner = rng.uniform(0, 1, 2) * (np.array((image.width, image.height)) - second * (high - low)) - second * low
    return (first, second), _homography(quad * second + corner)


def _homography(corners):
    """3x3 map that takes the unit square's corners, (0, 0), (1, 0), (1, 1), (0, 1), to others, float64 [4, 2] of (x,
    y): Heckbert 1989, section 2.2.3. It is written out, like the maps below: the last bits of a matrix product or a
    solver depend on the machine's BLAS."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = corners.tolist()
    ax, ay, bx, by = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    cx, cy = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    area = ax * by - bx * ay
    g, h = (cx * by - bx * cy) / area, (ax * cy - cx * ay) / area
    return np.array(((x1 - x0 + g * x1, x3 - x0 + h * x3, x0), (y1 - y0 + g * y1, y3 - y0 + h * y3, y0), (g, h, 1.0)))


def _apply(matrix, y, x):
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    z = g * x + h * y + i
    return (d * x + e * y + f) / z, (a * x + b * y + c) / z


def _inverse(matrix):
    """The inverse of a 3x3 map, but for a factor: its adjugate."""
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    rows = (e * i - f * h, c * h - b * i, b * f - c * e), (f * g - d * i, a * i - c * g, c * d - a * f)
    return np.array((*rows, (d * h - e * g, b * g - a * h, a * e - b * d)))


def _points(rng, image, grey, step, view):
    """(points, how many of them are corners): the image's textured corners, and after them a lattice's, float64 [n, 2]
    of (y, x) in its px. What is out of focus has no corners, but places that can be told."""
    pitch = LATTICE * view
    axes = [np.arange(rng.uniform(0, pitch), n, pitch) for n in (image.height, image.width)]
    textured = corners(grey, step)
    return np.concatenate([textured, np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)]), len(textured)


def _tones(colour):
    """(darkest, lightest, gain): the greys from which on a colour map shows black and white, and how much of the greys'
    differences is seen both in view 1, before it, and in view 2, after it."""
    gain = plain_sum(LUMA[i // 4] * v for i, v in enumerate(colour) if i % 4 < 3)
    rest = plain_sum(weight * v for weight, v in zip(LUMA, colour[3::4]))
    return -rest / gain, (255.0 - rest) / gain, min(gain, 1.0)


def _visible(points, to_image, image, first, marks):
    """(numbers of the points that view 2 shows and view 1 could, their places in view 2 as shares of its canvas,
    float64 [n, 2])."""
    places = np.stack(_apply(_inverse(to_image), *points.T), 1)
    margin = max(MARGIN, marks.ring)
    room = margin * first
    inside = ((places > margin) & (places < 1 - margin)).all(1)
    inside &= ((points > room) & (points < np.array((image.height, image.width)) - room)).all(1)
    return np.flatnonzero(inside), places[inside]


def _pick(rng, looks, places, strong, level, count, marks):
    """Numbers of `count` points that lie apart and look different, in random order, and the sides of their labels; None
    if there are too few. `strong` ones first."""
    n = len(places)
    order = rng.permutation(n)
    if level == 4:  # close together: around the first, nearest first
        first = places[order[strong[order].argmax()]]
        order = order[np.argsort(np.linalg.norm(places[order] - first, axis=1), kind="stable")]
    order = order[np.argsort(~strong[order], kind="stable")]
    limits = {"turns": TURN[level] * SECTORS // 360, "apart": max(APART[level], 2 * marks.ring), "marks": marks}
    chosen, sides = distinct(*looks, places, order, rng.integers(0, 8, n), count, **limits)
    if len(chosen) < count:
        return None
    shuffled = rng.permutation(count)
    return np.array(chosen)[shuffled], np.array(sides)[shuffled].tolist()


def _assign(rng, spots, places, image, first):
    """(answer, REF's place in view 1, spots, places); None where no view 1 makes answer and rank uniform."""
    count = len(spots)
    size = np.array((image.height, image.width))
    low = np.maximum((spots - (size - first)) / first, MARGIN)
    high = np.minimum(spots / first, 1 - MARGIN)
    refs = low[:, None] + rng.random((count, PLACES, 2)) * (high - low)[:, None]  # where each point could stand
    found = balanced(refs, places)
    if found is None:
        return None
    ranks, weights = found
    truth = int(rng.integers(0, count))
    rank = int(np.searchsorted(np.cumsum(weights[truth]), rng.random() * weights[truth].sum(), side="right"))
    rank = min(rank, count - 1)
    at = np.flatnonzero(ranks[truth] == rank)
    return truth, refs[truth, at[int(rng.integers(0, len(at)))]], spots, places


def _sizes(side):
    """Sides in px of the cells of a ring, a letter and REF on a canvas of `side` px."""
    return [max(12.0, share * side) for share in (RING, LABEL, REF)]


def _marks(side, label="A"):
    """How much of a canvas of `side` px its marks cover, outlines included, and a gap around a ring."""
    ring, letter, ref = (size / side / CELL for size in _sizes(side))
    tall, wide = (15.6 * ref, 30.6 * ref) if label == "REF" else (25.8 * letter, 18.8 * letter)
    return Marks(33.2 * ring, tall, wide, ROOM * 33.2 * ring)


def _free_side(rng, place, marks):
    """A side of a lone point where its label is inside the canvas as far as can be."""
    half = np.array((marks.tall, marks.wide))
    labels = place + label_places(marks)
    outside = np.maximum(abs(labels - 0.5) - (0.5 - half), 0).max(1)
    sides = rng.permutation(8)
    return int(sides[outside[sides].argmin()])


def _mark(plan, canvas, places, names, sides, rgb):
    """A ring around every place (share of the canvas) and its name beside it, upright."""
    side = plan.sizes[canvas][0]
    ring, letter, ref = _sizes(side)
    for place, name, number in zip(places, names, sides):
        y, x = (place * side).tolist()
        plan.stamp(canvas, "ring", y, x, ring, rgb)
        y, x = ((place + label_places(_marks(side, name))[number]) * side).tolist()
        plan.stamp(canvas, name, y, x, ref if name == "REF" else letter, rgb)
