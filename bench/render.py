"""A decoded 640x480 image becomes one 3x3 ordering puzzle as `pixel_values`: the renderer against PIL and Hugging Face, once with
tiles as PIL cuts an image into thirds, once with the very tiles that we cut. Then every puzzle where training starts, rendered
only, against the same canvases through Hugging Face's processor."""

import random

import torch
from PIL import Image
from stream import photograph
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sslr1 import ops, puzzles


def rows():
    if torch.cuda.is_available():
        yield on_gpu(256, "cuda")
        return
    spec = ops.PatchSpec()
    images = [torch.from_numpy(photograph()) for _ in range(4)]
    processor = Qwen2VLImageProcessorPil(min_pixels=spec.min_pixels, max_pixels=spec.max_pixels)
    batch = puzzles.make(images, "ordering", level=3)
    (height, width), tiles = batch.plan.sizes[0], batch.plan.tiles
    pictures = [Image.fromarray(image.numpy()) for image in images]
    corners = [(int(t[1][5]), int(t[1][2])) for t in tiles]

    def same_crops():
        found = []
        for i, picture in enumerate(pictures):
            crops = [picture.crop((x, y, x + width, y + height)) for y, x in corners[9 * i : 9 * i + 9]]
            found.append(processor(crops, return_tensors="pt")["pixel_values"])
        return found

    def thirds():
        found = []
        for picture in pictures:
            x, y = ([n * i // 3 for i in range(4)] for n in picture.size)
            crops = [picture.crop((x[c], y[r], x[c + 1], y[r + 1])) for r in range(3) for c in range(3)]
            random.shuffle(crops)
            found.append(processor(crops, return_tensors="pt")["pixel_values"])
        return found

    expected = torch.cat(same_crops())
    for name, peer, against in (
        ("cpp", thirds, "PIL: thirds of the image, which Qwen2VLImageProcessorPil resizes to whole tokens"),
        (
            "cpp",
            same_crops,
            "PIL crops of the same, legal size + Qwen2VLImageProcessorPil: bit for bit the same patches",
        ),
        ("reference", same_crops, "the same"),
    ):

        def ours(name=name):
            return puzzles.make(images, "ordering", level=3).render_patches(backend=name)

        values, _ = ours()
        assert (values - expected).abs().max() <= 1e-5
        yield {
            "what": f"4 images of 640x480 → 3x3 ordering, drawn and rendered to fp32 patches, backend {name}",
            "against": against,
            "ours": ours,
            "peer": peer,
            "goal": "15" if name == "cpp" else "",
            "bytes": len(values) * 14 * 14 * 3 + values.numel() * values.element_size(),
        }
    pool = images + [torch.from_numpy(photograph()) for _ in range(4)]
    for puzzle in puzzles.NAMES:
        batch = puzzles.make(images, puzzle, pool=pool)
        canvases = [[canvas.numpy() for canvas in row] for row in batch.render()]
        values, _ = batch.render_patches()
        assert (
            values - torch.cat([processor(row, return_tensors="pt")["pixel_values"] for row in canvases])
        ).abs().max() <= 1e-5
        yield {
            "what": f"4 {puzzle} puzzles of level {batch.levels[0]}, planned already → fp32 patches, backend cpp",
            "against": "Qwen2VLImageProcessorPil on their finished canvases",
            "ours": lambda batch=batch: batch.render_patches(),
            "peer": lambda canvases=canvases: [processor(row, return_tensors="pt") for row in canvases],
            "goal": "",
            "bytes": len(values) * 14 * 14 * 3 + values.numel() * values.element_size(),
        }


def on_gpu(count, device):
    """Quarter turns of images that lie on the device already, to bfloat16 patches."""
    spec = ops.PatchSpec(dtype=torch.bfloat16)
    images = list(torch.randint(0, 256, (count, 448, 448, 3), dtype=torch.uint8, device=device))
    plan = puzzles.make(images, "rotation", level=2, spec=spec).plan

    def render(backend="auto"):
        return ops.render_patches(images, plan, spec, backend)

    values, _ = render()
    assert torch.equal(values, render("reference")[0])
    return {
        "what": f"{count} images of 448x448 on the GPU, quarter turns, planned already → bf16 patches",
        "against": "the reference in plain PyTorch",
        "ours": render,
        "peer": lambda: render("reference"),
        "goal": "",
        "bytes": sum(image.nbytes for image in images) + values.nbytes,
        "device": device,
    }
