"""Inpainting: an image with a square hole and lettered patches; which one fills the hole?"""

import math
from typing import NamedTuple

import numpy as np

from sslr1.puzzles.picture import SAME, difference, grain, halved, told_apart
from sslr1.puzzles.plan import Extent, Plan, canvas_size, largest_canvas
from sslr1.puzzles.puzzle import Puzzle, lettered, lettered_rows
from sslr1.puzzles.similarity import negatives

LEVELS = {
    1: "hole of half the short side, 4 patches, the others from other images",
    2: "a third, 4 patches: two places, each as it is or changed",
    3: "a third, 6 patches: three places",
    4: "a quarter, 8 patches: four places",
}
QUESTIONS = dict.fromkeys(
    LEVELS,
    (
        "{image}\nA square was cut out of this picture and is shown grey.\n{candidates}\nWhich patch fills the hole?",
        "Picture with a grey hole: {image}\n{candidates}\nOne of these patches was there. Which?",
        "{image}\nWhat belongs where the grey square is?\n{candidates}\nGive the letter of the patch.",
        "The grey square hides a part of this image. {image}\n{candidates}\nPick the letter of the part it hides.",
        "{image}\nExactly one of {count} patches completes the picture without a flaw.\n{candidates}\nWhich letter?",
        "Complete the image: {image}\n{candidates}\nWhich patch goes into the grey square, unchanged?",
    ),
)
HOLE = {1: 1 / 2, 2: 1 / 3, 3: 1 / 3, 4: 1 / 4}  # of the short side
CANDIDATES = {1: 4, 2: 4, 3: 6, 4: 8}
START_LEVEL = 2
POOLED = (1,)  # levels that show other images too
SHARE = 0.10
RIM = 0.03  # trimmed off each side of a patch, as a share of the hole's, so that edges don't simply continue
OVERLAP = 0.3  # of its area, which every place's overlap with the hole and with the others stays under
CELLS = 16  # a side of a patch, whose means it is told from the others by …
# … and which of the halved ones lie at the hole's border
AROUND = np.flatnonzero(np.pad(np.zeros((CELLS // 2 - 2, CELLS // 2 - 2)), 1, constant_values=1))
CHANGES = ("flip", "shift", "scale")
TRIES = 24


def build(rng, image, level, spec, pool) -> Puzzle:
    """From level 2 the patches come in pairs whose members differ by one change: the truth and a changed truth, and for
    every other place two patches that differ by a change drawn alike, of which the first may be changed already. So
    neither being in a pair, being the odd one nor looking untouched tells the truth. All patches, the truth too, are
    sampled once, bilinearly, at sub-pixel places, and shown at the masked image's scale."""
    height, width, step = canvas_size(image.height, image.width, spec)
    hole, side, visible = _sides(HOLE[level] * min(height, width), spec)
    count = CANDIDATES[level]
    view = tuple(rng.uniform(0, n - side * step) for n, side in ((image.height, height), (image.width, width)))
    if step == 1.0:
        view = tuple(map(math.floor, view))
    images = [image, *(negatives(rng, image, pool, count - 1) if level == 1 else [])]
    for _ in range(TRIES):
        top, left = (int(rng.integers(0, n - hole + 1)) for n in (height, width))
        half = hole * step / 2
        truth = (0, view[0] + top * step + half, view[1] + left * step + half, visible * step / 2, False)
        if level == 1:
            patches = [truth, *(_elsewhere_in(rng, images[n], n) for n in range(1, count))]
        else:
            patches = _pairs(rng, image, truth, half, (*view, height * step, width * step), count // 2)
        looks = [_look(images[patch[0]], patch) for patch in patches]
        decidable = all(look.structure > SAME for look in looks[:: 1 if level == 1 else 2])
        decidable &= all(_apart(looks[0], look) for look in looks[1:])
        if level > 1:
            decidable &= all(_apart(a, b) for a, b in zip(looks[::2], looks[1::2]))
        if decidable and len(patches) == count:
            break
    # one mip level for all, or reduced copies would be the softest
    mip = None if level == 1 else max(0, math.floor(math.log2(truth[3] * 2 / side)))
    plan = Plan()
    masked = plan.canvas(height, width)
    plan.view(masked, 0, (step, 0.0, view[1], 0.0, step, view[0]), exact=step == 1.0)
    plan.fill(masked, top, left, hole, hole)
    order = rng.permutation(count).tolist()
    for i in order:
        number, y, x, reach, flip = patches[i]
        y, x = (v + rng.uniform(-0.5, 0.5) for v in (y, x))
        a, near = 2 * reach / side, images[number]
        y, x = (min(max(v, reach), n - reach) for v, n in ((y, near.height), (x, near.width)))
        affine = (-a, 0.0, x + reach, 0.0, a, y - reach) if flip else (a, 0.0, x - reach, 0.0, a, y - reach)
        plan.view(plan.canvas(side, side), number, affine, level=mip)
    return lettered(count, order.index(0), plan=plan, decidable=decidable, others=images[1:])


def extents(level, spec, side) -> list:
    """Rows of the Extents of its canvases, of images whose sides are `side` px at most."""
    whole = largest_canvas(side * side, spec)
    patch = _sides(HOLE[level] * math.sqrt(whole), spec)[1]  # the hole's is a share of the shorter side
    return lettered_rows(CANDIDATES[level], Extent(*[max(side, math.isqrt(whole))] * 2, whole), Extent.square(patch))


def _sides(wanted, spec):
    """(side of the hole, of a patch's canvas, of what a patch shows), px of the masked image: one scale for both, with
    a hole of as nearly the wanted side as whole units make; where no legal canvas is near it, patches are enlarged or
    reduced."""
    side = spec.square(wanted / (1 + 2 * RIM) + spec.unit / 2)
    hole = side + 2 * round(RIM * side)
    if wanted / 1.5 <= hole <= wanted * 1.5:
        return hole, side, side
    return round(wanted), side, round(wanted) * (1 - 2 * RIM)


def _pairs(rng, image, truth, half, view, count):
    """The truth, its changed copy, and pairs from elsewhere in the view, one after the other. Where no place or change
    fits, the hole's own neighbourhood has to do, and the puzzle comes out undecidable."""
    patches = [truth, _change(rng, truth, view, CHANGES[int(rng.integers(0, 3))])]
    places, looks = [truth[1:3]], [_look(image, truth)]
    for _ in range(count - 1):
        second = CHANGES[int(rng.integers(0, 3))]
        first = (None, *(c for c in CHANGES if c != second))[int(rng.integers(0, 3))]
        for _ in range(40):
            y, x = (rng.uniform(start + half, start + extent - half) for start, extent in zip(view[:2], view[2:]))
            base = (0, y, x, truth[3], False)
            if first:
                base = _change(rng, base, view, first)
            look = _look(image, base)
            apart = all(_overlap(y - v, x - u, 2 * half) < OVERLAP for v, u in places)
            if apart and look.structure > SAME and all(_apart(look, seen) for seen in looks):
                break
        places.append((y, x))
        looks.append(look)
        patches += [base, _change(rng, base, view, second)]
    return patches


def _overlap(dy, dx, side):
    """Share of a square's area that another of its size covers, shifted by (dy, dx)."""
    return max(0.0, 1 - abs(dy) / side) * max(0.0, 1 - abs(dx) / side)


def _change(rng, patch, view, change):
    """A patch (image, y, x, reach, flip: its centre and half its side in image px), changed, inside the view."""
    number, y, x, reach, flip = patch
    if change == "flip":
        return number, y, x, reach, not flip
    for _ in range(12):
        if change == "shift":
            angle, far = rng.uniform(0, 2 * math.pi), 2 * reach * rng.uniform(0.2, 0.35)
            to = y + far * math.sin(angle), x + far * math.cos(angle), reach
        else:
            to = y, x, reach * rng.uniform(1.2, 1.4) ** (1 if rng.random() < 0.5 else -1)
        inside = [min(max(v, s + to[2]), s + e - to[2]) for v, s, e in zip(to, view[:2], view[2:])]
        if change == "scale" or inside == list(to[:2]):
            break  # a larger patch moves in: it must not be the rarer for lack of room
    return number, *inside, to[2], flip


def _elsewhere_in(rng, image, number):
    """A patch from anywhere in another image, as large a share of it as the truth is of its own."""
    reach = HOLE[1] * min(image.height, image.width) * (1 - 2 * RIM) / 2
    return number, rng.uniform(reach, image.height - reach), rng.uniform(reach, image.width - reach), reach, False


class _Look(NamedTuple):
    """What a patch shows. around: means along its border, [n, 3]; structure: how much there is to see (the places of
    wrong patches are held to what the hole's is, or they would be the dull ones); grain: of its cells."""

    around: np.ndarray
    structure: float
    grain: float


def _look(image, patch):
    _, y, x, reach, flip = patch
    cells = image.means(y - reach, x - reach, 2 * reach, 2 * reach, CELLS, CELLS)
    means = halved(cells[:, ::-1] if flip else cells)
    return _Look(means.reshape(-1, 3)[AROUND], difference(means, means.mean((0, 1))), grain(cells))


def _apart(one, other):
    """Whether only one of two patches fits: at the border of the hole, where what is around it tells."""
    return told_apart(difference(one.around, other.around), (one.grain + other.grain) / 2)
