"""How a model wants its pixels: sizes of patches, bounds on canvases, the value of each byte."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sslr1.errors import UserError

PROCESSOR_MAX_PIXELS = 28 * 28 * 1280  # of an image processor whose file gives no bound, as in transformers


@dataclass(frozen=True)
class PatchSpec:
    """How a vision tower of the Qwen-VL family wants its pixels. Defaults: Qwen2.5-VL's.

    patch: side of a patch in px; merge: patches per side of one visual token; temporal: repeats of a still image;
    min_pixels, max_pixels: bounds on a canvas's area in px; dtype: of the pixel values.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384
    dtype: torch.dtype = torch.float32

    @property
    def unit(self) -> int:
        """Side in px of one visual token: canvas sides are multiples of it."""
        return self.patch * self.merge

    @classmethod
    def from_pretrained(cls, folder, **changes) -> "PatchSpec":
        """Read a Hugging Face model folder's image processor as transformers does: the `image_processor` of
        `processor_config.json` if that has one, else `preprocessor_config.json`. `changes` override fields. Raises
        UserError."""
        path, c = _processor(Path(folder))
        size = c.get("size") or {}
        if not isinstance(size, dict):
            raise UserError(f"{path}: size can't be {size!r}: take the original model's file")
        fields = {
            "patch": c.get("patch_size") or cls.patch,
            "merge": c.get("merge_size") or cls.merge,
            "temporal": c.get("temporal_patch_size") or cls.temporal,
            "mean": c.get("image_mean") or cls.mean,
            "std": c.get("image_std") or cls.std,
            "min_pixels": c.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels,
            "max_pixels": c.get("max_pixels") or size.get("longest_edge") or PROCESSOR_MAX_PIXELS,
        }
        for name, value in fields.items():
            if not _fits(name, value):
                raise UserError(f"{path}: {name} can't be {value!r}: take the original model's file")
        fields |= {name: tuple(fields[name]) for name in ("mean", "std")}
        return replace(cls(**fields), **changes)

    def square(self, side: float) -> int:
        """Side of the largest legal square canvas that is no larger than `side` px, or the smallest legal one."""
        lowest = math.ceil(math.sqrt(self.min_pixels) / self.unit) * self.unit
        highest = math.floor(math.sqrt(self.max_pixels) / self.unit) * self.unit
        if lowest > highest:
            raise ValueError(
                f"no square canvas of multiples of {self.unit} px has {self.min_pixels} to {self.max_pixels} pixels"
            )
        return min(max(int(side // self.unit) * self.unit, lowest), highest)

    def table(self) -> torch.Tensor:
        """Pixel value of each byte, float32 [3, 256]: (byte / 255 - mean) / std in the rounding order of Hugging Face's
        image processors (rescale in float64 rounded to float32, then normalise in float32)."""
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.mean, self.std))
        return torch.from_numpy((scaled - mean) / std)


def _fits(name, value) -> bool:
    """Whether a field of PatchSpec can have that value."""
    if name not in ("mean", "std"):
        return type(value) is int and value > 0
    numbers = isinstance(value, list | tuple) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    return numbers and (name == "mean" or min(value) > 0)


def _processor(folder) -> tuple[Path, dict]:
    """(file, settings) of a model folder's image processor."""
    for name, inner in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found.get(inner) if inner else found
        except (OSError, ValueError, AttributeError, RecursionError):
            found = ()
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{path} is not a JSON file of an image processor's settings: take the original model's")
        if found is not None:
            return path, found
    raise UserError(
        f"{folder / 'preprocessor_config.json'} is missing: a vision-language model folder holds its image processor's "
        "settings there, or in processor_config.json"
    )
