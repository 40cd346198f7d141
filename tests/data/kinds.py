"""Image files of every kind, and ways to spoil them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from sslr1.data.decode import formats


def encoded(image, kind="JPEG", **options) -> bytes:
    """image: a PIL image or an array."""
    out = io.BytesIO()
    image = image.copy() if isinstance(image, Image.Image) else Image.fromarray(image)  # saving leaves options behind
    image.save(out, kind, **options)
    return out.getvalue()


def png(array, colour_type, depth=16, clear=()) -> bytes:
    """A PNG file that Pillow can't write, of an array of values of `depth` bits. colour_type: 0 grey, 2 RGB, 4 grey
    with alpha, 6 RGBA. clear: the transparent colour, if any."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    if depth < 8:
        array = np.packbits(np.unpackbits(array[..., None], -1)[..., 8 - depth :].reshape(height, -1), 1)
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in array)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    extra = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *map(int, clear))) if len(clear) else b""
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def see_through(array) -> dict:
    """{name: (file, what is to be seen of it)}: its upper half is transparent, with other colours hidden there."""
    height = len(array) // 2
    hidden, seen, grey = array.copy(), array.copy(), np.asarray(Image.fromarray(array).convert("L")).copy()
    hidden[:height, ::2], hidden[:height, 1::2], seen[:height] = (0, 90, 255), (17, 0, 3), 255
    alpha = np.full(grey.shape, 255, np.uint8)
    alpha[:height] = 0
    rgba = Image.fromarray(np.dstack([hidden, alpha]))
    hidden_grey, seen_grey = grey.copy(), grey.copy()
    hidden_grey[:height, ::2], seen_grey[:height] = 9, 255
    la = Image.fromarray(np.dstack([hidden_grey, alpha]))
    greys = np.stack([seen_grey] * 3, -1)
    wide = hidden.astype(np.uint16) * 256 + 5
    files = {
        "PNG, RGBA": (encoded(rgba, "PNG"), seen),
        "PNG, LA": (encoded(la, "PNG"), greys),
        "PNG, RGBA of 16 bits": (png(np.dstack([wide, alpha.astype(np.uint16) * 257]), 6), seen),
        "PNG, LA of 16 bits": (png(np.asarray(la).astype(np.uint16) * 257, 4), greys),
        "WebP": (encoded(rgba, "WEBP", lossless=True, exact=True), seen),
        "TIFF, RGBA": (encoded(rgba, "TIFF"), seen),
        "TIFF, LA": (encoded(la, "TIFF"), greys),
    }
    if "AVIF" in formats():
        files["AVIF"] = (encoded(rgba, "AVIF", quality=100, subsampling="4:4:4"), seen)
    palette = Image.fromarray(array).quantize(60)
    painted, index = np.asarray(palette.convert("RGB")).copy(), np.asarray(palette).copy()
    index[:height], painted[:height] = 61, 255
    palette = Image.fromarray(index).copy()
    palette.putpalette(Image.fromarray(array).quantize(60).getpalette()[: 3 * 60] + [1, 2, 3] * 4)
    files["PNG, palette, one transparent"] = (encoded(palette, "PNG", transparency=61), painted)
    files["PNG, palette, alpha of each"] = (encoded(palette, "PNG", transparency=b"\xff" * 61 + b"\0"), painted)
    files["GIF"] = (encoded(palette, "GIF", transparency=61), painted)
    key = np.array([200, 3, 77])
    keyed = array.copy()
    keyed[:height] = key
    files["PNG, one transparent colour"] = (png(keyed, 2, 8, key), seen)
    files["PNG, one transparent colour of 16 bits"] = (png(keyed.astype(np.uint16) * 257, 2, 16, key * 257), seen)
    for depth in (1, 2, 4, 8, 16):
        most = 2**depth - 1
        levels = np.round(grey / 255 * (most - 1)).astype(np.uint16)  # the brightest one is left for the key
        levels[:height] = most
        shown = (levels >> 8 if depth == 16 else levels * (255 // most)).astype(np.uint8)
        shown[:height] = 255
        file = png(levels if depth == 16 else levels.astype(np.uint8), 0, depth, [most])
        files[f"PNG, grey of {depth} bits, one transparent"] = (file, np.stack([shown] * 3, -1))
        levels[:height] = 0  # and the darkest one, in which a forgotten transparency shows
        levels[height:] = np.maximum(levels[height:], 1)
        shown = (levels >> 8 if depth == 16 else levels * (255 // most)).astype(np.uint8)
        shown[:height] = 255
        file = png(levels if depth == 16 else levels.astype(np.uint8), 0, depth, [0])
        files[f"PNG, grey of {depth} bits, black transparent"] = (file, np.stack([shown] * 3, -1))
    return files


def exif_data() -> dict:
    """{name: (EXIF data in any state, the orientation that it says)}."""

    def tiff(*entries, order="<", count=None, start=8):
        rows = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
        head = b"II*\0" if order == "<" else b"MM\0*"
        return b"Exif\0\0" + head + struct.pack(order + "IH", start, len(entries) if count is None else count) + rows

    def turn(value, kind=3, n=1, order="<"):
        return 0x0112, kind, n, struct.pack(order + ("I" if kind == 4 else "Hxx"), value)

    make = 0x010F, 2, 4, b"abc\0"
    end = bytes(4)
    return {
        "whole": (tiff(make, turn(6)) + end, 6),
        "big-endian": (tiff(turn(8, order=">"), order=">") + end, 8),
        "a long number": (tiff(turn(3, kind=4)) + end, 3),
        "no end": (tiff(make, turn(6)), 6),
        "more entries claimed": (tiff(make, turn(6), count=9), 6),
        "a great many claimed": (tiff(turn(5), count=65535) + end, 5),
        "cut in the entry": (tiff(make, turn(6))[:-4], 1),
        "cut before it": (tiff(make, turn(6))[:-14], 1),
        "another entry's value far outside": (tiff((0x010F, 2, 999, b"\xff\xff\xff\x7f"), turn(7)) + end, 7),
        "0": (tiff(turn(0)) + end, 1),
        "9": (tiff(turn(9)) + end, 1),
        "text": (tiff(turn(6, kind=2)) + end, 1),
        "two values": (tiff(turn(6, n=2)) + end, 1),
        "said twice": (tiff(turn(6), turn(3)) + end, 6),
        "no byte order": (b"Exif\0\0XX*\0" + bytes(40), 1),
        "its directory far outside": (tiff(turn(6), start=9999), 1),
        "its directory in its header": (tiff(turn(6), start=0), 1),
        "nothing": (b"Exif\0\0", 1),
        "not EXIF": (b"Exif\0\0" + b"\xff" * 60, 1),
    }


def turned(array, orientation):
    """The array that EXIF's `orientation` says is stored, of one that is to be seen."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(undo[orientation](array))


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def good(array) -> dict:
    """{name: (file, what is to be seen of it, largest mean difference in levels)}. array: uint8 [H, W, 3]."""
    rgb = Image.fromarray(array)
    grey = np.asarray(rgb.convert("L"))
    greys = np.stack([grey] * 3, -1)
    alpha = Image.fromarray(np.dstack([array, np.full(grey.shape, 77, np.uint8)]))
    faint, faint_greys = ((77 * a.astype(int) + 178 * 255 + 127) // 255 for a in (array, greys))

    def several():
        return {"save_all": True, "append_images": [Image.fromarray(255 - array)]}

    ramp = grey.astype(np.uint16) * 256 + 255 - grey  # the lower byte runs against the upper one
    kinds = {
        "JPEG": (encoded(rgb, quality=95), array, 6),
        "JPEG, progressive": (encoded(rgb, quality=95, progressive=True), array, 6),
        "JPEG, no chroma subsampling": (encoded(rgb, quality=95, subsampling=0), array, 6),
        "JPEG, grey": (encoded(grey, quality=95), greys, 6),
        "JPEG, CMYK": (encoded(rgb.convert("CMYK"), quality=95), array, 8),
        "JPEG with something behind it": (encoded(rgb, quality=95) + b"tail" * 9, array, 6),
        "JPEG of several pictures": (encoded(rgb, "MPO", quality=95, **several()), array, 6),
        "PNG": (encoded(rgb, "PNG"), array, 0),
        "PNG, palette": (encoded(rgb.quantize(64), "PNG"), np.asarray(rgb.quantize(64).convert("RGB")), 0),
        "PNG, grey": (encoded(grey, "PNG"), greys, 0),
        "PNG, grey with alpha": (encoded(alpha.convert("LA"), "PNG"), faint_greys, 0.1),
        "PNG, alpha": (encoded(alpha, "PNG"), faint, 0.1),
        "PNG, one transparent colour that isn't there": (encoded(rgb, "PNG", transparency=(1, 2, 3)), array, 0),
        "PNG, 16-bit grey": (png(ramp, 0), greys, 0),
        "PNG, 16-bit": (png(array.astype(np.uint16) * 256 + 9, 2), array, 0),
        "PNG, animated": (encoded(rgb, "PNG", **several()), array, 0),
        "PNG without its last chunk": (encoded(rgb, "PNG")[:-12], array, 0),
        "WebP": (encoded(rgb, "WEBP", lossless=True), array, 0),
        "WebP, alpha": (encoded(alpha, "WEBP", lossless=True), faint, 0.1),
        "WebP, animated": (encoded(rgb, "WEBP", lossless=True, **several()), array, 0),
        "GIF": (encoded(rgb.quantize(64), "GIF"), np.asarray(rgb.quantize(64).convert("RGB")), 0),
        "GIF, animated": (encoded(rgb, "GIF", **several()), array, 12),
        "BMP": (encoded(rgb, "BMP"), array, 0),
        "TIFF": (encoded(rgb, "TIFF", compression="tiff_lzw"), array, 0),
        "TIFF, 16-bit": (encoded(Image.fromarray(ramp), "TIFF"), greys, 0),
        "TIFF of several pages": (encoded(rgb, "TIFF", **several()), array, 0),
        "JPEG, 1x1": (encoded(array[:1, :1]), array[:1, :1], 6),
        "PNG, 1x1": (encoded(array[:1, :1], "PNG"), array[:1, :1], 0),
        "JPEG, 30,000 px wide": (encoded(np.tile(array, (1, -(-30000 // array.shape[1]), 1))[:8, :30000]), None, 6),
    }
    for orientation in range(1, 9):
        stored = turned(array, orientation)
        for kind, tolerance in (("JPEG", 6), ("PNG", 0), ("WEBP", 0), ("TIFF", 0)):
            options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
            file = encoded(stored, kind, exif=exif(orientation), **options)
            kinds[f"{kind} to be turned, {orientation}"] = (file, array, tolerance)
    return kinds


def bomb(kind, side) -> bytes:
    """A small file whose header claims `side` x `side` px."""
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
        return (
            start + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + encoded(np.zeros((9, 9, 3), np.uint8), "PNG")[33:]
        )
    file = bytearray(encoded(np.zeros((9, 9, 3), np.uint8)))
    place = file.index(b"\xff\xc0") + 5
    file[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(file)


def bad(array) -> dict:
    """{name: (file, words of the reason)}."""
    files = {kind: encoded(array, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    progressive = encoded(array, progressive=True)
    cut = {
        f"{kind} cut short at {part:.0%}": (file[: int(part * len(file))], "")
        for kind, file in {**files, "JPEG, progressive": progressive}.items()
        for part in (0.02, 0.5, 0.9)
    }
    return cut | {
        "empty": (b"", "empty"),
        "text": (b"not a picture\n" * 50, "format that is read"),
        "JPEG without its last two bytes": (files["JPEG"][:-2], "truncated"),
        "JPEG, progressive, without its last two bytes": (progressive[:-2], "truncated"),
        "JPEG of zeros": (b"\xff\xd8" + bytes(5000), "format that is read"),
        "JPEG bomb": (bomb("JPEG", 30000), "decompression bomb"),
        "PNG bomb": (bomb("PNG", 30000), "decompression bomb"),
        "small JPEG bomb": (bomb("JPEG", 10000), "10000x10000 px"),
        "small PNG bomb": (bomb("PNG", 10000), "10000x10000 px"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\nshowpage\n", "format that is read"),
        "float TIFF": (encoded(Image.fromarray(array).convert("F"), "TIFF"), "32-bit"),
    }


def mutated(file, rng) -> bytes:
    """A file with bytes changed, bits flipped, a part left out or put in, or its end cut off."""
    file, way = bytearray(file), rng.integers(0, 4)
    if way == 0:
        return bytes(file[: rng.integers(0, len(file))])
    if way == 1:
        for place in rng.integers(0, len(file), rng.integers(1, 9)):
            file[place] ^= 1 << rng.integers(0, 8)
    elif way == 2:
        for place in rng.integers(0, min(len(file), 700), rng.integers(1, 5)):
            file[place] = rng.integers(0, 256)
    else:
        start = rng.integers(0, len(file))
        file[start : start + rng.integers(0, 50)] = rng.bytes(rng.integers(0, 20))
    return bytes(file)
