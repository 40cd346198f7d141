"""Rendering: every backend against the reference and Hugging Face's own processor; puzzles against their source."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sslr1 import ops, puzzles
from sslr1.ops.atlas import CELL, CELLS, atlas
from sslr1.ops.render import ATLAS, FILL, IDENTITY_COLOUR
from sslr1.puzzles.plan import Plan

BACKENDS = ["reference", "cpp"]


def random_images(draw, sizes):
    return [torch.from_numpy(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def random_plan(draw, images, tiles=25):
    """Tiles of every kind: crops, turns, scalings, warps, mips, blur, colour, alpha, points outside, overlaps."""
    plan = Plan()
    for columns in (1, 2, 3, 11):
        plan.canvas(28 * draw.integers(1, 4), 28 * columns)
    for _ in range(tiles):
        canvas = int(draw.integers(0, 4))
        H, W = plan.sizes[canvas]
        h, w = int(draw.integers(1, H + 1)), int(draw.integers(1, W + 1))
        top, left = int(draw.integers(0, H - h + 1)), int(draw.integers(0, W - w + 1))
        image = int(draw.integers(ATLAS, len(images)))
        kind = draw.integers(0, 4)
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
        elif kind == 2:
            size = 2.0 ** draw.uniform(-4, 3, 2) * draw.choice((-1, 1), 2)
            matrix = (size[0], 0, draw.uniform(-5, 40), 0, size[1], draw.uniform(-5, 40), 0, 0, 1.0)
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
            stencil=image == ATLAS or draw.random() < 0.1,
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
@pytest.mark.parametrize(
    "spec", [ops.PatchSpec(), ops.PatchSpec(patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)], ids=["14", "16"]
)
def test_patches_equal_hugging_face(draw, photographs, backend, spec):
    """In Qwen2.5-VL's settings and in Qwen3-VL's."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = photographs + random_images(
        draw, [(int(draw.integers(112, 300)), int(draw.integers(112, 300))) for _ in range(8)]
    )  # more than similarity needs: crops of two may be alike
    names = [puzzles.NAMES[i % len(puzzles.NAMES)] for i in range(len(images))]
    assert set(names) == set(puzzles.NAMES)
    for level in (1, 2, 3, 4):
        batch = puzzles.make(images, names, level=level, seed=int(draw.integers(0, 1000)), spec=spec)
        canvases = [canvas.numpy() for row in batch.render(backend) for canvas in row]
        processor = Qwen2VLImageProcessorPil(
            patch_size=spec.patch, image_mean=spec.mean, image_std=spec.std, min_pixels=1, max_pixels=10**9
        )
        expected = processor(canvases, return_tensors="pt")
        values, grid = batch.render_patches(backend=backend)
        assert torch.equal(grid, expected["image_grid_thw"])
        assert (values - expected["pixel_values"]).abs().max() <= 1e-5
        half, _ = batch.render_patches(replace(spec, dtype=torch.bfloat16), backend)
        assert torch.equal(half, expected["pixel_values"].bfloat16())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_patches_are_read_back(draw, dtype, bound):
    """Every byte, and canvases of several sizes."""
    for spec in (ops.PatchSpec(dtype=dtype), ops.PatchSpec(patch=16, mean=(0.5,) * 3, std=(0.5,) * 3, dtype=dtype)):
        images = random_images(draw, [(200, 260), (300, 180)])
        batch = puzzles.make(images, ["ordering", "inpainting"], level=2, spec=spec)
        canvases = [canvas for row in batch.render() for canvas in row]
        got = ops.unpatchify(*batch.render_patches(), spec)
        assert [c.shape for c in got] == [c.shape for c in canvases] and all(c.dtype == torch.uint8 for c in got)
        assert max(int((a.int() - b.int()).abs().max()) for a, b in zip(got, canvases)) <= bound


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_patches_are_moved_as_few_are(draw, patch, dtype):
    """From 8 MiB on they are written past the caches."""
    spec = ops.PatchSpec(patch=patch, temporal=3, dtype=dtype)
    (image,) = random_images(draw, [(21 * spec.unit, 32 * spec.unit)])
    plan = Plan()
    plan.view(plan.canvas(*image.shape[:2]), 0, (1.0, 0, 0, 0, 1.0, 0), exact=True)
    expected, got = (ops.render_patches([image], plan, spec, backend)[0] for backend in BACKENDS)
    assert got.nbytes > 8 << 20 and torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_turned_back_is_a_crop_of_the_source(draw, photographs, backend):
    for image in [*photographs, *random_images(draw, [(130, 200), (128, 128)])]:
        for seed in range(8):
            batch = puzzles.make([image], "rotation", level=2, seed=seed, spec=ops.PatchSpec(), wordings=1)
            ((canvas,),) = batch.render(backend)
            upright = canvas.rot90(batch.answers[0].value // 90)  # counter-clockwise, so it undoes clockwise turns
            side = canvas.shape[0]
            found = list(places(image, upright))
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
@pytest.mark.parametrize("level", [1, 2, 3])
def test_ordered_tiles_are_the_source(draw, photographs, backend, level):
    for image in [*photographs, *random_images(draw, [(600, 600), (500, 700)])]:
        for seed in range(6):
            batch = puzzles.make([image], "ordering", level=level, seed=seed)
            (tiles,) = batch.render(backend)
            columns = len(batch[0].sheet[0])
            h, w = tiles[0].shape[:2]
            rim_y, rim_x = round(0.03 * h), round(0.03 * w)
            order = batch.answers[0].value
            corner = find(image, tiles[order[0] - 1])
            for place, tile in enumerate(order):
                r, c = divmod(place, columns)
                y, x = corner[0] + r * (h + 2 * rim_y), corner[1] + c * (w + 2 * rim_x)
                assert torch.equal(image[y : y + h, x : x + w], tiles[tile - 1])


def places(image, tile):
    """Each (y, x) at which the tile is a crop of the image."""
    h, w = tile.shape[:2]
    first = image[: image.shape[0] - h + 1, : image.shape[1] - w + 1]
    for y, x in (first == tile[0, 0]).all(-1).nonzero().tolist():
        if torch.equal(image[y : y + h, x : x + w], tile):
            yield y, x


def find(image, tile):
    place = next(places(image, tile), None)
    assert place, "the tile is no crop of the image"
    return place


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_puzzles_and_levels_render_as_they_do_alone(photographs, backend):
    """All puzzles and levels in one plan, one call: the canvases and patches of twenty calls."""
    pool = photographs + random_images(np.random.default_rng(0), [(300, 300)] * 4)
    kinds = [(name, level) for name in puzzles.NAMES for level in puzzles.LEVELS[name]]
    images = [photographs[i % 4] for i in range(len(kinds))]
    names, levels = zip(*kinds)
    batch = puzzles.make(images, list(names), level=list(levels), pool=pool)
    values, grid = batch.render_patches(backend=backend)
    parts = []
    for i, canvases in enumerate(batch.render(backend)):
        alone = puzzles.make([images[i]], names[i], level=levels[i], index=[i], pool=pool)
        assert all(torch.equal(a, b) for a, b in zip(canvases, alone.render(backend)[0])) and len(canvases) == len(
            alone[0].marks
        )
        parts.append(alone.render_patches(backend=backend))
    assert torch.equal(values, torch.cat([v for v, _ in parts])) and torch.equal(grid, torch.cat([g for _, g in parts]))


def test_the_atlas_holds_legible_marks():
    """Every cell: a body and an outline around it, inside the cell, unlike every other cell."""
    picture = atlas()
    assert picture.shape == (CELL, CELL * len(CELLS), 3) and picture.dtype == torch.uint8
    cells = picture.view(CELL, len(CELLS), CELL, 3).permute(1, 0, 2, 3).float()
    coverage, ink = cells[..., 0], cells[..., 1]
    assert (
        (coverage >= ink).all()
        and (ink.amax((1, 2)) == 255).all()
        and (coverage.mean((1, 2)) > ink.mean((1, 2)) + 10).all()
    )
    edge = torch.cat([coverage[:, 0], coverage[:, -1], coverage[:, :, 0], coverage[:, :, -1]], 1)
    assert (edge == 0).all()
    apart = (ink[:, None] - ink[None]).abs().mean((2, 3)) + 1e3 * torch.eye(len(CELLS))
    assert apart.min() > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_stamps_show_the_mark_where_they_were_put(backend):
    image = torch.full((56, 56, 3), 200, dtype=torch.uint8)
    for size, y, x in ((20, 28, 28), (16, 3, 50), (33.5, 30.25, 20.75)):
        plan = Plan()
        plan.view(plan.canvas(56, 56), 0, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), exact=True)
        plan.stamp(0, "disc", y, x, size, (250.0, 10.0, 40.0))
        (got,) = ops.render([image], plan, backend)
        rows, columns = torch.meshgrid(torch.arange(56) + 0.5, torch.arange(56) + 0.5, indexing="ij")
        away = ((rows - y) ** 2 + (columns - x) ** 2).sqrt() / size * CELL
        assert (got[away < 17] == torch.tensor([250, 10, 40], dtype=torch.uint8)).all()  # the body
        assert (got[(away > 21.5) & (away < 22)].float().mean(-1) < 90).all()  # the outline
        assert (got[away > 27] == 200).all()


def test_ops_are_registered(draw):
    """torch.library's own checks, and compilation without a graph break."""
    images = random_images(draw, [(60, 45), (33, 64), (16, 16)])
    plan = random_plan(draw, images)
    tables = (plan.sources_int, plan.sources_float, plan.canvases, plan.tiles_int, plan.tiles_float)
    pixels = int(plan.canvases.prod(1).sum())
    values = ops.PatchSpec().table()
    whole = (images, *tables, pixels, "reference")
    patches = (images, *tables, values, pixels, 14, 2, 2, "reference")
    for op, arguments in ((torch.ops.sslr1.render, whole), (torch.ops.sslr1.render_patches, patches)):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *a: torch.ops.sslr1.render_patches(*a)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*patches), 2 * torch.ops.sslr1.render_patches(*patches)[0])
    flat = torch.ops.sslr1.render(*whole)
    assert torch.equal(flat, torch.cat([canvas.view(-1, 3) for canvas in ops.render(images, plan, "reference")]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_name_what_is_not_there_are_errors(backend):
    image = torch.zeros(40, 40, 3, dtype=torch.uint8)
    for change, words in (
        (lambda p: p.source(3), "a source names image 3; there are 1"),
        (lambda p: p.source(0, 6), "mip level 6 of an image is empty"),
        (lambda p: p.source(0, -1), "mip level -1 of an image is empty"),
    ):
        plan = Plan()
        plan.canvas(28, 28)
        plan.tile(0, 0, 0, 28, 28, change(plan), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), bilinear=True)
        with pytest.raises(ValueError, match=words):
            ops.render([image], plan, backend)
    plan = Plan()
    plan.canvas(28, 28)
    plan.tile(0, 0, 0, 28, 28, 7, (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), bilinear=True)
    with pytest.raises(ValueError, match="a tile names source 7; the plan has 0"):
        ops.render([image], plan, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(pixels=785), "don't hold 785 pixels"),
        (dict(sources_float=torch.zeros(2)), "1 and 2 sources"),
        (dict(patch=16), r"patch\*merge = 32"),
        (dict(merge=-2), "merge and temporal must be at least 1"),
    ],
)
def test_operations_refuse_tables_that_do_not_fit(backend, change, words):
    plan = Plan()
    plan.canvas(28, 28)
    plan.tile(0, 0, 0, 28, 28, plan.source(0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0), bilinear=False)
    names = ("sources_int", "sources_float", "canvases", "tiles_int", "tiles_float")
    good = dict(images=[torch.zeros(40, 40, 3, dtype=torch.uint8)], **{name: getattr(plan, name) for name in names})
    good |= dict(values=ops.PatchSpec().table(), pixels=784, patch=14, merge=2, temporal=2, backend=backend)
    torch.ops.sslr1.render_patches(**good)
    with pytest.raises(ValueError, match=words):
        torch.ops.sslr1.render_patches(**{**good, **change})


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
