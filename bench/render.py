"""A decoded 640x480 image becomes one 2x3 ordering puzzle as `pixel_values`: the renderer against PIL and Hugging Face."""

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sslr1 import ops, puzzles


def rows():
    spec = ops.PatchSpec()
    image = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8)
    seed = next(
        s
        for s in range(1000)
        if puzzles.make([image], "ordering", level=2, seed=s).canvas_counts == [6]
        and puzzles.make([image], "ordering", level=2, seed=s).plan.sizes[0][0] > 200
    )
    batch = puzzles.make([image], "ordering", level=2, seed=seed)
    (height, width), tiles = batch.plan.sizes[0], batch.plan.tiles
    corners = [(int(t[1][5]), int(t[1][2])) for t in tiles]
    processor = Qwen2VLImageProcessorPil(min_pixels=spec.min_pixels, max_pixels=spec.max_pixels)
    picture = Image.fromarray(image.numpy())

    def peer():
        crops = [picture.crop((x, y, x + width, y + height)) for y, x in corners]
        return processor(crops, return_tensors="pt")

    def backend(name):
        return lambda: puzzles.make([image], "ordering", level=2, seed=seed).render_patches(backend=name)

    expected = peer()["pixel_values"]
    for name in ("reference", "cpp"):
        values, _ = backend(name)()
        assert (values - expected).abs().max() <= 1e-5
        yield {
            "what": f"640x480 image → 2x3 ordering, drawn and rendered to patches, backend {name}",
            "against": "PIL crops + Qwen2VLImageProcessorPil",
            "ours": backend(name),
            "peer": peer,
            "goal": "15 (at 3x3)",
            "bytes": 2 * np.prod([6, height, width, 3])
            + values.numel() * values.element_size()
            + 6 * height * width * 3,
        }
