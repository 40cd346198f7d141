"""Similarity: a reference view and lettered candidates, of which exactly one is another view of the same image."""

import math

from sslr1.ops.render import IDENTITY_COLOUR
from sslr1.puzzles.plan import SAME, Plan, Puzzle, difference, thumbnail
from sslr1.puzzles.reward import Answer

LEVELS = {1: "4 candidates, mild crops", 2: "4 candidates, strong augmentation"}
AREA = {1: (0.3, 1.0), 2: (0.08, 0.5)}
START_LEVEL = 2
SHARE = 0.15
CANDIDATES = 4
OVERLAP_OF_VIEW = 0.3
OVERLAP_OF_IMAGE = 0.04


def build(draw, image, level, spec, pool) -> Puzzle:
    """Every view is drawn from one distribution: each candidate is the second view of an overlapping pair on its own image,
    so that neither its size nor its augmentation tells the truth from the rest."""
    H, W = image.shape[:2]
    side = spec.square(min(H, W) / 2)
    others, images = [], [image]
    small = [thumbnail(image, 16, 16)]
    for _ in range(40 * CANDIDATES):  # near-identical pictures are redrawn by key
        if len(images) == CANDIDATES:
            break
        number = int(draw.integers(0, len(pool)))
        other = pool[number]
        look = thumbnail(other, 16, 16)
        if all(difference(look, seen) > SAME for seen in small):
            others.append(number)
            images.append(other)
            small.append(look)
    else:
        raise ValueError(
            f"similarity needs {CANDIDATES - 1} images that differ from the one shown; the pool of {len(pool)} has too few"
        )
    truth = int(draw.integers(0, CANDIDATES))
    places = list(range(1, CANDIDATES))  # the image that each candidate shows; 0 is the puzzle's own
    places.insert(truth, 0)
    plan = Plan()
    reference = None
    views = []
    for number in places:
        first, second = view_pair(draw, *images[number].shape[:2], AREA[level])
        looks = [augmentation(draw, small[number], level) for _ in range(2)]
        if number == 0:
            reference = (0, first, looks[0])
        views.append((number, second, looks[1]))
    for number, (top, left, height, width), (flip, colour, blur) in [reference, *views]:
        a, d = width / side, height / side
        affine = (-a, 0, left + width, 0, d, top) if flip else (a, 0, left, 0, d, top)
        canvas = plan.canvas(side, side)
        plan.view(canvas, 0, 0, side, side, number, affine, colour=colour, blur=blur * side)
    decidable = difference(small[0], small[0].mean((0, 1))) > SAME
    answer = Answer("choice", "ABCDEFGH"[truth], choices=tuple("ABCDEFGH"[:CANDIDATES]))
    return Puzzle(plan, [({"count": CANDIDATES}, answer)], 1 / CANDIDATES, decidable, others)


def view_pair(draw, H, W, area):
    """Two crops (top, left, height, width) of an HxW image that share at least 30 % of the smaller and 4 % of the image."""
    while True:
        (y1, x1, h1, w1), (y2, x2, h2, w2) = pair = [random_crop(draw, H, W, area) for _ in range(2)]
        shared = max(0, min(y1 + h1, y2 + h2) - max(y1, y2)) * max(0, min(x1 + w1, x2 + w2) - max(x1, x2))
        if shared >= OVERLAP_OF_VIEW * min(h1 * w1, h2 * w2) and shared >= OVERLAP_OF_IMAGE * H * W:
            return pair


def random_crop(draw, H, W, area):
    """A crop of area share uniform in `area` and aspect ratio log-uniform in 3/4 … 4/3, anywhere inside the image."""
    for _ in range(10):
        pixels = draw.uniform(*area) * H * W
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        h, w = math.sqrt(pixels / ratio), math.sqrt(pixels * ratio)
        if h <= H and w <= W:
            break
    else:
        h, w = min(h, H), min(w, W)
    return draw.uniform(0, H - h), draw.uniform(0, W - w), h, w


def augmentation(draw, small, level):
    """(flip, colour map, blur as a share of the canvas side): none at level 1, SimCLR's (arXiv 2002.05709) at level 2."""
    if level == 1:
        return False, IDENTITY_COLOUR, 0.0
    flip = draw.random() < 0.5
    jitter, grey, blur = draw.random() < 0.8, draw.random() < 0.2, draw.random() < 0.5
    brightness, contrast, saturation = draw.uniform(0.2, 1.8, 3)
    hue = draw.uniform(-0.2, 0.2)
    sigma = draw.uniform(0.1, 2.0) / 224
    colour = IDENTITY_COLOUR
    if jitter:
        mean = float((small.mean((0, 1)) * small.new_tensor(LUMA)).sum())
        colour = compose(colour, scale_about(0.0, brightness))
        colour = compose(colour, scale_about(mean * brightness, contrast))
        colour = compose(colour, saturate(saturation))
        colour = compose(colour, rotate_hue(2 * math.pi * hue))
    if grey:
        colour = compose(colour, saturate(0.0))
    return flip, colour, sigma if blur else 0.0


LUMA = (0.299, 0.587, 0.114)


def compose(first, then):
    """Colour map that applies `first` and `then`; both 3x4, row by row."""
    out = []
    for r in range(3):
        row = then[4 * r : 4 * r + 4]
        out += [sum(row[k] * first[4 * k + c] for k in range(3)) + (row[3] if c == 3 else 0.0) for c in range(4)]
    return tuple(out)


def scale_about(centre, factor):
    """Brightness (centre 0) and contrast (centre: the picture's mean)."""
    return tuple(v for r in range(3) for v in [*(factor if c == r else 0.0 for c in range(3)), centre * (1 - factor)])


def saturate(factor):
    """Blend with the luma: 1 leaves the colours, 0 makes grey."""
    return tuple(
        v for r in range(3) for v in [*((factor if c == r else 0.0) + (1 - factor) * LUMA[c] for c in range(3)), 0.0]
    )


def rotate_hue(angle):
    """Rotation by `angle` (radians) of the chroma plane of YIQ."""
    to_yiq = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
    to_rgb = ((1.0, 0.956, 0.619), (1.0, -0.272, -0.647), (1.0, -1.106, 1.703))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = ((1, 0, 0), (0, cos, -sin), (0, sin, cos))

    def times(a, b):
        return [[sum(a[i][k] * b[k][j] for k in range(3)) for j in range(3)] for i in range(3)]

    m = times(to_rgb, times(turn, to_yiq))
    return tuple(v for row in m for v in [*row, 0.0])
