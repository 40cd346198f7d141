"""The renderer's Triton kernels: interpreted against the reference, compiled for Hopper, and on a GPU."""

import math

import numpy as np
import pytest
import torch

from sslr1 import ops
from sslr1.ops.atlas import CELL, CELLS, atlas
from sslr1.ops.render import ATLAS, BILINEAR, FILL, IDENTITY_COLOUR, NEAREST, STENCIL, gaussian
from sslr1.ops.transfer import upload_together
from tests.interpreter import interpret

POISON = 0xA5


class Plan:
    """The five tables that `sslr1.ops.render` wants, row by row; the tests of kernels need no puzzles."""

    def __init__(self, sizes):
        self.canvases = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
        self.sources, self.tiles = [], []

    def tile(self, place, image, level, blur, matrix, mode, colour=IDENTITY_COLOUR, alpha=1.0):
        """place: canvas, top, left, height, width. Sources are not shared, so the kernel's host side has to."""
        self.tiles.append(((*place, len(self.sources), mode), (*map(float, matrix), *colour, alpha)))
        self.sources.append((image, level, blur))

    @property
    def sources_int(self):
        return torch.tensor([s[:2] for s in self.sources], dtype=torch.int64).view(-1, 2)

    @property
    def sources_float(self):
        return torch.tensor([s[2] for s in self.sources], dtype=torch.float32)

    @property
    def tiles_int(self):
        return torch.tensor([t[0] for t in self.tiles], dtype=torch.int64).view(-1, 7)

    @property
    def tiles_float(self):
        return torch.tensor([t[1] for t in self.tiles], dtype=torch.float32).view(-1, 22)

    @property
    def tables(self):
        return self.sources_int, self.sources_float, self.canvases, self.tiles_int, self.tiles_float


def random_place(draw, sizes):
    """A rectangle of a canvas that isn't the last, which stays empty."""
    canvas = int(draw.integers(0, len(sizes) - 1))
    H, W = sizes[canvas]
    h, w = int(draw.integers(1, H + 1)), int(draw.integers(1, W + 1))
    return canvas, int(draw.integers(0, H - h + 1)), int(draw.integers(0, W - w + 1)), h, w


def random_matrix(draw, kind):
    """A crop, a quarter turn, a similarity or a homography, each partly outside a picture of 20 px or so."""
    x, y = map(float, draw.integers(-5, 20, 2))
    if kind == 0:
        return 1, 0, x, 0, 1, y, 0, 0, 1
    if kind == 1:
        return 0, 1, x, -1, 0, y + 20, 0, 0, 1
    if kind == 2:
        a, s = draw.uniform(0, 2 * math.pi), draw.uniform(0.3, 2)
        return s * math.cos(a), -s * math.sin(a), x + 5.3, s * math.sin(a), s * math.cos(a), y + 5.7, 0, 0, 1
    return *draw.uniform(-0.5, 1.5, 3), *draw.uniform(-0.5, 1.5, 3), *draw.uniform(-0.01, 0.01, 2), draw.uniform(0.8, 1)


def random_plan(draw, sizes, images, exact):
    """Overlapping tiles of every kind. `exact`: only what the definition fixes to the bit, nearest samples as is."""
    plan = Plan(sizes)
    for i in range(10):
        level, kind = int(draw.integers(0, 3)), int(draw.integers(0, 4))
        mode = NEAREST if exact else int(draw.choice([NEAREST, BILINEAR]))
        blur = 0.0 if exact else float(draw.choice([0.0, 0.7, 2.3]))
        colour = IDENTITY_COLOUR
        if not exact and draw.random() < 0.6:
            colour = draw.normal(0, 0.6, 12) + np.array(IDENTITY_COLOUR)
            if blur:  # a blurred picture may be a level off where a sum falls between two; rows of 1 can't make it two
                colour = (colour.reshape(3, 4) / np.abs(colour.reshape(3, 4)[:, :3]).sum(1, keepdims=True)).reshape(-1)
        alpha = 1.0 if exact or draw.random() < 0.5 else draw.uniform(0, 1)
        image = int(draw.integers(0, images))
        plan.tile(random_place(draw, sizes), image, level, blur, random_matrix(draw, kind), mode, tuple(colour), alpha)
        if i % 2:  # a mark stamped on whatever is there
            place = random_place(draw, sizes)
            shift = CELL * draw.integers(0, len(CELLS)) / 2**level
            scale = CELL / 2**level / max(place[3:])
            ink = (*draw.uniform(-1, 1, 12),) if not exact else colour
            matrix = (scale, 0, shift, 0, scale, 0, 0, 0, 1)
            plan.tile(place, ATLAS, level, 0.0, matrix, mode | STENCIL, ink, alpha if i % 4 == 1 else 1.0)
    return plan


def paint(images, plan, shape, dtype, layout=None):
    """The kernel's output, which starts as poison between two guards."""
    from sslr1.kernels import render as kernel

    device = images[0].device if images else "cpu"
    size = math.prod(shape) * dtype.itemsize
    memory = torch.full((size + 512,), POISON, dtype=torch.uint8, device=device)
    out = memory[256 : 256 + size].view(dtype).view(shape)
    kernel.render(images, atlas().to(device), gaussian, plan.tables, out, layout, FILL, upload_together)
    assert (memory[:256] == POISON).all() and (memory[256 + size :] == POISON).all()
    return out


def check_plans(draw, device):
    for patch, merge, temporal in ((14, 2, 2), (16, 1, 1)):
        unit = patch * merge
        sizes = [(2 * unit, 3 * unit), (unit, unit), (unit, 2 * unit)]
        big = torch.from_numpy(draw.integers(0, 256, (3, 46, 61), dtype=np.uint8)).to(device).permute(1, 2, 0)
        images = [
            big,  # channels first in memory
            torch.from_numpy(draw.integers(0, 256, (33, 40, 3), dtype=np.uint8)).to(device)[1:, ::2],
            torch.from_numpy(draw.integers(0, 256, (17, 16, 3), dtype=np.uint8)).to(device),
        ]
        for exact in (True, False):
            plan = random_plan(draw, sizes, len(images), exact)
            pixels = sum(h * w for h, w in sizes)
            expected = torch.cat([c.view(-1, 3) for c in ops.render(images, plan, "reference")])
            got = paint(images, plan, (pixels, 3), torch.uint8)
            difference = (got.int() - expected.int()).abs()
            assert difference.max() <= (0 if exact else 1), (patch, exact)
            assert (difference > 0).float().mean() < 0.01
            if not exact:
                check_patches(images, plan, got, pixels, patch, merge, temporal)


def check_patches(images, plan, canvases, pixels, patch, merge, temporal):
    """The kernel's patches hold, bit for bit, the table's values of the bytes that it paints."""
    whole = Plan(plan.canvases.tolist())
    for i, (h, w) in enumerate(whole.canvases.tolist()):
        whole.tile((i, 0, 0, h, w), i, 0, 0.0, (1, 0, 0, 0, 1, 0, 0, 0, 1), NEAREST)
    pieces = canvases.split(whole.canvases.prod(1).tolist())
    pieces = [piece.view(h, w, 3) for piece, (h, w) in zip(pieces, whole.canvases.tolist())]
    numbers = torch.arange(768.0).view(3, 256)
    where, grid = torch.ops.sslr1.render_patches(
        pieces, *whole.tables, numbers, pixels, patch, merge, temporal, "reference"
    )
    for dtype, word in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        bits = torch.iinfo(word)
        values = torch.randint(bits.min, bits.max + 1, (3, 256)).to(word)  # NaNs and subnormals among them
        got = paint(images, plan, tuple(where.shape), dtype, (values.view(dtype), patch, merge, temporal))
        assert torch.equal(got.view(word).cpu(), values.view(-1)[where.long().cpu()])


def check_rest(draw, device):
    image = torch.from_numpy(draw.integers(0, 256, (30, 30, 3), dtype=np.uint8)).to(device)
    crop = (1, 0, 0, 0, 1, 0, 0, 0, 1)

    small = image[:9, :7]  # enlarged beyond its borders; points on the borders themselves; a division by a constant
    for matrix in ((0.31, 0, -1, 0, 0.37, -1, 0, 0, 1), (2, 0, -1, 0, 2, 0, 0, 0, 1), (1, 0, -3, 0, 1, 0, 0, 0, 0.5)):
        plan = Plan([(30, 60)])
        plan.tile((0, 0, 0, 30, 30), 0, 0, 0.0, matrix, BILINEAR)
        plan.tile((0, 0, 30, 30, 30), 0, 0, 0.0, matrix, NEAREST)
        (expected,) = ops.render([small], plan, "reference")
        difference = (paint([small], plan, (1800, 3), torch.uint8).view(30, 60, 3).int() - expected.int()).abs()
        assert difference[:, :30].max() <= 1 and not difference[:, 30:].any()

    sizes = [(0, 28), (5, 7), (28, 0)]  # canvases without pixels beside one with
    plan = Plan(sizes)
    plan.tile((1, 0, 0, 5, 7), 0, 0, 0.0, crop, NEAREST)
    assert torch.equal(paint([image], plan, (35, 3), torch.uint8).view(5, 7, 3), image[:5, :7])
    assert torch.equal(ops.render([image], plan, "triton")[1], image[:5, :7])
    assert ops.render([], Plan([])) == []
    paint([], Plan([]), (0, 3), torch.uint8)

    side = 27_000  # more than 2^31 bytes; only the corner's pages are ever touched
    huge = torch.empty(side, side, 3, dtype=torch.uint8, device=device)
    huge[-28:, -28:] = image[:28, :28]
    plan = Plan([(28, 28)])
    plan.tile((0, 0, 0, 28, 28), 0, 0, 0.0, (1, 0, side - 28, 0, 1, side - 28, 0, 0, 1), NEAREST)
    assert torch.equal(paint([huge], plan, (784, 3), torch.uint8).view(28, 28, 3), image[:28, :28])

    for number, level, source in ((1, 0, 0), (-2, 0, 0), (0, 5, 0), (0, 0, 1), (0, 0, -1)):
        plan = Plan([(28, 28)])
        plan.tile((0, 0, 0, 28, 28), number, level, 0.0, crop, NEAREST)
        ints, floats = plan.tiles[0]
        plan.tiles[0] = (*ints[:5], source, ints[6]), floats
        said = []
        for backend in ("reference", "triton"):
            with pytest.raises(ValueError) as error:
                ops.render([image], plan, backend)
            said.append(str(error.value))
        assert said[0] == said[1]
    with pytest.raises(ValueError, match="don't hold 783 pixels"):
        torch.ops.sslr1.render([image], *Plan([(28, 28)]).tables, 783, "triton")


def check_launches(monkeypatch):
    """A mixed batch takes one launch a mip level, two for all blurs, one for all canvases, and makes each picture
    once."""
    from sslr1.kernels import render as kernel

    launches = []

    class Counted:
        def __init__(self, name):
            self.name, self.launch = name, getattr(kernel, name)

        def __getitem__(self, grid):
            def run(*arguments, **options):
                launches.append((self.name, arguments[-1]))  # the number of jobs
                self.launch[grid](*arguments, **options)

            return run

    for name in ("halve", "blur", "paint"):
        monkeypatch.setattr(kernel, name, Counted(name))
    images = [torch.zeros(20, 20, 3, dtype=torch.uint8) for _ in range(3)]
    plan = Plan([(8, 8)] * 5)
    for canvas in range(5):
        for image, level, blur in ((0, 2, 0.0), (1, 1, 1.0), (2, 0, 2.0), (ATLAS, 3, 0.0), (0, 0, 0.0)):
            plan.tile((canvas, 0, 0, 8, 8), image, level, blur, (1, 0, 0, 0, 1, 0, 0, 0, 1), BILINEAR)
    paint(images, plan, (5 * 64, 3), torch.uint8)
    assert launches == [("halve", 3), ("halve", 2), ("halve", 1), ("blur", 2), ("blur", 2), ("paint", 5)]


INTERPRETED = """
import numpy as np, pytest
from tests.ops import test_render_triton as test
draw = np.random.default_rng(int(sys.argv[1]))
test.check_plans(draw, "cpu")
test.check_rest(draw, "cpu")
test.check_launches(pytest.MonkeyPatch())
"""


def test_triton_in_the_interpreter(seed):
    interpret(INTERPRETED, seed)


PAINT = dict(
    out="*u8",
    values="*u8",
    canvases="*i64",
    tiles_int="*i64",
    tiles_float="*fp32",
    sources="*i64",
    count="i32",
    **dict.fromkeys(("FILL", "PATCH", "MERGE", "TEMPORAL", "BLOCK"), "constexpr"),
)
KERNELS = [
    ("halve", dict(jobs="*i64", count="i32", BLOCK="constexpr"), {}),
    *(
        ("blur", dict(jobs="*i64", taps="*fp32", count="i32", COLUMNS="constexpr", BLOCK="constexpr"), {"COLUMNS": c})
        for c in (False, True)
    ),
    *(
        ("paint", {**PAINT, "out": word, "values": word}, dict(FILL=FILL, PATCH=patch, MERGE=2, TEMPORAL=2))
        for word, patch in (("*u8", 0), ("*i16", 14), ("*i16", 16), ("*i32", 14), ("*i32", 16))
    ),
]


@pytest.mark.parametrize("name, signature, constants", KERNELS)
def test_triton_compiles_for_hopper_without_spills(tmp_path, name, signature, constants):
    import triton
    from sslr1.kernels import render as module
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tests.hopper import assert_no_spills

    arguments = list(signature)
    constants = {(arguments.index(key),): value for key, value in {**constants, "BLOCK": module.BLOCK}.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(getattr(module, name), signature, constants, aligned)
    options = module.PAINT_OPTIONS if name == "paint" else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    assert_no_spills(cubin)


@pytest.mark.gpu
def test_on_the_gpu(draw):
    check_plans(draw, "cuda")
    check_rest(draw, "cuda")
