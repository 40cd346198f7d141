"""Paints a batch's plan on the GPU, straight into the model's patches; `sslr1.ops.render` says what the tables mean.

Launches, however many images there are and however mixed the puzzles: one a mip level in use, two if anything is
blurred (along rows, along columns), one that paints and writes all canvases; before them one copy of all tables to the
device.

Bytes moved: halve reads four bytes for each it writes. Blur reads 1 and writes 4 along rows, reads 4 and writes 1 along
columns, for each byte of the picture; the other taps hit in cache. Paint reads 3 bytes a pixel under each tile
(nearest) or 12 (bilinear, mostly from cache), 160 for each tile that a block meets and 32 for each that it doesn't, and
writes every output value once: 3 bytes a pixel or 3 * temporal * element size. What a canvas holds between tiles stays
in registers.
"""

import torch

import triton
import triton.language as tl

BLOCK = 512  # pixels (paint) or bytes (halve, blur) a program
# Two pixels a thread take 62 registers, four over 100. Fused, maps would round unlike the reference's: other pixels.
PAINT_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def locate(jobs, stride, count, block):
    """Address of the row of `jobs` that a block belongs to: the last whose first block, column 0, is not after it.

    Rows without blocks start where the next one does, so they are never the last.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(jobs + middle * stride) > block
        high = tl.where(after, middle, high)
        low = tl.where(after, low, middle)
    return jobs + low * stride


@triton.jit
def unfold(start, lane, width):
    """Row and column, int32 blocks, of elements `start` (a 64-bit scalar) + `lane` (a block) of rows of `width`.

    A picture may hold more than 2^31 elements; all the same only the one division that the lanes share takes 64 bits.
    """
    at = (start % width).to(tl.int32) + lane
    row = (start // width).to(tl.int32)
    width = width.to(tl.int32)
    return row + at // width, at % width


@triton.jit(do_not_specialize=["count"])
def halve(jobs, count, BLOCK: tl.constexpr):
    """jobs int64 [count, 6]: first block, address and width of a picture, address, height and width of its half."""
    block = tl.program_id(0).to(tl.int64)
    job = locate(jobs, 6, count, block)
    start = (block - tl.load(job)) * BLOCK
    stride = 3 * tl.load(job + 2)
    lane = tl.arange(0, BLOCK)
    y, x = unfold(start, lane, 3 * tl.load(job + 5))
    mask = y < tl.load(job + 4)
    four = tl.load(job + 1).to(tl.pointer_type(tl.uint8)) + 2 * y.to(tl.int64) * stride + (x + x // 3 * 3)
    total = tl.load(four, mask=mask, other=0).to(tl.int32) + tl.load(four + 3, mask=mask, other=0)
    total += tl.load(four + stride, mask=mask, other=0).to(tl.int32) + tl.load(four + stride + 3, mask=mask, other=0)
    to = tl.load(job + 3).to(tl.pointer_type(tl.uint8)) + start + lane
    tl.store(to, ((total + 2) // 4).to(tl.uint8), mask=mask)


@triton.jit
def to_bytes(x):
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0) + 0.5)


@triton.jit(do_not_specialize=["count"])
def blur(jobs, taps, count, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One direction of a separable blur, borders repeated: bytes to floats along rows, floats to bytes along columns.

    jobs int64 [count, 8]: first block, addresses of the picture, the floats between the passes and the blurred picture,
    height, width, first of its 2 * radius + 1 taps, radius. taps float32.
    """
    block = tl.program_id(0).to(tl.int64)
    job = locate(jobs, 8, count, block)
    start = (block - tl.load(job)) * BLOCK
    height, width = tl.load(job + 4).to(tl.int32), tl.load(job + 5).to(tl.int32)
    stride = 3 * tl.load(job + 5)
    lane = tl.arange(0, BLOCK)
    y, x = unfold(start, lane, stride)
    mask = y < height
    taps += tl.load(job + 6)
    radius = tl.load(job + 7).to(tl.int32)
    between = tl.load(job + 2).to(tl.pointer_type(tl.float32))
    total = tl.zeros([BLOCK], tl.float32)
    if COLUMNS:
        for k in range(-radius, radius + 1):
            row = tl.minimum(tl.maximum(y + k, 0), height - 1)
            total += tl.load(taps + radius + k) * tl.load(between + row.to(tl.int64) * stride + x, mask=mask, other=0)
        to = tl.load(job + 3).to(tl.pointer_type(tl.uint8)) + start + lane
        tl.store(to, to_bytes(total).to(tl.uint8), mask=mask)
    else:
        picture = tl.load(job + 1).to(tl.pointer_type(tl.uint8)) + y.to(tl.int64) * stride + x % 3
        for k in range(-radius, radius + 1):
            column = tl.minimum(tl.maximum(x // 3 + k, 0), width - 1)
            total += tl.load(taps + radius + k) * tl.load(picture + 3 * column, mask=mask, other=0).to(tl.float32)
        tl.store(between + start + lane, total, mask=mask)


@triton.jit
def fetch(picture, y, x, width, mask):
    """RGB of pixels of a picture, three float32 blocks; zeros where the mask is off."""
    at = picture + (y.to(tl.int64) * width + x) * 3
    red = tl.load(at, mask=mask, other=0).to(tl.float32)
    green = tl.load(at + 1, mask=mask, other=0).to(tl.float32)
    return red, green, tl.load(at + 2, mask=mask, other=0).to(tl.float32)


@triton.jit
def blend(a, b, c, d, x, y):
    return (a * (1 - x) + b * x) * (1 - y) + (c * (1 - x) + d * x) * y


@triton.jit
def mix(colour, red, green, blue, weight, below, within):
    """One channel after a tile: its row of the colour map, `weight` over what is below, rounded to a byte."""
    value = tl.load(colour) * red + tl.load(colour + 1) * green + tl.load(colour + 2) * blue + tl.load(colour + 3)
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    return tl.where(within, to_bytes(weight * value + (1 - weight) * below), below)


@triton.jit(do_not_specialize=["count"])
def paint(
    out,
    values,
    canvases,
    tiles_int,
    tiles_float,
    sources,
    count,
    FILL: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of pixels of one canvas: all its tiles in order, then the block's bytes or the values they stand for.

    canvases int64 [count, 6]: first block, height, width, pixels of the canvases before it, first and last + 1 tile.
    tiles_int int64 [K, 7] and tiles_float float32 [K, 22] as in the plan, by canvas, except that the alpha of a stencil
    is that of one unit of coverage. sources int64 [Q, 3]: address, height, width.

    Blocks follow the order in which pixels are written (PATCH 0: row by row; otherwise patch by patch), so that stores
    are as contiguous as the layout lets them be and no lane idles, whatever the patch size.
    """
    block = tl.program_id(0).to(tl.int64)
    job = locate(canvases, 6, count, block)
    start = (block - tl.load(job)) * BLOCK
    height = tl.load(job + 1).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    to = tl.load(job + 3) + start + lane  # the pixel's number among those of the batch, in the order of writing
    if PATCH:
        UNIT: tl.constexpr = PATCH * MERGE
        AREA: tl.constexpr = PATCH * PATCH
        at = (start % (UNIT * UNIT)).to(tl.int32) + lane
        token_y, token_x = unfold(start // (UNIT * UNIT), at // (UNIT * UNIT), tl.load(job + 2) // UNIT)
        patch = at % (UNIT * UNIT) // AREA
        within_patch = at % AREA  # a unit is a whole number of patches
        y = token_y * UNIT + patch // MERGE * PATCH + within_patch // PATCH
        x = token_x * UNIT + patch % MERGE * PATCH + within_patch % PATCH
    else:
        y, x = unfold(start, lane, tl.load(job + 2))
    mask = y < height
    first_y, last_y, first_x, last_x = tl.min(y, 0), tl.max(y, 0), tl.min(x, 0), tl.max(x, 0)

    red = tl.full([BLOCK], FILL, tl.float32)
    green = red
    blue = red
    for tile in range(tl.load(job + 4), tl.load(job + 5)):
        t = tiles_int + tile * 7
        top, left = tl.load(t + 1).to(tl.int32), tl.load(t + 2).to(tl.int32)
        bottom, right = top + tl.load(t + 3).to(tl.int32), left + tl.load(t + 4).to(tl.int32)
        if (top <= last_y) & (bottom > first_y) & (left <= last_x) & (right > first_x):
            m = tiles_float + tile * 22
            source = sources + tl.load(t + 5) * 3
            mode = tl.load(t + 6)
            picture = tl.load(source).to(tl.pointer_type(tl.uint8))
            H, W = tl.load(source + 1).to(tl.int32), tl.load(source + 2).to(tl.int32)
            within = mask & (y >= top) & (y < bottom) & (x >= left) & (x < right)
            px, py = (x - left).to(tl.float32) + 0.5, (y - top).to(tl.float32) + 0.5
            u = tl.load(m) * px + tl.load(m + 1) * py + tl.load(m + 2)
            v = tl.load(m + 3) * px + tl.load(m + 4) * py + tl.load(m + 5)
            p, q, r = tl.load(m + 6), tl.load(m + 7), tl.load(m + 8)
            if (p != 0) | (q != 0) | (r != 1):
                z = p * px + q * py + r
                u, v = tl.div_rn(u, z), tl.div_rn(v, z)  # `/` is off by up to two last bits, so by a pixel
            inside = within & (u >= 0) & (u < W.to(tl.float32)) & (v >= 0) & (v < H.to(tl.float32))
            u, v = tl.where(inside, u, 0.0), tl.where(inside, v, 0.0)  # from here on numbers are small and finite
            if (mode & 1) != 0:
                left_of, above = tl.floor(u - 0.5), tl.floor(v - 0.5)
                a, b = u - 0.5 - left_of, v - 0.5 - above
                x0, x1 = tl.maximum(left_of.to(tl.int32), 0), tl.minimum(left_of.to(tl.int32) + 1, W - 1)
                y0, y1 = tl.maximum(above.to(tl.int32), 0), tl.minimum(above.to(tl.int32) + 1, H - 1)
                r00, g00, b00 = fetch(picture, y0, x0, W, inside)
                r01, g01, b01 = fetch(picture, y0, x1, W, inside)
                r10, g10, b10 = fetch(picture, y1, x0, W, inside)
                r11, g11, b11 = fetch(picture, y1, x1, W, inside)
                new_red = blend(r00, r01, r10, r11, a, b)
                new_green = blend(g00, g01, g10, g11, a, b)
                new_blue = blend(b00, b01, b10, b11, a, b)
            else:
                new_red, new_green, new_blue = fetch(picture, v.to(tl.int32), u.to(tl.int32), W, inside)
            stencil = (mode & 2) != 0
            alpha = tl.load(m + 21)
            weight = tl.where(
                stencil, new_red * alpha, alpha
            )  # outside zeros were fetched: a stencil covers nothing there
            new_red = tl.where(inside, tl.where(stencil, new_green, new_red), FILL)
            new_blue = tl.where(inside, tl.where(stencil, new_green, new_blue), FILL)
            new_green = tl.where(inside, new_green, FILL)
            red = mix(m + 9, new_red, new_green, new_blue, weight, red, within)
            green = mix(m + 13, new_red, new_green, new_blue, weight, green, within)
            blue = mix(m + 17, new_red, new_green, new_blue, weight, blue, within)

    if PATCH:
        out += (to - within_patch) * (3 * TEMPORAL) + within_patch
        red = tl.load(values + red.to(tl.int32))
        green = tl.load(values + 256 + green.to(tl.int32))
        blue = tl.load(values + 512 + blue.to(tl.int32))
        for t in tl.static_range(TEMPORAL):
            tl.store(out + t * AREA, red, mask=mask)
            tl.store(out + (TEMPORAL + t) * AREA, green, mask=mask)
            tl.store(out + (2 * TEMPORAL + t) * AREA, blue, mask=mask)
    else:
        tl.store(out + to * 3, red.to(tl.uint8), mask=mask)
        tl.store(out + to * 3 + 1, green.to(tl.uint8), mask=mask)
        tl.store(out + to * 3 + 2, blue.to(tl.uint8), mask=mask)


def render(images, atlas, gaussian, tables, out, layout, fill, upload):
    """Fill `out` with the canvases of a plan.

    images: list of uint8 [H, W, 3] on out's device; atlas: uint8 [h, w, 3] there too, image number -1;
    gaussian(sigma): taps float32 [2 * radius + 1]; tables: the plan's five, on the CPU, which name nothing that isn't
    there; out: uint8 [pixels, 3], canvases one after the other (layout None), or [rows, 3 * temporal * patch^2] with
    layout (values [3, 256] of out's dtype on the CPU, patch, merge, temporal); fill: the byte where nothing is;
    upload(tensors, device, what for): them there, by one copy, each at a multiple of 16 bytes, contiguous.
    """
    sources_int, sources_float, canvases, tiles_int, tiles_float = tables
    values, patch, merge, temporal = layout or (torch.empty(0, dtype=torch.uint8), 0, 1, 1)
    pixels = canvases.prod(1)
    kept, sources, halves, blurs, taps = _pictures(images, atlas, gaussian, sources_int, sources_float, out.device)
    order = tiles_int[:, 0].argsort(stable=True)
    tiles_int, tiles_float = tiles_int[order], tiles_float[order]
    stencil = tiles_int[:, 6] & 2 != 0
    tiles_float[stencil, 21] = (tiles_float[stencil, 21].double() / 255).float()
    ends = torch.searchsorted(tiles_int[:, 0].contiguous(), torch.arange(len(canvases) + 1))
    places = torch.stack([*canvases.T, pixels.cumsum(0) - pixels, ends[:-1], ends[1:]], 1)

    places, blocks = _jobs(places, pixels)
    halves = [_jobs(jobs, 3 * jobs[:, 3] * jobs[:, 4]) for jobs in halves]
    blurs, blur_blocks = _jobs(blurs, 3 * blurs[:, 3] * blurs[:, 4])
    all_tables = [places, tiles_int, tiles_float, sources, values, blurs, taps, *(jobs for jobs, _ in halves)]
    places, tiles_int, tiles_float, sources, values, blurs, taps, *jobs_of_level = upload(
        all_tables, out.device, "plans"
    )
    with torch.cuda.device_of(out):  # Triton launches on the current device; does nothing for CPU tensors
        for jobs, (_, level_blocks) in zip(jobs_of_level, halves):
            halve[(level_blocks,)](jobs, len(jobs), BLOCK=BLOCK)
        if blur_blocks:
            blur[(blur_blocks,)](blurs, taps, len(blurs), COLUMNS=False, BLOCK=BLOCK)
            blur[(blur_blocks,)](blurs, taps, len(blurs), COLUMNS=True, BLOCK=BLOCK)
        if patch:  # values are moved, never computed with: as integers they arrive bit for bit
            out, values = (x.view(WORDS[x.element_size()]) for x in (out, values))
        if blocks:
            options = dict(FILL=fill, PATCH=patch, MERGE=merge, TEMPORAL=temporal, BLOCK=BLOCK, **PAINT_OPTIONS)
            paint[(blocks,)](out, values, places, tiles_int, tiles_float, sources, len(places), **options)


def _pictures(images, atlas, gaussian, sources_int, sources_float, device):
    """Where every source lies and what makes those that are no image as it is; each picture is made once.

    Returns (tensors that must live until the launches, sources int64 [Q, 3]: address, height, width; jobs of `halve`
    for each level and of `blur`, both without their first column; taps float32).
    """
    used, made, wanted, total = {}, {}, [], 0  # made: (image, level, sigma) -> (made from, height, width, offset)
    for (image, level), sigma in zip(sources_int.tolist(), sources_float.tolist()):
        if image not in used:
            used[image] = atlas if image == -1 else images[image].contiguous()
        h, w = used[image].shape[:2]
        if max(h, w) >= 1 << 24:
            raise ValueError(f"an image of {h}x{w} px has a side past 2^24, where float32 can't name its pixels")
        steps = [((image, halved, 0.0), h >> halved, w >> halved) for halved in range(1, level + 1)]
        if sigma != 0:
            steps.append(((image, level, sigma), h >> level, w >> level))
        key = (image, 0, 0.0)
        for step, h, w in steps:
            if step not in made:
                made[step] = key, h, w, total
                size = 3 * h * w * (5 if step[2] else 1)  # a blur has the floats between its passes in front
                total += -(-size // 16) * 16  # 16 keeps those aligned
            key = step
        wanted.append(key)

    buffer = torch.empty(total, dtype=torch.uint8, device=device)
    where = {(image, 0, 0.0): (picture.data_ptr(), *picture.shape[:2]) for image, picture in used.items()}
    halves, blurs, taps, first = {}, [], [torch.empty(0)], 0
    for key, (parent, h, w, offset) in made.items():  # makers first, and levels from 1 up
        (source, _, width), address = where[parent], buffer.data_ptr() + offset
        if key[2]:
            taps.append(gaussian(key[2]))
            between, address = address, address + 12 * h * w
            blurs.append((source, between, address, h, w, first, len(taps[-1]) // 2))
            first += len(taps[-1])
        else:
            halves.setdefault(key[1], []).append((source, width, address, h, w))
        where[key] = address, h, w
    halves = [torch.tensor(jobs) for jobs in halves.values()]
    blurs = torch.tensor(blurs, dtype=torch.int64).view(-1, 7)
    sources = torch.tensor([where[key] for key in wanted], dtype=torch.int64).view(-1, 3)
    return (used, buffer), sources, halves, blurs, torch.cat(taps)


def _jobs(rows, sizes):
    """int64 [n, c], elements of each int64 [n] -> (int64 [n, 1 + c], the first block of each in front; all blocks)."""
    blocks = (sizes + BLOCK - 1) // BLOCK
    return torch.cat([(blocks.cumsum(0) - blocks)[:, None], rows], 1), int(blocks.sum())
