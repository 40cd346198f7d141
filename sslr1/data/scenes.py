"""Procedural scenes as JPEG files: pictures with an up and a down, objects and texture, for the demo and the tests.

python -m sslr1.data.scenes FOLDER [--count N] [--size PX] [--seed N] [--tint]
"""

import argparse
import colorsys
import os
from pathlib import Path

import numpy as np
from PIL import Image

from sslr1.ops import keys


def scene(number: int, size: int = 128, seed: int = 0, tint: bool = False) -> np.ndarray:
    """Scene `number`: uint8 [size, size, 3]. Sky lighter than the ground, a sun, hills, houses and trees, and grain;
    with `tint` as through a filter of a hue of its own."""
    rng = keys.generator("scene", seed, number)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    horizon = rng.uniform(0.4, 0.65)
    sky = rng.uniform((150, 175, 195), (215, 225, 255))
    ground = rng.uniform((40, 55, 20), (120, 120, 75))
    img = sky + (rng.uniform(10, 40) * (y / horizon))[..., None]

    def paint(mask, colour):
        img[mask] = colour

    sun_x, sun_y, sun_r = rng.uniform(0.1, 0.9), rng.uniform(0.06, horizon - 0.2), rng.uniform(0.03, 0.08)
    paint((x - sun_x) ** 2 + (y - sun_y) ** 2 < sun_r**2, rng.uniform((240, 215, 120), (255, 250, 210)))
    for _ in range(rng.integers(0, 4)):  # clouds
        cx, cy, w = rng.uniform(0, 1), rng.uniform(0.05, horizon - 0.12), rng.uniform(0.08, 0.2)
        paint(((x - cx) / w) ** 2 + ((y - cy) / (0.3 * w)) ** 2 < 1, rng.uniform(232, 252, 3))
    for k in range(rng.integers(1, 4)):  # hills, the nearer the darker
        wave = sum(rng.uniform(0.01, 0.05) * np.sin(2 * np.pi * (f * x[0] + rng.uniform())) for f in (1, 2, 3))
        paint(y > horizon - 0.06 + 0.04 * k + wave[None], rng.uniform(70, 150, 3) * (1 - 0.15 * k))
    land = y > horizon + 0.02 * np.sin(2 * np.pi * (x * rng.uniform(0.5, 2) + rng.uniform()))
    stripes = (
        1 + 0.12 * np.sin(2 * np.pi * rng.uniform(5, 14) * np.maximum(y - horizon, 0) ** 0.7)
        if rng.random() < 0.5
        else 1.0
    )
    shade = stripes * (1.1 - 0.5 * (y - horizon))
    img[land] = (ground * shade[..., None])[land]
    for _ in range(rng.integers(2, 6)):
        base, middle = rng.uniform(horizon + 0.02, 0.95), rng.uniform(0.08, 0.92)
        reach = 0.06 + 0.22 * (base - horizon)
        if rng.random() < 0.5:  # a house
            w, h = reach * rng.uniform(0.7, 1.1), reach * rng.uniform(0.8, 1.3)
            paint((abs(x - middle) < w / 2) & (y < base) & (y > base - h), rng.uniform(90, 220, 3))
            roof = base - h
            paint(
                (y < roof) & (y > roof - 0.5 * w) & (abs(x - middle) < 0.62 * w * (1 - (roof - y) / (0.5 * w))),
                rng.uniform((110, 30, 20), (190, 80, 60)),
            )
            paint((abs(x - middle) < w / 9) & (y < base) & (y > base - 0.45 * h), rng.uniform(20, 70, 3))
        else:  # a tree
            h, r = reach * rng.uniform(1.0, 1.6), reach * rng.uniform(0.3, 0.5)
            paint(
                (abs(x - middle) < 0.12 * r + 0.004) & (y < base) & (y > base - h),
                rng.uniform((60, 35, 15), (100, 65, 40)),
            )
            paint(
                (x - middle) ** 2 + ((y - base + h) / rng.uniform(1, 1.6)) ** 2 < r**2,
                rng.uniform((15, 70, 15), (80, 140, 50)),
            )
    if tint:
        strength, hue = rng.uniform(0.85, 1), rng.uniform(0, 1)
        filtered = np.array(colorsys.hsv_to_rgb(hue, 1, 1)) * 1.6 * img.mean(2, keepdims=True)
        img += strength * (filtered - img)
    img += rng.normal(0, rng.uniform(2, 7), (size, size, 1))
    return img.clip(0, 255).astype(np.uint8)


def write_scenes(folder, count: int = 2000, size: int = 128, seed: int = 0, tint: bool = False) -> Path:
    """Write `count` scenes as JPEG files to `folder`; files that are there already are left alone."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"scene-{number:05d}.jpg"
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")  # its own: another run may be drawing them too
            Image.fromarray(scene(number, size, seed, tint)).save(partial, "JPEG", quality=92)
            os.replace(partial, path)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m sslr1.data.scenes", description="Draw procedural scenes as JPEG files."
    )
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tint", action="store_true", help="every scene in a hue of its own, which tells it from the others"
    )
    arguments = parser.parse_args()
    print(write_scenes(arguments.folder, arguments.count, arguments.size, arguments.seed, arguments.tint))
