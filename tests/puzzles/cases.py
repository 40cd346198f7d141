"""Pictures of which it is known whether they decide a puzzle: ambiguous ones, made so that no answer is right or that
more than one is, and clear ones. All are drawn, or cut from what scikit-image ships.

A number names a case. Even ones are for setting thresholds, odd ones for telling how often they err: those are cut from
other photographs.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage import data

from sslr1 import puzzles
from sslr1.ops import PatchSpec, keys
from sslr1.puzzles import correspondence, ordering

PHOTOGRAPHS = (("astronaut", "stereo_motorcycle"), ("coffee", "chelsea"))
TEXTURES = (("grass", "brick"), ("gravel",))
SPEC = PatchSpec()


@lru_cache
def shipped(name):
    """float32 [H, W, 3]"""
    image = getattr(data, name)()
    image = image[0] if isinstance(image, tuple) else image
    return (np.stack([image] * 3, -1) if image.ndim == 2 else image[..., :3]).astype(np.float32)


def cut(rng, image, height, width, least=0.0):
    """A crop of height x width px, mirrored by chance, of an image that is reduced first, at random, so that the crop
    is at least that share of its short side."""
    short = min(image.shape[0] / height, image.shape[1] / width)
    step = rng.uniform(min(1.0, short), short) if not least else short * rng.uniform(least, 1)
    h, w = round(height * step), round(width * step)
    top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(image.shape, (h, w)))
    part = Image.fromarray(image[top : top + h, left : left + w].astype(np.uint8))
    out = np.asarray(part.resize((width, height), Image.BOX if step > 1 else Image.BILINEAR), np.float32)
    return out[:, ::-1] if rng.random() < 0.5 else out


def spectrum(rng, height, width, fall, lowest=0.0, highest=0.5, colour=0.3):
    """Noise whose amplitude falls with the frequency's power `fall`, of unit deviation: float32 [H, W, 3]. Frequencies
    are in 1/px; a share `colour` of it differs from channel to channel."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = np.maximum(frequency, 1 / max(height, width)) ** -fall
    amplitude *= (frequency >= lowest) & (frequency <= highest) & (frequency > 0)
    noise = np.fft.rfft2(rng.standard_normal((4, height, width), np.float32))
    planes = np.fft.irfft2(noise * amplitude, (height, width))
    planes /= planes.std((1, 2), keepdims=True)
    return np.stack([(1 - colour) * planes[3] + colour * plane for plane in planes[:3]], -1).astype(np.float32)


def grain(rng, image, sigma):
    """With a sensor's noise, as uint8."""
    noise = rng.normal(0, 1, image.shape) * sigma
    return (image + noise).clip(0, 255).round().astype(np.uint8)


def even(rng, height, width):
    """Nearly one colour, black by preference."""
    colour = rng.uniform(0, 12) if rng.random() < 0.5 else rng.uniform(0, 255, 3)
    return np.zeros((height, width, 3), np.float32) + colour


def texture(rng, half):
    """A sampler (height, width) of one stationary texture: independent pictures of the same stuff."""
    if rng.random() < 0.5:
        fall, lowest = rng.uniform(0, 1), rng.uniform(0.08, 0.2)
        mean, deviation, colour = rng.uniform(60, 190, 3), rng.uniform(8, 45), rng.uniform(0, 0.5)
        return lambda h, w: mean + deviation * spectrum(rng, h, w, fall, lowest, colour=colour)
    source = shipped(TEXTURES[half][int(rng.integers(0, len(TEXTURES[half])))])
    tint, step = rng.uniform(0.7, 1.1, 3), rng.uniform(1, 1.6)

    def sample(h, w):
        tall, wide = min(round(h * step), len(source)), min(round(w * step), source.shape[1])
        return cut(rng, source, h, w, max(tall / len(source), wide / source.shape[1])) * tint

    return sample


def mosaic(rng, sample, height, width, block):
    """A texture's canvas of independent blocks, so that nothing larger is in it."""
    big = sample(max(height, 4 * block), max(width, 4 * block))
    out = np.zeros((height, width, 3), np.float32)
    for y in range(0, height, block):
        for x in range(0, width, block):
            h, w = min(block, height - y), min(block, width - x)
            v, u = int(rng.integers(0, len(big) - h + 1)), int(rng.integers(0, big.shape[1] - w + 1))
            out[y : y + h, x : x + w] = big[v : v + h, u : u + w]
    return out


def photograph(rng, half, height, width, least=0.75):
    return cut(rng, shipped(PHOTOGRAPHS[half][int(rng.integers(0, 2))]), height, width, least)


def sky(rng, height, width, least, most):
    """Two colours' worth of gradient, one down and one across, as of a sky at dusk: so many 8-bit levels each."""
    y, x = np.linspace(-0.5, 0.5, height)[:, None, None], np.linspace(-0.5, 0.5, width)[None, :, None]
    down, across = (rng.choice((-1, 1)) * rng.uniform(least, most) * rng.uniform(0.6, 1, 3) for _ in range(2))
    across = across * rng.choice((-1, 1), 3)
    return (rng.uniform(115, 140, 3) + down * y + across * x).astype(np.float32)


def blurred(image, sigma):
    sides = 2 * len(image), 2 * image.shape[1]
    frequency = np.hypot(np.fft.fftfreq(sides[0])[:, None], np.fft.rfftfreq(sides[1])[None])
    keep = np.exp(-2 * (np.pi * sigma * frequency) ** 2)[..., None]
    whole = np.concatenate([image, image[::-1]])
    whole = np.concatenate([whole, whole[:, ::-1]], 1)
    out = np.fft.irfft2(np.fft.rfft2(whole, axes=(0, 1)) * keep, sides, (0, 1))
    return out[: len(image), : image.shape[1]]


def shallow(rng, image):
    """In focus around a place, and less and less further away."""
    height, width = image.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    far = np.hypot(y - height * rng.uniform(0.3, 0.7), x - width * rng.uniform(0.3, 0.7)) / min(height, width)
    share = ((far - 0.15) / 0.25).clip(0, 1)[..., None]
    return image * (1 - share) + share * blurred(image, rng.uniform(0.015, 0.04) * min(height, width))


def clear(rng, half, height, width, kind, levels=(60, 110), light=(0.3, 0.5)):
    """uint8 [H, W, 3] that shows something everywhere: a sky of so many levels, a photograph in so much light."""
    if kind == "sky":
        return grain(rng, sky(rng, height, width, *levels), rng.uniform(0.5, 2))
    if kind == "clouds":
        return grain(
            rng, rng.uniform(90, 160, 3) + 45 * spectrum(rng, height, width, 1.8, highest=0.1), rng.uniform(0.5, 3)
        )
    image = photograph(rng, half, height, width)
    if kind == "shallow focus":
        return grain(rng, shallow(rng, image), 1)
    if kind == "low light":
        return grain(rng, image * rng.uniform(*light), rng.uniform(2, 4))
    return grain(rng, image, 0)


def copied(rng, image, kind):
    """A near-copy, uint8 of the same size."""
    height, width = image.shape[:2]
    out = Image.fromarray(image)
    if kind == "shifted":
        h, w = (round(n * rng.uniform(0.95, 0.98)) for n in (height, width))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        out = out.crop((left, top, left + w, top + h)).resize((width, height), Image.BILINEAR)
    elif kind == "moved":  # another frame of a burst
        dy, dx = (round(n * rng.choice((-1, 1)) * rng.uniform(0.02, 0.05)) for n in (height, width))
        out = Image.fromarray(np.roll(image, (dy, dx), (0, 1)))
    elif kind == "brighter":
        out = Image.fromarray((image * rng.uniform(0.8, 1.2) + rng.uniform(-15, 15)).clip(0, 255).astype(np.uint8))
    elif kind == "mirrored":
        out = Image.fromarray(np.ascontiguousarray(image[:, ::-1]))
    file = io.BytesIO()
    out.save(file, "JPEG", quality=int(rng.integers(60, 96)))
    return np.asarray(Image.open(file))


@dataclass
class Case:
    """images: what is shown, and the pool after it, uint8 [H, W, 3]; grid: which one to wait for; number: where its
    puzzle's addresses begin."""

    kind: str
    name: str
    level: int
    images: list
    grid: tuple = ()
    number: int = 0

    def puzzle(self):
        """None where the pool is too small for one."""
        shown, *pool = [torch.tensor(image) for image in self.images]
        for index in range(100 * self.number, 100 * self.number + 100):
            try:
                made = puzzles.make(
                    [shown], self.name, level=self.level, index=[index], spec=SPEC, pool=pool or [shown]
                )[0]
            except puzzles.PoolError:
                return None
            if not self.grid or self.grid == (len(made.sheet), len(made.sheet[0])):
                return made
        raise AssertionError(f"no puzzle has the grid {self.grid}")

    def passes(self):
        made = self.puzzle()
        return made is not None and made.decidable


CLEAR = ("photograph", "shallow focus", "low light", "clouds", "sky")
COPIES = ("encoded", "shifted", "moved", "brighter", "mirrored")


def case(name, level, number, is_clear):
    """Case `number` of a puzzle's level."""
    rng, half = keys.generator("case", name, level, number, is_clear), number % 2
    made = BUILDERS[name](rng, half, level, number // 2, is_clear)
    made.number = number
    return made


def ordering_case(rng, half, level, turn, is_clear):
    grids = ordering.GRIDS[level]
    grid = rows, columns = grids[turn % len(grids)]
    side = 28 * int(rng.integers(4, 6))
    pitch = side + 2 * round(ordering.RIM * side)
    height, width = rows * pitch, columns * pitch
    if is_clear:
        kinds = CLEAR[: 4 if level == 4 else 5]  # recoloured tiles of a plain gradient are all alike
        kind = kinds[turn // len(grids) % len(kinds)]
        return Case(kind, "ordering", level, [clear(rng, half, height, width, kind)], grid)
    kinds = ["noise or texture", "even", "repeated", "two even", "two of a texture"]
    if 2 in grid and level < 4:
        kinds.append("mirrored")
    kind = kinds[turn // len(grids) % len(kinds)]
    places = [(y * pitch, x * pitch) for y in range(rows) for x in range(columns)]
    if kind == "noise or texture":
        sample = texture(rng, half)
        image = np.zeros((height, width, 3), np.float32)
        for y, x in places:
            image[y : y + pitch, x : x + pitch] = sample(pitch, pitch)
        sigma = 0
    elif kind == "even":
        image, sigma = even(rng, height, width), rng.uniform(0, 8)
    else:
        image, sigma = photograph(rng, half, height, width), 1.0
        (y, x), (v, u) = (places[i] for i in rng.permutation(len(places))[:2])
        a, b = (slice(y, y + pitch), slice(x, x + pitch)), (slice(v, v + pitch), slice(u, u + pitch))
        if kind == "repeated":
            image[b] = image[a]
        elif kind == "two even":
            image[a], image[b] = [even(rng, pitch, pitch)] * 2
        elif kind == "two of a texture":
            sample = texture(rng, half)
            image[a], image[b] = sample(pitch, pitch), sample(pitch, pitch)
        elif columns == 2 and (rows != 2 or rng.random() < 0.5):
            image[:, pitch:] = image[:, :pitch][:, ::-1]
        else:
            image[pitch:] = image[:pitch][::-1]
    return Case(kind, "ordering", level, [grain(rng, image, sigma)], grid)


def inpainting_case(rng, half, level, turn, is_clear):
    height, width = int(rng.integers(252, 420)), int(rng.integers(252, 420))
    others = 4 if level == 1 else 0
    if is_clear:
        kind = CLEAR[turn % 5]
        pool = [clear(rng, half, height, width, "clouds") for _ in range(others)]
        return Case(kind, "inpainting", level, [clear(rng, half, height, width, kind, (95, 115)), *pool])
    kind = ("noise", "texture", "even", "soft")[turn % 4]
    if kind == "noise":
        fall, mean, deviation, colour = (
            rng.uniform(0, 0.5),
            rng.uniform(60, 190, 3),
            rng.uniform(8, 45),
            rng.uniform(0, 0.5),
        )
        images = [mean + deviation * spectrum(rng, height, width, fall, 0.12, colour=colour) for _ in range(1 + others)]
    elif kind == "texture":
        sample = texture(rng, half)
        images = [mosaic(rng, sample, height, width, 4) for _ in range(1 + others)]
    elif kind == "even":
        images = [even(rng, height, width)] * (1 + others)
    else:  # out of focus, and hardly a difference in it
        base = even(rng, height, width) * 0.8 + 20
        images = [base + 1.5 * spectrum(rng, height, width, 2, highest=0.03) for _ in range(1 + others)]
    sigma = {"noise": 0, "texture": 0, "even": rng.uniform(0, 12), "soft": rng.uniform(0, 3)}[kind]
    return Case(kind, "inpainting", level, [grain(rng, image, sigma) for image in images])


def similarity_case(rng, half, level, turn, is_clear):
    count = 8 if level == 4 else 4
    height, width = int(rng.integers(252, 420)), int(rng.integers(252, 420))
    kinds = [CLEAR[turn % 5], *["clouds"] * (count + 2)]
    if is_clear:  # tones are matched from level 3, of which the dark has too few
        bounds = (95, 115), (0.5, 0.7) if level > 2 else (0.3, 0.5)
        images = [clear(rng, half, height, width, kind, *bounds) for kind in kinds]
        return Case(kinds[0], "similarity", level, images)
    kind = COPIES[turn // 5 % (5 if level > 1 else 4)]
    images = [clear(rng, half, height, width, each) for each in kinds[: count - 1]]
    return Case(kind, "similarity", level, [*images, copied(rng, images[0], kind)])


def rotation_case(rng, half, level, turn, is_clear):
    side = int(rng.integers(252, 420))
    if is_clear:
        kind = CLEAR[turn % 5]
        return Case(kind, "rotation", level, [clear(rng, half, side, side, kind)])
    kind = ("noise or texture", "even", "whirl")[turn % 3]
    if kind == "noise or texture":
        image, sigma = mosaic(rng, texture(rng, half), side, side, 12), 0
    elif kind == "even":
        image, sigma = even(rng, side, side), rng.uniform(0, 12)
    else:  # the same after a quarter turn
        image = photograph(rng, half, side, side)
        image, sigma = sum(np.rot90(image, quarter) for quarter in range(4)) / 4, rng.uniform(0, 5)
    return Case(kind, "rotation", level, [grain(rng, image, sigma)])


def pattern(rng, height, width, kinds, pitch):
    """`kinds` small things on an even ground, each the same in every turn, again and again in the same order: what
    surrounds one surrounds every other of its kind."""
    ground, shades = rng.uniform(40, 215, 3), rng.uniform(-1, 1, (kinds, 3))
    y, x = np.mgrid[0:height, 0:width] + rng.uniform(0, pitch, 2)[:, None, None]
    number = ((x // pitch).astype(int) + int(rng.integers(1, 4)) * (y // pitch).astype(int)) % kinds
    far = np.hypot(y % pitch - pitch / 2, x % pitch - pitch / 2)
    outer = rng.uniform(0.15, 0.3, kinds) * pitch
    inner = outer * rng.choice((0.0, 0.5), kinds)
    shades *= rng.uniform(40, 90, (kinds, 1)) / abs(shades).mean(1, keepdims=True)
    return ground + ((far < outer[number]) & (far >= inner[number]))[..., None] * shades[number]


def repeated(rng, half, height, width, pitch):
    """A small piece of a photograph again and again, each time a little brighter or darker."""
    side = round(pitch)
    piece = cut(rng, shipped(PHOTOGRAPHS[half][int(rng.integers(0, 2))]), side, side, 0.1)
    rows, columns = height // side + 1, width // side + 1
    light = rng.uniform(0.96, 1.04, (rows, columns)).repeat(side, 0).repeat(side, 1)[:height, :width]
    return np.tile(piece, (rows, columns, 1))[:height, :width] * light[..., None]


def water(rng, height, width):
    """Ripples, longer than high, lighter towards one end."""
    fall, long = rng.uniform(0, 0.7), int(rng.integers(2, 5))
    ripples = spectrum(rng, height, width // long + 2, fall, 0.1, colour=0.1)
    ripples = np.asarray(Image.fromarray(((ripples * 32) + 128).clip(0, 255).astype(np.uint8)).resize((width, height)))
    return sky(rng, height, width, 0, 30) + rng.uniform(5, 30) * (ripples.astype(np.float32) - 128) / 32


def kites(rng, height, width):
    """A sky with things in it: many-cornered, each of a shape and colours of its own."""
    image = sky(rng, height, width, 20, 80)
    pitch = 0.15 * min(height, width)
    shape = (round(height), round(width))
    for y in np.arange(pitch / 2, height, pitch):
        for x in np.arange(pitch / 2, width, pitch):
            corners = int(rng.integers(3, 6))
            angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
            at = np.array((x, y)) + rng.uniform(-0.15, 0.15, 2) * pitch
            reach = rng.uniform(0.25, 0.55, corners) * pitch
            drawn = Image.new("L", shape[::-1])
            points = at + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
            ImageDraw.Draw(drawn).polygon([tuple(point) for point in points.tolist()], 255)
            image[np.asarray(drawn) > 0] += rng.choice((-1, 1)) * rng.uniform(30, 90, 3)
    return image


def correspondence_case(rng, half, level, turn, is_clear):
    height, width = int(rng.integers(252, 420)), int(rng.integers(252, 420))
    if is_clear:
        kinds = ["photograph", "shallow focus", "low light", "sky with kites", "clouds"]
        kind = kinds[turn % (4 if level == 4 else 5)]  # a cloud, turned at will, is like another
        if kind == "sky with kites":
            image = grain(rng, kites(rng, height, width), rng.uniform(0.5, 2))
        else:
            image = clear(rng, half, height, width, kind)
        return Case(kind, "correspondence", level, [image])
    kind = ("noise or texture", "even", "soft", "sky", "water", "pattern", "repeated", "natural")[turn % 8]
    if kind == "noise or texture":
        image, sigma = mosaic(rng, texture(rng, half), height, width, 12), 0
    elif kind == "natural":
        image, sigma = texture(rng, half)(height, width), 0
    elif kind == "even":
        image, sigma = even(rng, height, width), rng.uniform(0, 12)
    elif kind == "soft":  # out of focus, and hardly a difference in it
        image = even(rng, height, width) * 0.8 + 20
        image, sigma = image + 1.5 * spectrum(rng, height, width, 2, highest=0.03), rng.uniform(0, 3)
    elif kind == "sky":
        image, sigma = sky(rng, height, width, 0, 60), rng.uniform(0, 8)
    elif kind == "water":
        image, sigma = water(rng, height, width), rng.uniform(0, 4)
    else:  # several in a mark's ring
        pitch = rng.uniform(0.05, 0.09) * correspondence.VIEW[level] * min(height, width)
        kinds, sigma = int(rng.integers(1, correspondence.POINTS[level] - 1)), rng.uniform(0.5, 4)
        drawn = kind == "pattern"
        image = pattern(rng, height, width, kinds, pitch) if drawn else repeated(rng, half, height, width, pitch)
    return Case(kind, "correspondence", level, [grain(rng, image, sigma)])


BUILDERS = {
    "rotation": rotation_case,
    "ordering": ordering_case,
    "inpainting": inpainting_case,
    "similarity": similarity_case,
    "correspondence": correspondence_case,
}
