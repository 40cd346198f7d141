"""Every puzzle has the answer that it says: solvers that know the source image (or the plan's maps) find it, every
time."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslr1 import puzzles
from sslr1.ops.atlas import CELL, CELLS
from sslr1.ops.render import ATLAS, FILL
from sslr1.puzzles.colour import LUMA
from sslr1.puzzles.plan import canvas_size

# level and number of puzzles: new ones each time, more for `make test-slow`
DRAWS = [
    pytest.param(level, count, marks=[pytest.mark.slow, pytest.mark.timeout(3600)] if count > 100 else [])
    for count in (100, 2000)
    for level in (1, 2, 3, 4)
]


@pytest.fixture(scope="module")
def images(photographs):
    from sslr1.data.scenes import scene

    return [*photographs, *(torch.from_numpy(scene(i, 320)) for i in range(16))]


def draws(images, name, level, count, seed):
    """`count` decidable puzzles as (image, batch of one)."""
    found = i = 0
    while found < count:
        assert i < 20 * count, f"{found} of {i} were decidable"
        image = images[i % len(images)]
        made = puzzles.make(
            [image],
            name,
            level=level,
            index=[i % len(images)],
            epoch=i // len(images),
            seed=seed,
            pool=images,
            wordings=1,
        )
        i += 1
        if made.decidable[0]:
            found += 1
            yield image, made


def grey(picture, scale=1.0):
    """[1, 1, h, w] float grey, reduced by `scale` (px of the result a px)."""
    x = picture.float().mean(2)[None, None]
    size = [max(1, round(n * scale)) for n in x.shape[2:]]
    return x if scale == 1 else F.interpolate(x, size, mode="bilinear", antialias=True)


def matches(image, templates, mask=None):
    """Normalised correlation of templates [n, 1, h, w] at every place of image [1, 1, H, W]."""
    mask = torch.ones_like(templates) if mask is None else mask.expand_as(templates)
    count = mask.sum((2, 3), keepdim=True)
    t = (templates - (templates * mask).sum((2, 3), keepdim=True) / count) * mask
    t = t / t.norm(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    image = image - image.mean()
    energy = F.conv2d(image**2, mask[:1]) - F.conv2d(image, mask[:1]) ** 2 / count[:1]
    return F.conv2d(image, t)[0] / energy[0].clamp(min=1.0).sqrt()


@pytest.mark.parametrize("level, count", DRAWS)
def test_rotation(images, seed, level, count):
    """Turned back by each possible angle, the canvas is looked for in the image."""
    for image, made in draws(images, "rotation", level, count, seed):
        canvas = made.render()[0][-1]
        angles = made.answers[0].choices
        side = canvas.shape[0]
        extent = 1 / math.hypot(*made.plan.tiles[-1][1][:2]) * 2 ** -made.plan.sources_int[made.plan.tiles[-1][0][5], 1]
        n = 40
        small = F.interpolate(grey(canvas), (n, n), mode="bilinear", antialias=True)
        turned = []
        for angle in angles:  # clockwise turns undone
            a = math.radians(angle)
            theta = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])
            where = F.affine_grid(theta[None].float(), (1, 1, n, n), align_corners=False)
            turned.append(F.grid_sample(small, where, align_corners=False, padding_mode="border")[0])
        span = torch.arange(n) - (n - 1) / 2
        disc = ((span[:, None] ** 2 + span**2).sqrt() < n / 2)[None, None].float()
        score = matches(grey(image, float(extent) * n / side), torch.stack(turned), disc).amax((1, 2))
        assert angles[int(score.argmax())] == made.answers[0].value


@pytest.mark.parametrize("level, count", DRAWS)
def test_ordering(images, seed, level, count):
    """Every offset of the grid and every assignment of tiles to places."""
    from scipy.optimize import linear_sum_assignment

    for image, made in draws(images, "ordering", level, count, seed):
        tiles = made.render()[0]
        rows, columns = len(made[0].sheet), len(made[0].sheet[0])
        (h, w), K = tiles[0].shape[:2], len(tiles)
        assert canvas_size(image.shape[0] / rows, image.shape[1] / columns, made.spec, 0.03) == (h, w, 1.0)
        pitch_y, pitch_x, rim_y, rim_x = *(s + 2 * round(0.03 * s) for s in (h, w)), round(0.03 * h), round(0.03 * w)
        r = 5
        maps = matches(grey(image, 1 / r), torch.cat([grey(tile, 1 / r) for tile in tiles])).numpy()
        y = np.add.outer(np.arange(0, image.shape[0] - rows * pitch_y + 1, 3), rim_y + np.arange(rows) * pitch_y)
        x = np.add.outer(np.arange(0, image.shape[1] - columns * pitch_x + 1, 3), rim_x + np.arange(columns) * pitch_x)
        y = np.minimum(np.rint(y / r).astype(int), maps.shape[1] - 1)
        x = np.minimum(np.rint(x / r).astype(int), maps.shape[2] - 1)
        gains = maps[:, y[:, None, :, None], x[None, :, None, :]].reshape(K, len(y) * len(x), K)  # tile, offset, place
        bounds = gains.max(0).sum(1)
        best, order = -math.inf, None
        for offset in bounds.argsort()[::-1]:
            if bounds[offset] <= best:
                break
            place_of = linear_sum_assignment(gains[:, offset], maximize=True)[1]
            gain = gains[np.arange(K), offset, place_of].sum()
            if gain > best:
                best, order = gain, tuple(int(v) + 1 for v in place_of.argsort())
        assert order == made.answers[0].value


def crop_of(image, shown, hole):
    """Where the shown crop, but for its hole, is in the image."""
    (h, w), free = shown.shape[:2], ~hole
    row = int(free.all(1).nonzero()[0])
    for y in range(image.shape[0] - h + 1):
        for x in range(image.shape[1] - w + 1):
            if torch.equal(image[y + row, x : x + w], shown[row]) and torch.equal(
                image[y : y + h, x : x + w][free], shown[free]
            ):
                return y, x
    raise AssertionError("the view is no crop of the image")


@pytest.mark.parametrize("level, count", DRAWS)
def test_inpainting(images, seed, level, count):
    """The patch that is most like what the image holds where the hole is."""
    for image, made in draws(images, "inpainting", level, count, seed):
        shown, *patches = made.render()[0]
        hole = (shown == FILL).all(2)
        top, left = (int(hole.sum(1 - axis).gt(hole.sum(1 - axis).max() // 2).nonzero()[0]) for axis in (0, 1))
        size = int(hole.sum(0).max())
        y, x = crop_of(image, shown, hole)
        rim = 0.03 * size
        side = patches[0].shape[0]
        centres = rim + (torch.arange(side) + 0.5) * (size - 2 * rim) / side
        gy, gx = ((centres + start) / n * 2 - 1 for start, n in ((y + top, image.shape[0]), (x + left, image.shape[1])))
        where = torch.stack(torch.meshgrid(gy, gx, indexing="ij")[::-1], -1)[None]
        truth = F.grid_sample(image.permute(2, 0, 1)[None].float(), where, align_corners=False)[0].permute(1, 2, 0)
        errors = [(patch.float() - truth).abs().mean().item() for patch in patches]
        assert "ABCDEFGH"[int(np.argmin(errors))] == made.answers[0].value, errors


def canvas_to_image(made, canvas):
    """The map from px of a canvas to px of the full image, from the plan's tile that shows a picture."""
    sources = made.plan.sources_int.tolist()
    for ints, floats in made.plan.tiles:
        image, mip = sources[ints[5]]
        if ints[0] == canvas and image != ATLAS:
            return np.diag((2.0**mip, 2.0**mip, 1.0)) @ np.reshape(floats[:9], (3, 3))
    raise AssertionError("no picture on this canvas")


def unlike(held, seen, clipped):
    """The share of seen [n, k]'s variance that no affine map of held [n, m] gives; where `clipped`, what the map gives
    beyond 0 … 255 was cut off there, and the map is fitted as if it hadn't been (a Tobit model, by expectation of what
    is hidden)."""
    design, target = torch.cat([held, torch.ones(len(held), 1)], 1), seen
    for _ in range(20 if clipped else 1):
        fit = design @ torch.linalg.lstsq(design, target).solution
        hidden = (seen >= 254) & (fit > 255) | (seen <= 1) & (fit < 0)
        if not hidden.any():
            break
        target = torch.where(hidden, fit, seen)
    fit = fit.clamp(0, 255) if clipped else fit
    return ((seen - fit) ** 2).sum() / ((seen - seen.mean(0)) ** 2).sum()


@pytest.mark.parametrize("level, count", DRAWS)
def test_similarity_unwarped(images, seed, level, count):
    """The candidate that, by the plan's maps, shows what the puzzle's own image holds there. Both are averaged over
    squares of 4x4 px: read at points, a crop that was reduced or blurred can be less like its own source than another
    scene is."""
    for image, made in draws(images, "similarity", level, count, seed):
        scores = []
        for i, canvas in enumerate(made.render()[0]):
            n = len(canvas) // 4 * 4
            y, x = np.mgrid[:n, :n].reshape(2, -1) + 0.5
            u, v, _ = canvas_to_image(made, i) @ np.stack([x, y, np.ones(n * n)])
            where = torch.tensor(np.stack([u / image.shape[1], v / image.shape[0]], -1) * 2 - 1, dtype=torch.float32)
            held = F.grid_sample(
                image.permute(2, 0, 1)[None].float(), where.view(1, n, n, 2), align_corners=False, padding_mode="border"
            )
            seen = canvas[:n, :n].permute(2, 0, 1)[None].float()
            held, seen = (F.avg_pool2d(picture, 4)[0].flatten(1).T for picture in (held, seen))
            if level >= 3:  # tones were moved along a curve, in order
                held, seen = (x.argsort().argsort()[:, None].float() for x in (held @ torch.tensor(LUMA), seen.mean(1)))
            scores.append(unlike(held, seen, clipped=level < 3))
        assert "ABCDEFGH"[int(np.argmin(scores[1:]))] == made.answers[0].value
        assert scores[0] < 0.25


@pytest.mark.parametrize("level, count", DRAWS)
def test_correspondence_unwarped(images, seed, level, count):
    """REF and the answer's ring are the same point of the image, and no other ring is near it."""
    for image, made in draws(images, "correspondence", level, count, seed):
        rings = marks(made)
        points = []
        for canvas in (0, 1):
            for y, x in rings[canvas]:
                u, v, z = canvas_to_image(made, canvas) @ (x, y, 1)
                points.append((v / z, u / z))
        away = np.linalg.norm(np.array(points[1:]) - points[0], axis=1)
        step = abs(np.linalg.det(canvas_to_image(made, 1)[:2, :2])) ** 0.5
        assert len(away) == {1: 4, 2: 4, 3: 6, 4: 8}[level]
        assert "ABCDEFGH"[int(away.argmin())] == made.answers[0].value
        assert away.min() < 1.5 * max(step, 1) < np.sort(away)[1]
        assert 0 <= min(min(p) for p in points) and all(y < image.shape[0] and x < image.shape[1] for y, x in points)


def marks(made):
    """Places (y, x in px) of the rings on each canvas, in the order of their letters."""
    found = {0: [], 1: []}
    sources = made.plan.sources_int.tolist()
    for (canvas, top, left, _, _, source, _), floats in made.plan.tiles:
        image, mip = sources[source]
        if image == ATLAS and round(floats[2] / (CELL >> mip)) == CELLS.index("ring"):
            a, _, x, _, d, y = floats[:6]
            cell = CELL >> mip
            found[canvas].append((top + (cell / 2 - y) / d, left + (cell * (CELLS.index("ring") + 0.5) - x) / a))
    return found


def unlabelled(made):
    """Of each canvas float32 [1, 1, side, side]: 0 where a label hides the picture, and near it, 1 elsewhere."""
    found = [torch.ones(1, 1, *size) for size in made.plan.sizes]
    sources = made.plan.sources_int.tolist()
    for (canvas, top, left, height, width, source, _), floats in made.plan.tiles:
        image, mip = sources[source]
        if image == ATLAS and round(floats[2] / (CELL >> mip)) != CELLS.index("ring"):
            rows, columns = slice(max(0, top - 4), top + height + 4), slice(max(0, left - 4), left + width + 4)
            found[canvas][..., rows, columns] = 0
    return found


def mostly_right(answered):
    """At least 95 % of (answer, truth): of the first 30, and where chance has more than one of those go wrong, of
    all."""
    right = count = 0
    for answer, truth in answered:
        right, count = right + (answer == truth), count + 1
        if count == 30 and right >= 0.95 * count:
            return
    assert right >= 0.95 * count, right / count


@pytest.mark.parametrize("level", (1, 2))
def test_correspondence_from_pixels(gallery, seed, level):
    """Around which lettered ring does the second view look most like the first around REF, at any turn and scale?"""
    turns = torch.deg2rad(torch.arange(-30.0, 31.0, 5.0)) if level == 2 else torch.zeros(1)
    scales = torch.exp(torch.linspace(math.log(0.6), math.log(1.7), 17))
    thetas = [s * torch.tensor([[t.cos(), -t.sin()], [t.sin(), t.cos()]]) for t in turns for s in scales]

    def answered():
        for _, made in draws(gallery, "correspondence", level, 200, seed):
            first, second = (pattern(grey(canvas), 5.0)[None, None] for canvas in made.render()[0])
            rings, shown = marks(made), unlabelled(made)
            ref, *others = rings[0] + rings[1]
            scores = [surroundings_alike(first, ref, second, other, torch.stack(thetas), shown) for other in others]
            yield "ABCDEFGH"[int(np.argmax(scores))], made.answers[0].value

    mostly_right(answered())


def surroundings_alike(first, ref, second, other, thetas, shown, n=41, reach=0.2):
    """As `alignment`, of the discs around two points (y, x in px), the second turned and scaled by each of `thetas`;
    what rings hide is left out, and what labels do (shown: `unlabelled`)."""
    side = first.shape[2]
    span = torch.linspace(-1, 1, n)
    radius = (span[:, None] ** 2 + span**2).sqrt().reshape(-1)
    ring = 24 / 64 * max(12, 0.12 * side) / (reach * side)
    base = torch.stack(torch.meshgrid(span, span, indexing="ij")[::-1], -1).reshape(-1, 2)
    views = []
    sides = (first, shown[0], ref, torch.eye(2)[None]), (second, shown[1], other, thetas)
    for picture, clear, (y, x), theta in sides:
        where = (base @ theta.transpose(1, 2)) * 2 * reach + torch.tensor([x / side * 2 - 1, y / side * 2 - 1])
        size = theta.det().sqrt()[:, None]
        seen = (where.abs() < 1).all(-1) & (radius < 1) & ((radius * size - ring).abs() > 0.1)
        where = where[:, None].float()
        both = (x.expand(len(theta), -1, -1, -1) for x in (picture, clear))
        values, clear = (F.grid_sample(x, where, align_corners=False) for x in both)
        views.append((values[:, 0, 0], (seen & (clear[:, 0, 0] > 0.99)).float()))
    (a, seen), (b, also) = views
    both = seen * also
    a, b = (v - (v * both).sum(1, keepdim=True) / both.sum(1, keepdim=True).clamp(min=1) for v in (a.expand_as(b), b))
    norm = ((a**2 * both).sum(1) * (b**2 * both).sum(1)).sqrt().clamp(min=1e-3)
    return ((a * b * both).sum(1) / norm * both.sum(1).sqrt()).max().item()


@pytest.mark.parametrize("level", (1, 2))
def test_similarity_from_pixels(gallery, seed, level):
    """Which candidate matches the reference best at any flip, scale, aspect and place?"""

    def answered():
        for _, made in draws(gallery, "similarity", level, 500, seed):
            reference, *others = made.render()[0]
            scores = [alignment(reference, other) for other in others]
            yield "ABCD"[int(np.argmax(scores))], made.answers[0].value

    mostly_right(answered())


def alignment(a, b, n=32, N=96):
    """How surely two views show the same: the correlation of their local patterns where they overlap, times the root of
    that area, over flips, scales, aspects and shifts; by FFT, [variants, N, N]."""
    fixed = pattern(F.interpolate(grey(a), (n, n), mode="bilinear", antialias=True))
    sizes, area, masks, count, enough = frames(n, N)
    source, moved = grey(b), torch.zeros(len(sizes), N, N)
    for i, (h, w) in enumerate(sizes[::2]):
        view = pattern(F.interpolate(source, (h, w), mode="bilinear", antialias=True))
        moved[2 * i, :h, :w], moved[2 * i + 1, :h, :w] = view, view.flip(1)
    xx, yy = back(masks.conj() * spectrum(fixed**2, N), N), back(spectrum(moved**2, N).conj() * area, N)
    score = back(spectrum(moved, N).conj() * spectrum(fixed, N), N)
    score = score / (xx.clamp(min=1) * yy.clamp(min=1)).sqrt() * count.sqrt()
    return score[enough].max().item()


@lru_cache
def frames(n, N):
    """What `alignment` needs of no picture: (sizes of the second view, each twice: as it is and flipped; spectra of the
    first frame and of the second ones; pixels that both cover at each shift; where those are enough)."""
    factors = [2 ** (k / 4) for k in range(-5, 6)]
    sizes = [
        (max(10, round(n * fy)), max(10, round(n * fx))) for fy in factors for fx in factors if 0.55 < fy / fx < 1.8
    ]
    sizes = [size for size in sizes for _ in range(2)]
    masks = torch.zeros(len(sizes), N, N)
    for mask, (h, w) in zip(masks, sizes):
        mask[:h, :w] = 1
    area, spectra = spectrum(torch.ones(n, n), N), spectrum(masks, N)
    count = back(spectra.conj() * area, N).round().clamp(min=1)
    return sizes, area, spectra, count, count >= 0.25 * masks.sum((1, 2)).clamp(max=n * n)[:, None, None]


def spectrum(x, N):
    return torch.fft.rfft2(x, s=(N, N))


def back(x, N):
    return torch.fft.irfft2(x, s=(N, N))


def pattern(x, sigma=2.5):
    """What differs from the surroundings, relative to how much things differ there: blind to brightness and
    contrast."""

    def blur(x, sigma):
        reach = round(3 * sigma)
        taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        taps = taps / taps.sum()
        x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "replicate"), taps.view(1, 1, 1, -1))
        return F.conv2d(F.pad(x, (0, 0, reach, reach), "replicate"), taps.view(1, 1, -1, 1))

    x = x - blur(x, sigma)
    return (x / (blur(x**2, 1.4 * sigma).clamp(min=0).sqrt() + 0.3 * x.std() + 0.5))[0, 0]
