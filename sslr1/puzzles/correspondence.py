"""Correspondence: two views of one image, a point marked REF in the first, lettered points in the second; which is the
same?"""

import math

import numpy as np

from sslr1.ops.render import IDENTITY_COLOUR
from sslr1.puzzles.colour import jitter
from sslr1.puzzles.picture import corners
from sslr1.puzzles.plan import Extent, Plan
from sslr1.puzzles.points import balanced, distinct
from sslr1.puzzles.prompts import LETTERS
from sslr1.puzzles.puzzle import Puzzle, lettered

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
VIEW = {1: 0.72, 2: 0.55, 3: 0.5, 4: 0.5}  # geometric mean of the views' sides, share of the image's short side
APART = {1: 0.22, 2: 0.18, 3: 0.15, 4: 0.12}  # least distance of two points, share of the canvas
START_LEVEL = 2
POOLED = ()  # levels that show other images too
SHARE = 0.20
LARGEST = 448  # px a side of a canvas
RING, LABEL = 0.075, 0.085  # sizes of marks, shares of the canvas; a mark has 12 px at least
MARGIN = 0.09  # of points from a canvas's edge, share of the canvas
ALIKE = 0.9  # correlation of two points' surroundings from which they can't be told apart …
SURROUNDINGS = 5  # … which reach so far around them, px of the reduced image
PLACES = 192  # where in view 1 the point could stand: samples a point
TRIES = 20


def build(rng, image, level, spec, pool) -> Puzzle:
    """View 2 and its points are drawn without knowing which is the answer; which one is, and its rank among them by
    distance to the place where REF stands in view 1, are drawn so that both are uniform, and view 1 is then cut to make
    it so. Nothing about where points lie tells the answer."""
    short, count = min(image.height, image.width), POINTS[level]
    side = spec.square(min(1.4 * VIEW[level] * short, LARGEST))
    ground = image.grey()
    textured = corners(*ground)
    decidable, chosen = False, None
    for _ in range(TRIES):
        extents, to_image = _second_view(rng, image, level)
        points = _visible(textured, to_image, image, extents[0])
        picked = _pick(rng, points, ground, level, count)
        if picked is not None and (chosen := _assign(rng, *picked, image, extents[0])) is not None:
            decidable = True
            break
    if chosen is None:  # no picture to tell points by: any will do
        grid = np.stack(np.meshgrid((0.2, 0.5, 0.8), (0.2, 0.5, 0.8), indexing="ij"), -1).reshape(-1, 2)[:count]
        spots = np.array([_apply(to_image, *yx) for yx in grid])
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
    colour = jitter(rng, image.mean, 0.4, 0.4, 0.4, 0.1) if level > 1 else IDENTITY_COLOUR
    matrix = to_image * (1 / side, 1 / side, 1.0)
    plan.view(plan.canvas(side, side), 0, tuple((matrix / matrix[2, 2]).ravel().tolist()), colour=colour)
    _mark(rng, plan, 0, ref[None], ["REF"], (255.0, 224.0, 64.0))
    _mark(rng, plan, 1, places, LETTERS, (255.0, 255.0, 255.0))
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


def _visible(textured, to_image, image, first):
    """(image points, their places in view 2) of the corners that view 2 shows and view 1 could: both [n, 2] of (y, x),
    places as shares of the canvas."""
    places = np.stack(_apply(_inverse(to_image), *textured.T), 1)
    room = MARGIN * first
    inside = ((places > MARGIN) & (places < 1 - MARGIN)).all(1)
    inside &= ((textured > room) & (textured < np.array((image.height, image.width)) - room)).all(1)
    return textured[inside], places[inside]


def _pick(rng, points, ground, level, count):
    """`count` of the points that lie apart and look different, in random order; None if there are too few."""
    spots, places = points
    if len(spots) < count:
        return None
    order = rng.permutation(len(spots))
    if level == 4:  # close together: around the first, nearest first
        order = order[np.argsort(np.linalg.norm(places[order] - places[order[0]], axis=1), kind="stable")]
    grey, step = ground
    limits = {"radius": SURROUNDINGS, "apart": APART[level], "alike": ALIKE}
    chosen = distinct(grey, spots / step, places, order, count, **limits)
    if len(chosen) < count:
        return None
    chosen = np.array(chosen)[rng.permutation(count)]
    return spots[chosen], places[chosen]


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


def _mark(rng, plan, canvas, places, names, rgb):
    """A ring around every place (share of the canvas) and its name beside it, upright, on the side that is freest."""
    side = plan.sizes[canvas][0]
    ring, label = max(12.0, RING * side), max(12.0, LABEL * side)
    points = (places * side).tolist()
    far = 0.38 * ring + 0.5 * label
    sides = [(far * math.sin(i * math.pi / 4), far * math.cos(i * math.pi / 4)) for i in range(8)]
    taken = [tuple(point) for point in points]
    for (y, x), name in zip(points, names):
        plan.stamp(canvas, "ring", y, x, ring, rgb)
        others = [place for place in taken if place != (y, x)]
        best, room = None, -math.inf
        for eighth in rng.permutation(8).tolist():
            ly, lx = y + sides[eighth][0], x + sides[eighth][1]
            nearest = min([math.hypot(ly - ty, lx - tx) for ty, tx in others], default=math.inf)
            free = min(min(ly, side - ly, lx, side - lx) - label / 2, nearest - label)
            if free > room:
                best, room = (ly, lx), free
            if room >= 0.0:
                break
        plan.stamp(canvas, name, *best, label * (1.2 if name == "REF" else 1.0), rgb)
        taken.append(best)
