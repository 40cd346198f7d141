"""Image files of every kind, and ways to spoil them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image, kind="JPEG", **options) -> bytes:
    """image: a PIL image or an array."""
    out = io.BytesIO()
    image = image.copy() if isinstance(image, Image.Image) else Image.fromarray(image)  # saving leaves options behind
    image.save(out, kind, **options)
    return out.getvalue()


def png(array, colour_type) -> bytes:
    """A 16-bit PNG file of a uint16 array, which Pillow can't write for colours. colour_type: 0 grey, 2 RGB, 6 RGBA."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
        "PNG, grey with alpha": (encoded(alpha.convert("LA"), "PNG"), greys, 0),
        "PNG, alpha": (encoded(alpha, "PNG"), array, 0),
        "PNG, one transparent colour": (encoded(rgb, "PNG", transparency=(1, 2, 3)), array, 0),
        "PNG, 16-bit grey": (png(ramp, 0), greys, 0),
        "PNG, 16-bit": (png(array.astype(np.uint16) * 256 + 9, 2), array, 0),
        "PNG, animated": (encoded(rgb, "PNG", **several()), array, 0),
        "PNG without its last chunk": (encoded(rgb, "PNG")[:-12], array, 0),
        "WebP": (encoded(rgb, "WEBP", lossless=True), array, 0),
        "WebP, alpha": (encoded(alpha, "WEBP", lossless=True), array, 0),
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


def mutated(file, draw) -> bytes:
    """A file with bytes changed, bits flipped, a part left out or put in, or its end cut off."""
    file, way = bytearray(file), draw.integers(0, 4)
    if way == 0:
        return bytes(file[: draw.integers(0, len(file))])
    if way == 1:
        for place in draw.integers(0, len(file), draw.integers(1, 9)):
            file[place] ^= 1 << draw.integers(0, 8)
    elif way == 2:
        for place in draw.integers(0, min(len(file), 700), draw.integers(1, 5)):
            file[place] = draw.integers(0, 256)
    else:
        start = draw.integers(0, len(file))
        file[start : start + draw.integers(0, 50)] = draw.bytes(draw.integers(0, 20))
    return bytes(file)
