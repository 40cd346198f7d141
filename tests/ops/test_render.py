"""Rendering: every backend against the reference and against Hugging Face's own processor; puzzles against their source pixels."""

import math

import numpy as np
import pytest
import torch

from sslr1 import ops, puzzles
from sslr1.ops.render import FILL, IDENTITY_COLOUR
from sslr1.puzzles.plan import Plan

BACKENDS = ["reference", "cpp"]


def random_images(draw, sizes):
    return [torch.from_numpy(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def random_plan(draw, images, tiles=25):
    """Tiles of every kind: crops, quarter turns, warps, mips, blur, colour, alpha, points outside the source, overlaps."""
    plan = Plan()
    for _ in range(4):
        plan.canvas(*(28 * draw.integers(1, 4, 2)))
    for _ in range(tiles):
        canvas = int(draw.integers(0, 4))
        H, W = plan.sizes[canvas]
        h, w = int(draw.integers(1, H + 1)), int(draw.integers(1, W + 1))
        top, left = int(draw.integers(0, H - h + 1)), int(draw.integers(0, W - w + 1))
        image = int(draw.integers(0, len(images)))
        kind = draw.integers(0, 3)
        source = plan.source(image, int(draw.integers(0, 3)), float(draw.choice([0.0, 0.7, 2.3])))
        if kind == 0:
            matrix = (1.0, 0, float(draw.integers(-5, 20)), 0, 1.0, float(draw.integers(-5, 20)), 0, 0, 1.0)
        elif kind == 1:
            a, s = draw.uniform(0, 2 * math.pi), draw.uniform(0.3, 2)
            matrix = (
                s * math.cos(a),
                -s * math.sin(a),
                draw.uniform(0, 30),
                s * math.sin(a),
                s * math.cos(a),
                draw.uniform(0, 30),
                0,
                0,
                1.0,
            )
        else:
            matrix = (*draw.uniform(-0.5, 1.5, 3), *draw.uniform(-0.5, 1.5, 3), *draw.uniform(-0.002, 0.002, 2), 1.0)
        colour = IDENTITY_COLOUR if draw.random() < 0.5 else tuple(draw.normal(0, 0.6, 12) + np.array(IDENTITY_COLOUR))
        alpha = 1.0 if draw.random() < 0.7 else draw.uniform(0, 1)
        plan.tile(
            canvas,
            top,
            left,
            h,
            w,
            source,
            tuple(map(float, matrix)),
            bilinear=bool(draw.integers(0, 2)),
            colour=colour,
            alpha=alpha,
        )
    return plan


def by_hand(image, matrix, h, w):
    """Nearest sampling of one tile, pixel by pixel in Python."""
    out = np.full((h, w, 3), FILL, np.uint8)
    for y in range(h):
        for x in range(w):
            u, v, z = np.array(matrix, np.float64).reshape(3, 3) @ (x + 0.5, y + 0.5, 1)
            if 0 <= u / z < image.shape[1] and 0 <= v / z < image.shape[0]:
                out[y, x] = image[int(v / z), int(u / z)]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_is_what_the_definition_says(draw, backend):
    (image,) = random_images(draw, [(23, 31)])
    for matrix in [
        (1, 0, 3, 0, 1, 2, 0, 0, 1),
        (1, 0, -7, 0, 1, 9, 0, 0, 1),
        (0, 1, 2, -1, 0, 22, 0, 0, 1),
        (1.2507, 0.5013, 0.3171, -0.2003, 0.9019, 4.2137, 0.0101, 0.0031, 1),
    ]:
        plan = Plan()
        plan.canvas(28, 28)
        plan.tile(0, 3, 5, 20, 17, plan.source(0), tuple(map(float, matrix)), bilinear=False)
        (got,) = ops.render([image], plan, backend)
        expected = np.full((28, 28, 3), FILL, np.uint8)
        expected[3:23, 5:22] = by_hand(image.numpy(), matrix, 20, 17)
        assert np.array_equal(got.numpy(), expected), matrix


def test_bilinear_hits_pixels_at_their_centres_and_means_between_them(draw):
    (image,) = random_images(draw, [(40, 40)])
    for shift, expected in (
        (0.0, image[:28, :28].float()),
        (0.5, (image[:28, :28].float() + image[:28, 1:29].float()) / 2),
    ):
        plan = Plan()
        plan.canvas(28, 28)
        plan.tile(0, 0, 0, 28, 28, plan.source(0), (1.0, 0, shift, 0, 1.0, 0, 0, 0, 1.0), bilinear=True)
        (got,) = ops.render([image], plan, "reference")
        assert torch.equal(got, (expected + 0.5).floor().to(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree(draw, backend):
    for _ in range(10):
        images = random_images(draw, [(60, 45), (33, 64), (16, 16)])
        plan = random_plan(draw, images)
        expected, got = ops.render(images, plan, "reference"), ops.render(images, plan, backend)
        for a, b in zip(expected, got):
            difference = (a.int() - b.int()).abs()
            assert (
                difference.max() <= 1 and (difference > 0).float().mean() < 0.01
            )  # last-bit rounding of a bilinear value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [14, 16])
def test_patches_equal_hugging_face(draw, photographs, backend, patch):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = photographs + random_images(
        draw, [(int(draw.integers(112, 300)), int(draw.integers(112, 300))) for _ in range(4)]
    )
    names = [puzzles.NAMES[i % len(puzzles.NAMES)] for i in range(len(images))]
    for level in (1, 2):
        spec = ops.PatchSpec(patch=patch)
        batch = puzzles.make(images, names, level=level, seed=int(draw.integers(0, 1000)), spec=spec)
        canvases = [canvas.numpy() for row in batch.render(backend) for canvas in row]
        processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=1, max_pixels=10**9)
        expected = processor(canvases, return_tensors="pt")
        values, grid = batch.render_patches(backend=backend)
        assert torch.equal(grid, expected["image_grid_thw"])
        assert (values - expected["pixel_values"]).abs().max() <= 1e-5
        half, _ = batch.render_patches(ops.PatchSpec(patch=patch, dtype=torch.bfloat16), backend)
        assert torch.equal(half, expected["pixel_values"].bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_turned_back_is_a_crop_of_the_source(draw, photographs, backend):
    for image in [*photographs, *random_images(draw, [(130, 200), (128, 128)])]:
        for seed in range(8):
            batch = puzzles.make([image], "rotation", level=2, seed=seed, spec=ops.PatchSpec(), wordings=1)
            ((canvas,),) = batch.render(backend)
            upright = canvas.rot90(batch.answers[0].value // 90)  # counter-clockwise, so it undoes clockwise turns
            side = canvas.shape[0]
            windows = image.unfold(0, side, 1).unfold(1, side, 1)
            found = [
                (y, x)
                for y in range(windows.shape[0])
                for x in range(windows.shape[1])
                if torch.equal(image[y : y + side, x : x + side], upright)
            ]
            assert found, (seed, batch.answers[0])
            turned = [
                torch.equal(image[y : y + side, x : x + side], canvas.rot90(k)) for k in range(4) for y, x in found
            ]
            assert sum(turned) == 1  # and by no other angle


@pytest.mark.parametrize("backend", BACKENDS)
def test_counter_clockwise_wording_counts_the_other_way(photographs, backend):
    seen = set()
    for seed in range(40):
        batch = puzzles.make(photographs[:1], "rotation", level=1, seed=seed)
        upright, turned = batch.render(backend)[0]
        way = "counter-clockwise" if "counter-clockwise" in batch.questions[0] else "clockwise"
        quarters = batch.answers[0].value // 90 * (1 if way == "clockwise" else -1)
        assert torch.equal(turned.rot90(quarters), upright)
        seen.add((way, batch.answers[0].value))
    assert len(seen) == 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [1, 2])
def test_ordered_tiles_are_the_source(draw, photographs, backend, level):
    for image in [*photographs, *random_images(draw, [(600, 600), (500, 700)])]:
        for seed in range(6):
            batch = puzzles.make([image], "ordering", level=level, seed=seed)
            (tiles,) = batch.render(backend)
            rows, columns = next(
                (r, c) for r in range(1, 4) for c in range(1, 4) if r * c == len(tiles) and f"{r}" and fits(batch, r, c)
            )
            h, w = tiles[0].shape[:2]
            rim_y, rim_x = round(0.03 * h), round(0.03 * w)
            order = batch.answers[0].value
            corner = find(image, tiles[order[0] - 1])
            for place, tile in enumerate(order):
                r, c = divmod(place, columns)
                y, x = corner[0] + r * (h + 2 * rim_y), corner[1] + c * (w + 2 * rim_x)
                assert torch.equal(image[y : y + h, x : x + w], tiles[tile - 1])


def fits(batch, rows, columns):
    """Whether the question is about so many rows and columns (its numbers, in this order)."""
    import re

    text = batch.questions[0].replace("<image>", "")
    text = re.sub(r"(?m)^\d+: ?$", "", text)
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    return any(numbers[i : i + 2] == [rows, columns] for i in range(len(numbers)))


def find(image, tile):
    h, w = tile.shape[:2]
    first = image[: image.shape[0] - h + 1, : image.shape[1] - w + 1]
    for y, x in (first == tile[0, 0]).all(-1).nonzero().tolist():
        if torch.equal(image[y : y + h, x : x + w], tile):
            return y, x
    raise AssertionError("the tile is no crop of the image")


@pytest.mark.parametrize("backend", BACKENDS)
def test_similarity_truth_alone_shows_the_source(photographs, backend):
    """Un-warped by the plan's own maps, level 1 views lie on the pixels of the image that the answer names."""
    for seed in range(8):
        batch = puzzles.make(photographs, "similarity", level=1, seed=seed)
        first = 0
        tiles = list(zip(batch.plan.tiles_int.tolist(), batch.plan.tiles_float.tolist()))
        sources = batch.plan.sources_int.tolist()
        for b, canvases in enumerate(batch.render(backend)):
            truth = "ABCD".index(batch.answers[b].value) + 1
            for i, canvas in enumerate(canvases):
                (number, _, _, h, w, source, _), floats = tiles[first + i]
                assert number == first + i
                a, _, x, _, d, y = floats[:6]
                level = sources[source][1]
                error = []
                for image in photographs:
                    small = torch.nn.functional.avg_pool2d(image.permute(2, 0, 1)[None].float(), 2**level)[0]
                    grid_x = ((torch.arange(w) + 0.5) * a + x) / small.shape[2] * 2 - 1
                    grid_y = ((torch.arange(h) + 0.5) * d + y) / small.shape[1] * 2 - 1
                    grid = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij")[::-1], -1)
                    view = torch.nn.functional.grid_sample(
                        small[None], grid[None], align_corners=False, padding_mode="border"
                    )[0].permute(1, 2, 0)
                    error.append((view - canvas.float()).abs().mean().item())
                assert (min(range(4), key=error.__getitem__) == b) is (i in (0, truth)), (seed, b, i, error)
                assert min(error) < 1.5
            first += len(canvases)


def test_tiles_outside_their_canvas_and_wrong_images_are_errors():
    image = torch.zeros(40, 40, 3, dtype=torch.uint8)
    plan = Plan()
    plan.canvas(28, 28)
    plan.tile(0, 10, 0, 20, 28, plan.source(0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), bilinear=False)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="does not lie inside its canvas"):
            ops.render([image], plan, backend)
    with pytest.raises(ValueError, match="uint8"):
        ops.render([image.float()], Plan())
    with pytest.raises(ValueError, match="backend"):
        ops.render([image], Plan(), "crayons")
    with pytest.raises(ValueError, match=r"patch\*merge"):
        puzzles.make([image.repeat(4, 4, 1)], "rotation").render_patches(ops.PatchSpec(patch=16))


def test_empty_batches():
    assert ops.render([], Plan()) == []
    values, grid = ops.render_patches([], Plan(), ops.PatchSpec())
    assert values.shape == (0, 1176) and grid.shape == (0, 3)
