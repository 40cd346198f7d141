"""Similarity: a reference view and lettered candidates, of which exactly one is another view of the same image."""

import math

import numpy as np

from sslr1.ops.render import IDENTITY_COLOUR
from sslr1.puzzles.colour import LUMA, constant, equalise, greyed, jitter
from sslr1.puzzles.picture import grain
from sslr1.puzzles.plan import Extent, Plan, PoolError, peek
from sslr1.puzzles.puzzle import Puzzle, lettered, lettered_rows

LEVELS = {
    1: "4 candidates, mild crops",
    2: "4 candidates, strong augmentation",
    3: "4 candidates, strong augmentation, tones matched",
    4: "8 candidates, strong augmentation, tones matched",
}
QUESTIONS = dict.fromkeys(
    LEVELS,
    (
        "Reference: {image}\n{candidates}\nWhich candidate shows the same scene as the reference?",
        "{image}\nThis view and one of the following were taken from the same picture.\n{candidates}\nWhich one?",
        "Find the other view of this image: {image}\n{candidates}\nGive its letter.",
        "{image}\nOnly one of these {count} comes from the same image as that one.\n{candidates}\nWhich letter?",
        "Compare the first picture with the candidates. {image}\n{candidates}\nWhich is another view of it?",
        "First view: {image}\n{candidates}\nPick the letter of the view that belongs to the same image.",
    ),
)
AREA = {1: (0.3, 1.0), 2: (0.08, 0.5), 3: (0.08, 0.5), 4: (0.08, 0.5)}
CANDIDATES = {1: 4, 2: 4, 3: 4, 4: 8}
START_LEVEL = 2
POOLED = (1, 2, 3, 4)  # levels that show other images too
SHARE = 0.15
OVERLAP_OF_VIEW = 0.3
OVERLAP_OF_IMAGE = 0.04
TRIES = 12
ALIKE = 0.9  # of two near-copies' own grain, how much they differ by at most
# logarithms of aspect ratios: where from, how far
LOWEST_RATIO = math.log(3 / 4)
RATIOS = math.log(4 / 3) - LOWEST_RATIO
FLATTEST = 12.0  # standard deviation of luma, 8-bit levels, under which a view shows too little
# Quantiles at which matched tones are pinned, denser at the tails; moved at random by up to 0.3 of their spacing, so
# that what is left of a histogram's shape between them falls elsewhere in every view.
KNOTS = np.array((0.01, 0.04, 0.12, 0.25, 0.42, 0.58, 0.75, 0.88, 0.96, 0.99))
SPACING = np.minimum(np.diff(KNOTS, prepend=0), np.diff(KNOTS, append=1))
NARROWEST = 1.0  # 8-bit levels of such a step
SPREAD = 45.0  # standard deviation of every channel of a matched view, 8-bit levels
CURVE = 0.5  # standard deviation of the logarithm of its tone curve's slopes


def build(rng, image, level, spec, pool) -> Puzzle:
    """Every view is drawn from one distribution: each candidate is the second view of an overlapping pair on its own
    image, so that neither its size nor its augmentation tells the truth from the rest."""
    count = CANDIDATES[level]
    side = spec.square(min(image.height, image.width) / 2)
    images = [image, *negatives(rng, image, pool, count - 1)]
    truth = int(rng.integers(0, count))
    places = [*range(1, truth + 1), 0, *range(truth + 1, count)]  # the image of each candidate; 0 is the puzzle's own
    target = rng.uniform(110, 145, 3)
    views, decidable = [], not image.flat
    for number in places:
        (reference, candidate), told = pair_of_views(rng, images[number], level, side, target)
        if number == 0:
            views.insert(0, (0, *reference))
        views.append((number, *candidate))
        decidable &= told
    plan = Plan()
    for number, crop, flip, colours, blur, _ in views:
        affine = crop_map(crop, side, flip)
        canvas = plan.canvas(side, side)
        for colour, alpha in colours:
            plan.view(canvas, number, affine, colour=colour, alpha=alpha, blur=blur)
    return lettered(count, truth, plan=plan, decidable=decidable, others=images[1:])


def extents(level, spec, side) -> list:
    """Rows of the Extents of its canvases, of images whose sides are `side` px at most."""
    return lettered_rows(CANDIDATES[level], *[Extent.square(spec.square(side / 2))] * 2)


def pair_of_views(rng, image, level, side, target):
    """(two views (crop, augmentation) that overlap, whether both show something): those that don't are drawn again."""
    for _ in range(TRIES):
        crops = crop_pair(rng, image.height, image.width, AREA[level])
        views = [(crop, *augmentation(rng, image, crop, level, side, target)) for crop in crops]
        if all(_shows(image, level, *view) for view in views):
            return views, True
    return views, False


def _shows(image, level, crop, flip, colours, blur, possible) -> bool:
    """Whether a view, its crop and augmentation, shows anything."""
    return possible and (level >= 3 or image.contrast(*crop, colours[0][0]) >= FLATTEST)


def negatives(rng, image, pool, count):
    """`count` Pictures of the pool that differ from the image and from each other; one that doesn't is drawn again.
    PoolError if the pool has too few."""
    taken, found = set(), []
    for _ in range(40 * (count + 1)):
        number = int(rng.integers(0, len(pool)))
        if number in taken:
            continue
        picture = pool[number].piece(rng)
        if not near_copy(picture, [image, *found]):
            taken.add(number)
            found.append(picture)
            if len(found) == count:
                return found
    raise PoolError(f"{count} images that differ from the one shown are needed; the pool of {len(pool)} has too few")


def near_copy(picture, others) -> bool:
    """Whether a Picture shows what one of the others does: encoded again, a little brighter or darker, cut or moved by
    up to a sixteenth, or mirrored. Their looks then differ by less than cells next to each other do, as those of
    independent noise don't."""
    look = picture.evened
    n = len(look) - 2
    moved = [turned[y : y + n, x : x + n] for turned in (look, look[:, ::-1]) for y in range(3) for x in range(3)]
    moved, own = np.stack(moved), grain(look)
    for other in others:
        least = np.abs(moved - other.evened[1:-1, 1:-1]).mean((1, 2, 3)).min()
        if least <= ALIKE * (own + grain(other.evened)) / 2:
            return True
    return False


def crop_pair(rng, H, W, area):
    """Two crops (top, left, height, width) of an HxW image that share at least 30 % of the smaller and 4 % of the
    image."""
    while True:
        (y1, x1, h1, w1), (y2, x2, h2, w2) = pair = [random_crop(rng, H, W, area) for _ in range(2)]
        shared = max(0, min(y1 + h1, y2 + h2) - max(y1, y2)) * max(0, min(x1 + w1, x2 + w2) - max(x1, x2))
        if shared >= OVERLAP_OF_VIEW * min(h1 * w1, h2 * w2) and shared >= OVERLAP_OF_IMAGE * H * W:
            return pair


def random_crop(rng, H, W, area):
    """A crop of area share uniform in `area` and aspect ratio log-uniform in 3/4 … 4/3, anywhere inside the image."""
    low, high = area
    for _ in range(10):
        pixels = (low + (high - low) * rng.random()) * H * W
        ratio = math.exp(LOWEST_RATIO + RATIOS * rng.random())
        h, w = math.sqrt(pixels / ratio), math.sqrt(pixels * ratio)
        if h <= H and w <= W:
            break
    else:
        h, w = min(h, H), min(w, W)
    return (H - h) * rng.random(), (W - w) * rng.random(), h, w


def crop_map(crop, side, flip=False):
    """Inverse map of a square canvas of `side` px that shows a crop, mirrored or not."""
    top, left, height, width = crop
    a, d = width / side, height / side
    return (-a, 0.0, left + width, 0.0, d, top) if flip else (a, 0.0, left, 0.0, d, top)


def augmentation(rng, image, crop, level, side, target):
    """(flip, (colour map, alpha) of each layer, blur in px of the canvas, whether tones allow that): nothing is changed
    at level 1, all that SimCLR changes (arXiv 2002.05709) at level 2, its geometry and blur from level 3, where the
    tones of every view are `matched`."""
    if level == 1:
        return False, [(IDENTITY_COLOUR, 1.0)], 0.0, True
    flip = rng.random() < 0.5
    blur = rng.uniform(0.1, 2.0) / 224 * side if rng.random() < 0.5 else 0.0
    if level >= 3:
        luma = _luma(peek(image.pixels, crop_map(crop, side), side, blur))
        colours, possible = matched(rng, luma, target)
        return flip, colours, blur, possible
    colour = jitter(rng, image.mean, 0.8, 0.8, 0.8, 0.2) if rng.random() < 0.8 else IDENTITY_COLOUR
    if rng.random() < 0.2:
        colour = greyed(colour)
    return flip, [(colour, 1.0)], blur, True


def _luma(rgb):
    """float32 [n] of float32 [n, 3]. Each channel is added with one rounding: a matrix product's last bits depend on
    the machine's BLAS, and these are those of one with fused multiply-adds."""
    luma = np.zeros(len(rgb))
    for channel, weight in zip(rgb.T, np.array(LUMA, np.float32)):
        luma = (channel * np.float64(weight) + luma).astype(np.float32)
    return luma


def matched(rng, luma, target):
    """(layers that give a view the RGB mean `target` and the covariance SPREAD^2 in every entry, whether its tones
    allow that).

    Mean and covariance alone don't hide an image: the shape of its histogram still names it, which a blind solver
    reads. So tones are first spread evenly, as measured on what is rendered, along a tone curve with random slopes,
    which say nothing about the image; then scaled and shifted. What is left is monochrome: a view that was nearly grey
    could not be given another's chroma without giving itself away."""
    quantiles = np.quantile(luma, KNOTS + rng.uniform(-0.3, 0.3, len(KNOTS)) * SPACING)
    if np.diff(quantiles).min() < NARROWEST:
        return [(IDENTITY_COLOUR, 1.0)], False
    steps = ((luma[:, None] - quantiles[:-1]) / np.diff(quantiles)).clip(0, 1) * 255
    for _ in range(40):
        slopes = np.diff(KNOTS) * np.exp(rng.normal(0, CURVE, len(KNOTS) - 1))
        slopes /= slopes.sum()
        values = (steps * slopes).sum(1)
        keep = SPREAD / values.std()
        rest = (target - keep * values.mean()) / (1 - keep)
        if keep < 0.9 and (rest >= 0).all() and (rest <= 255).all():
            break
    else:
        return [(IDENTITY_COLOUR, 1.0)], False
    over = (slopes / slopes.cumsum()).tolist()  # each layer over the mean of those before it
    return [*zip(equalise(quantiles), over), (constant(rest), 1 - keep)], True
