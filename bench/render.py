"""A decoded 640x480 image becomes one 3x3 ordering puzzle as `pixel_values`: the renderer against PIL and Hugging Face,
once with tiles as PIL cuts an image into thirds, once with the very tiles that we cut. Then every puzzle where training
starts, rendered only, against the same canvases through Hugging Face's processor. On a GPU: many images that lie there,
against the reference."""

import random
from functools import partial

import torch
from PIL import Image
from row import Row, Sides, device_of
from stream import photograph
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sslr1 import ops, puzzles

CPU_ROWS = (
    ("cpp", "thirds", "PIL: thirds of the image, which Qwen2VLImageProcessorPil resizes to whole tokens", "15"),
    (
        "cpp",
        "same_crops",
        "PIL crops of the same, legal size + Qwen2VLImageProcessorPil: bit for bit the same patches",
        "15",
    ),
    ("reference", "same_crops", "the same", ""),
)


def rows(mode):
    if mode != "cpu":
        images = 256 if mode == "cuda" else 2
        return [
            Row(
                what=f"{images} images of 448x448 on the GPU, quarter turns, planned already → bf16 patches",
                against="the reference in plain PyTorch",
                make=partial(on_gpu, images, device_of(mode)),
            )
        ]
    drawn = [
        Row(
            what=f"4 images of 640x480 → 3x3 ordering, drawn and rendered to fp32 patches, backend {backend}",
            against=against,
            goal=goal,
            make=partial(ordering, backend, peer),
        )
        for backend, peer, against, goal in CPU_ROWS
    ]
    return drawn + [
        Row(
            what=f"4 {puzzle} puzzles of level {puzzles.START_LEVEL[puzzle]}, planned already → fp32 patches, "
            "backend cpp",
            against="Qwen2VLImageProcessorPil on their finished canvases",
            make=partial(planned, puzzle),
        )
        for puzzle in puzzles.NAMES
    ]


def pictures(number):
    return [torch.from_numpy(photograph()) for _ in range(number)]


def moved(values):
    """Bytes of each patch's pixels, read, and of its values, written."""
    return len(values) * 14 * 14 * 3 + values.nbytes


def near(mine, theirs):
    assert (mine - theirs).abs().max() <= 1e-5


def ordering(backend, peer):
    spec, images = ops.PatchSpec(), pictures(4)
    processor = Qwen2VLImageProcessorPil(min_pixels=spec.min_pixels, max_pixels=spec.max_pixels)
    batch = puzzles.make(images, "ordering", level=3)
    (height, width), tiles = batch.plan.sizes[0], batch.plan.tiles
    originals = [Image.fromarray(image.numpy()) for image in images]
    corners = [(int(t[1][5]), int(t[1][2])) for t in tiles]

    def same_crops():
        found = []
        for i, picture in enumerate(originals):
            crops = [picture.crop((x, y, x + width, y + height)) for y, x in corners[9 * i : 9 * i + 9]]
            found.append(processor(crops, return_tensors="pt")["pixel_values"])
        return found

    def thirds():
        found = []
        for picture in originals:
            x, y = ([n * i // 3 for i in range(4)] for n in picture.size)
            crops = [picture.crop((x[c], y[r], x[c + 1], y[r + 1])) for r in range(3) for c in range(3)]
            random.shuffle(crops)
            found.append(processor(crops, return_tensors="pt")["pixel_values"])
        return found

    def ours():
        return puzzles.make(images, "ordering", level=3).render_patches(backend=backend)

    return Sides(
        ours=ours,
        peer={"same_crops": same_crops, "thirds": thirds}[peer],
        check=lambda mine, _: near(mine[0], torch.cat(same_crops())),
        bytes=moved(batch.render_patches()[0]),
    )


def planned(puzzle):
    spec, images = ops.PatchSpec(), pictures(4)
    processor = Qwen2VLImageProcessorPil(min_pixels=spec.min_pixels, max_pixels=spec.max_pixels)
    batch = puzzles.make(images, puzzle, pool=images + pictures(4))
    canvases = [[canvas.numpy() for canvas in row] for row in batch.render()]
    return Sides(
        ours=batch.render_patches,
        peer=lambda: [processor(row, return_tensors="pt")["pixel_values"] for row in canvases],
        check=lambda mine, theirs: near(mine[0], torch.cat(theirs)),
        bytes=moved(batch.render_patches()[0]),
    )


def on_gpu(count, device):
    """Quarter turns of images that lie on the device already, to bfloat16 patches."""
    spec = ops.PatchSpec(dtype=torch.bfloat16)
    images = list(torch.randint(0, 256, (count, 448, 448, 3), dtype=torch.uint8, device=device))
    plan = puzzles.make(images, "rotation", level=2, spec=spec).plan

    def render(backend="auto"):
        return ops.render_patches(images, plan, spec, backend)

    def check(mine, theirs):
        assert theirs is None or torch.equal(mine[0], theirs[0])

    values, _ = render()
    return Sides(
        ours=render,
        peer=lambda: render("reference"),
        check=check,
        bytes=sum(image.nbytes for image in images) + values.nbytes,
    )
