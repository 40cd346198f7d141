"""Rendering plans: canvases painted in order with rectangular tiles, as uint8 images or as a model's pixel patches.

A plan (`sslr1.puzzles.plan.Plan`, or any object with its five tables) is tensors only:

    sources_int   int64 [Q, 2]    image (ATLAS: the atlas of glyphs), mip level (2x2 box halvings, rounded to uint8, odd
    rows dropped) sources_float float32 [Q]     Gaussian blur of that level, sigma in its pixels, 0 for none canvases
    int64 [M, 2]    height, width in pixels tiles_int     int64 [K, 7]    canvas, top, left, height, width, source, mode
    (NEAREST or BILINEAR, or with STENCIL) tiles_float   float32 [K, 22] inverse map 3x3 (9), colour map 3x4 (12), alpha
    (1)

The inverse map takes the homogeneous centre (x + 0.5, y + 0.5, 1) of a pixel of the tile, counted from the tile's own
corner, to a point of the source in its pixels, where pixel (i, j) covers [j, j+1) x [i, i+1). Nearest takes the pixel
that holds the point; bilinear interpolates between pixel centres. Points outside the source give FILL. The colour map
acts on RGB in 0..255 as `C[:, :3] @ rgb + C[:, 3]`; values are clamped to 0..255 and rounded half up; alpha mixes the
tile over what the canvas holds already. Canvases start as FILL.

A STENCIL tile takes the first channel of what it samples as coverage (times alpha / 255; none outside the source) and
the second as the grey value that the colour map turns into ink: see `sslr1.ops.atlas`.

`render` and `render_patches` are also torch.ops.sslr1.render and .render_patches, which take the tables themselves.
Three backends fill one flat buffer: this file's reference, csrc/render.cpp, kernels/triton/render.py. `unpatchify`
reads patches back.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from sslr1.ops import backends, transfer
from sslr1.ops.atlas import atlas
from sslr1.ops.memory import empty
from sslr1.ops.patch_spec import PatchSpec

FILL = 127
ATLAS = -1
NEAREST, BILINEAR, STENCIL = 0, 1, 2
IDENTITY_COLOUR = (1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0, 0)


def render(images, plan, backend="auto"):
    """Paint every canvas of `plan` from `images` (list of uint8 [H, W, 3] tensors, one device): list of M such tensors.

    backend: "reference" (plain PyTorch), "cpp" (CPU tensors, the compiled extension), "triton" (CUDA tensors, or CPU
    ones in Triton's interpreter), or "auto": the fastest that can run. Raises ValueError for images or tables that
    don't fit.
    """
    tables, pixels = _tables(plan)
    flat = torch.ops.sslr1.render(_checked(images), *tables, pixels, backend)
    sizes = tables[2].tolist()
    pieces = flat.split([h * w for h, w in sizes])
    return [piece.view(h, w, 3) for piece, (h, w) in zip(pieces, sizes)]


def render_patches(images, plan, spec: PatchSpec, backend="auto"):
    """Paint `plan` straight into the model's input.

    Returns (pixel_values [sum n, 3 * temporal * patch * patch] of spec.dtype on the images' device, image_grid_thw [M,
    3] int64 on the CPU): what Hugging Face's Qwen2-VL image processor gives for the same canvases.
    """
    tables, pixels = _tables(plan)
    values = spec.table().to(spec.dtype)
    return torch.ops.sslr1.render_patches(
        _checked(images), *tables, values, pixels, spec.patch, spec.merge, spec.temporal, backend
    )


def unpatchify(pixel_values, image_grid_thw, spec):
    """The canvases that patches were made from: a list of uint8 [H, W, 3] on the CPU, one a row of image_grid_thw.
    Exact for float32 pixel values; bfloat16 ones lie within 2 of the bytes they came from."""
    p, m = spec.patch, spec.merge
    rows = pixel_values.detach().float().cpu().split(image_grid_thw.prod(1).tolist())
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    out = []
    for values, (_, high, wide) in zip(rows, image_grid_thw.tolist()):
        first = values.view(high // m, wide // m, m, m, 3, spec.temporal, p, p)[:, :, :, :, :, 0]
        canvas = first.permute(0, 2, 5, 1, 3, 6, 4).reshape(high * p, wide * p, 3)
        out.append(((canvas * std + mean) * 255).round().clamp(0, 255).to(torch.uint8))
    return out


def patch_bytes(pixel_values, spec):
    """What of patches is not said twice: the byte of each of their values, uint8 [n, 3 * patch * patch] where they lie.
    `patches_of` gives the same patches back, bit for bit. ValueError for values that no byte has under the spec."""
    n, area = len(pixel_values), spec.patch**2
    values = transfer.upload(spec.table().to(pixel_values.dtype), pixel_values.device, "plans").float()
    shown = pixel_values.view(n, 3, spec.temporal, area).float()
    out = torch.empty(n, 3, area, dtype=torch.uint8, device=pixel_values.device)
    for channel in range(3):
        found = torch.searchsorted(values[channel], shown[:, channel, 0].contiguous()).clamp_(max=255)
        if not (values[channel][found][:, None] == shown[:, channel]).all():
            raise ValueError("pixel values that are none of this PatchSpec's: was it made for another model's patches?")
        out[:, channel] = found
    return out.view(n, -1)


def patches_of(bytes, spec, dtype):
    """pixel_values [n, 3 * temporal * patch * patch] of what `patch_bytes` gave, where that lies."""
    values = transfer.upload(spec.table().to(dtype), bytes.device, "plans")
    index = bytes.view(len(bytes), 3, spec.patch**2).long()
    out = torch.stack([values[channel][index[:, channel]] for channel in range(3)], 1)
    return out[:, :, None].expand(-1, -1, spec.temporal, -1).reshape(len(bytes), -1)


def _checked(images):
    images = list(images)
    for i, image in enumerate(images):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != torch.uint8:
            raise ValueError(f"images[{i}] must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        if image.device != images[0].device:
            raise ValueError(f"images[{i}] is on {image.device}, images[0] on {images[0].device}")
    return images


def _tables(plan):
    """The plan's five tables and the pixels of all its canvases."""
    tables = plan.sources_int, plan.sources_float, plan.canvases, plan.tiles_int, plan.tiles_float
    return tables, sum(h * w for h, w in plan.canvases.tolist())


def _check_tables(images, tables, pixels, unit):
    """Raises ValueError for what names something that isn't there: no backend looks again."""
    sources, sigmas, canvases, tiles, numbers = (table.numpy() for table in tables)
    if len(sources) != len(sigmas) or len(tiles) != len(numbers):
        raise ValueError(f"tables have {len(sources)} and {len(sigmas)} sources, {len(tiles)} and {len(numbers)} tiles")
    if (canvases < 0).any() or canvases.prod(1).sum() != pixels:
        raise ValueError(f"canvases of {canvases.tolist()} don't hold {pixels} pixels")
    bad = (canvases % unit).any(1)
    if bad.any():
        h, w = canvases[bad][0]
        raise ValueError(
            f"a canvas of {h}x{w} px is no multiple of patch*merge = {unit}: was its plan for other patches?"
        )
    bad = (sources[:, 0] < ATLAS) | (sources[:, 0] >= len(images))
    if bad.any():
        raise ValueError(f"a source names image {sources[bad][0, 0]}; there are {len(images)}")
    sizes = np.array([image.shape[:2] for image in (*images, atlas())])  # the last is number ATLAS
    bad = (sources[:, 1] < 0) | (sizes[sources[:, 0]] >> sources[:, 1:] < 1).any(1)
    if bad.any():
        raise ValueError(f"mip level {sources[bad][0, 1]} of an image is empty")
    canvas, source = tiles[:, 0], tiles[:, 5]
    for name, number, count in (("canvas", canvas, len(canvases)), ("source", source, len(sources))):
        bad = (number < 0) | (number >= count)
        if bad.any():
            raise ValueError(f"a tile names {name} {number[bad][0]}; the plan has {count}")
    if (tiles[:, 1:5] < 0).any() or (tiles[:, 3:5] > canvases[canvas] - tiles[:, 1:3]).any():
        raise ValueError("a tile does not lie inside its canvas")


def choose_backend(backend, device) -> str:
    """What `backend` means for images on `device`: "auto" is the fastest that can run. ValueError where one can't."""
    return backends.choose("render", backend, device, ("triton", "cpp"))


def _op_render(images, *rest):
    *tables, pixels, backend = rest
    out = empty(pixels, 3, dtype=torch.uint8, device=_device(images))
    _paint_all(images, tables, pixels, out, None, backend)
    return out


def _op_render_patches(images, *rest):
    *tables, values, pixels, patch, merge, temporal, backend = rest
    shape = pixels // (patch * patch), 3 * temporal * patch * patch
    out = empty(*shape, dtype=values.dtype, device=_device(images))
    _paint_all(images, tables, pixels, out, (values, patch, merge, temporal), backend)
    grid = torch.ones(len(tables[2]), 3, dtype=torch.int64)
    grid[:, 1:] = tables[2] // patch
    return out, grid


def _device(images):
    return images[0].device if images else torch.device("cpu")


def _paint_all(images, tables, pixels, out, layout, backend):
    """Fill `out`: canvases one after the other (layout None) or their patches (layout: values [3, 256], patch, merge,
    temporal)."""
    backend = choose_backend(backend, out.device)
    values, patch, merge, temporal = layout or (out, 1, 1, 1)
    if min(patch, merge, temporal) < 1:
        raise ValueError(f"patch, merge and temporal must be at least 1, got {patch}, {merge} and {temporal}")
    _check_tables(images, tables, pixels, patch * merge)
    if not out.numel():
        return
    if backend == "cpp" and layout and values.element_size() not in (2, 4):
        backend = "reference"  # float64 pixel values: only tests want them
    if backend == "triton":
        from sslr1.kernels import render as kernel

        kernel.render(images, _atlas(out.device), gaussian, tables, out, layout, FILL, transfer.upload_together)
    elif backend == "cpp":
        images = [image.contiguous() for image in images]
        backends._C.render(
            [(image.data_ptr(), image.shape[0], image.shape[1]) for image in (atlas(), *images)],
            *((table.data_ptr(), len(table)) for table in tables),
            out.data_ptr(),
            values.data_ptr(),
            values.element_size() if layout else 0,
            patch,
            merge,
            temporal,
            FILL,
            torch.get_num_threads(),
        )
    else:
        _reference(images, tables, out, layout)


def _reference(images, tables, out, layout):
    sources_int, sources_float, canvases, tiles_int, tiles_float = tables
    sources = []
    for (image, level), sigma in zip(sources_int.tolist(), sources_float.tolist()):
        picture = _atlas(out.device) if image == ATLAS else images[image]
        sources.append(_blur(mip(picture, level), sigma).contiguous())
    sizes = canvases.tolist()
    flat = out if layout is None else torch.empty(sum(h * w for h, w in sizes), 3, dtype=torch.uint8, device=out.device)
    flat.fill_(FILL)
    painted = [piece.view(h, w, 3) for piece, (h, w) in zip(flat.split([h * w for h, w in sizes]), sizes)]
    for (canvas, y, x, h, w, source, mode), numbers in zip(tiles_int.tolist(), tiles_float.tolist()):
        place = painted[canvas][y : y + h, x : x + w]
        _paint(place, sources[source], numbers[:9], numbers[9:21], numbers[21], mode)
    if layout is not None:
        values = transfer.upload(layout[0], out.device, "plans")
        torch.cat([_patchify(canvas, values, *layout[1:]) for canvas in painted], out=out)


def _fake_render(images, *rest):
    return torch.empty(rest[-2], 3, dtype=torch.uint8, device=_device(images))


def _fake_render_patches(images, *rest):
    *tables, values, pixels, patch, _, temporal, _ = rest
    shape = pixels // (patch * patch), 3 * temporal * patch * patch
    out = torch.empty(shape, dtype=values.dtype, device=_device(images))
    return out, tables[2].new_empty(len(tables[2]), 3)


_TABLES = "Tensor sources_int, Tensor sources_float, Tensor canvases, Tensor tiles_int, Tensor tiles_float"
backends.register(f"render(Tensor[] images, {_TABLES}, int pixels, str backend) -> Tensor", _op_render, _fake_render)
backends.register(
    f"render_patches(Tensor[] images, {_TABLES}, Tensor values, int pixels, int patch, int merge, int temporal, "
    "str backend) -> (Tensor, Tensor)",
    _op_render_patches,
    _fake_render_patches,
)


def _patchify(canvas, values, patch, merge, temporal):
    """uint8 [H, W, 3] -> [n, 3 * temporal * patch * patch]. Rows: merge x merge blocks; columns: c, t, y, x."""
    p, m = patch, merge
    h, w = canvas.shape[0] // (p * m), canvas.shape[1] // (p * m)
    index = canvas.long() + torch.arange(0, 768, 256, device=canvas.device)
    out = values.reshape(-1)[index].view(h, m, p, w, m, p, 3).permute(0, 3, 1, 4, 6, 2, 5)
    out = out.reshape(h * w * m * m, 3, 1, p * p).expand(-1, -1, temporal, -1)
    return out.reshape(h * w * m * m, -1)


def mip(image, level):
    """A mip level of uint8 [H, W, 3]: halved so often, by means of 2x2 pixels."""
    for _ in range(level):
        h, w = image.shape[0] // 2, image.shape[1] // 2
        box = image[: 2 * h, : 2 * w].view(h, 2, w, 2, 3).to(torch.int32).sum((1, 3))
        image = ((box + 2) // 4).to(torch.uint8)
    return image


def _blur(image, sigma):
    if sigma == 0:
        return image
    taps = _exact(transfer.upload(gaussian(sigma), image.device, "plans"))
    radius = len(taps) // 2
    x = _exact(image.permute(2, 0, 1)[:, None].float())
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), "replicate"), taps.view(1, 1, 1, -1))
    x = F.conv2d(F.pad(x, (0, 0, radius, radius), "replicate"), taps.view(1, 1, -1, 1))
    return _to_bytes(x[:, 0].permute(1, 2, 0))


@lru_cache
def _atlas(device):
    return transfer.upload(atlas(), device, "plans")


@lru_cache
def gaussian(sigma):
    """Weights of a Gaussian out to three sigma, float32 [2 * radius + 1]."""
    radius = max(1, math.ceil(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    return (taps / taps.sum()).float()


def _exact(x):
    """float32 as it is on a CPU, and in float64 on a GPU: there convolutions are cut to TF32 unless that is forbidden,
    and products where it is allowed."""
    return x.double() if x.is_cuda else x


def _to_bytes(x):
    return (x.clamp(0, 255) + 0.5).floor().to(torch.uint8)


def _paint(place, source, matrix, colour, alpha, mode):
    h, w = place.shape[:2]
    H, W = source.shape[:2]
    bilinear, stencil = mode & BILINEAR, mode & STENCIL
    matrix_is_shift = matrix[:2] == [1.0, 0.0] and matrix[3:5] == [0.0, 1.0] and matrix[6:] == [0.0, 0.0, 1.0]
    plain = tuple(colour) == IDENTITY_COLOUR and alpha == 1.0 and not stencil
    dx, dy = matrix[2], matrix[5]
    if matrix_is_shift and plain and not bilinear and dx == int(dx) and dy == int(dy):
        if 0 <= dx <= W - w and 0 <= dy <= H - h:  # an exact crop
            place.copy_(source[int(dy) : int(dy) + h, int(dx) : int(dx) + w])
            return
    x = torch.arange(w, device=place.device, dtype=torch.float32) + 0.5
    y = torch.arange(h, device=place.device, dtype=torch.float32)[:, None] + 0.5
    u = matrix[0] * x + matrix[1] * y + matrix[2]
    v = matrix[3] * x + matrix[4] * y + matrix[5]
    if matrix[6:] != [0.0, 0.0, 1.0]:
        z = matrix[6] * x + matrix[7] * y + matrix[8]
        u, v = u / z, v / z
    inside = (u >= 0) & (u < W) & (v >= 0) & (v < H)
    flat = source.reshape(-1, 3)

    def at(row, column):
        row, column = row.long().clamp(0, H - 1), column.long().clamp(0, W - 1)
        return flat.index_select(0, (row * W + column).reshape(-1)).view(h, w, 3).float()

    if bilinear:
        u, v = u - 0.5, v - 0.5
        left, top = u.floor(), v.floor()
        a, b = (u - left)[..., None], (v - top)[..., None]
        value = (at(top, left) * (1 - a) + at(top, left + 1) * a) * (1 - b) + (
            at(top + 1, left) * (1 - a) + at(top + 1, left + 1) * a
        ) * b
    else:
        value = at(v.floor(), u.floor())
    if stencil:
        alpha = torch.where(inside, value[..., 0], 0.0)[..., None] * (alpha / 255)
        value = value[..., 1:2].expand(-1, -1, 3)
    else:
        value = torch.where(inside[..., None], value, float(FILL))
    if tuple(colour) != IDENTITY_COLOUR:
        matrix34 = _exact(transfer.upload(torch.tensor(colour), place.device, "plans")).view(3, 4)
        value = (_exact(value) @ matrix34[:, :3].T + matrix34[:, 3]).clamp(0, 255)
    if stencil or alpha != 1.0:
        value = alpha * value + (1 - alpha) * place.float()
    place.copy_(_to_bytes(value))
