"""What an opened picture shows, as 8-bit RGB: the one way for training, benchmarks and other people's data sets.

Transparency lies on white, as in Qwen's own utilities (`qwen_vl_utils`, `to_rgb`) and in most viewers. 16-bit pixels
lose their lower byte. 32-bit ones have no fixed range and are refused. EXIF's orientation is honoured, read and applied
here whatever has decoded the pixels. Data that is damaged says nothing: the picture is upright then.
"""

import re
import struct

import numpy as np

ORIENTATION = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # EXIF's types of whole numbers
_XMP = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)\s*([1-8])')
# What undoes each orientation, of arrays [H, W, 3]
_UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def shown(image) -> np.ndarray:
    """uint8 [H, W, 3] of a PIL image of any mode. Raises ValueError for 32-bit pixels, and whatever Pillow raises for a
    damaged file."""
    array = on_white(image)
    return np.ascontiguousarray(upright(array, orientation(*metadata(image))))


def on_white(image) -> np.ndarray:
    """The same as it is stored, whatever its orientation (TIFF files aside, which Pillow turns as it loads them)."""
    from PIL import Image

    # how a file's pixels are stored, until they are loaded
    packed = image.tile[0][3] if getattr(image, "tile", None) else None
    image.load()
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, which have no fixed range")
    clear = image.info.get("transparency") if image.mode in ("1", "L", "RGB") or _is_16_bit(image) else None
    if clear is None and image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        return np.array(ground)
    if _is_16_bit(image):
        array = np.asarray(image)
        grey = (array >> 8).astype(np.uint8)
        out, stored = np.stack([grey] * 3, -1), array[..., None]
    else:
        out = np.array(image.convert("RGB"))
        stored = out
    if clear is not None:
        # Pillow leaves PNG's one transparent colour in the file's depth and the pixels in its own
        depth = {"L;2": lambda v: 85 * v, "L;4": lambda v: 17 * v, "RGB;16B": lambda v: v >> 8}
        scaled = depth.get(packed, lambda v: v)
        values = clear if isinstance(clear, tuple) else [clear]
        out[(stored == [scaled(value) for value in values]).all(-1)] = 255
    return out


def _is_16_bit(image):
    return image.mode.startswith("I;16")


def metadata(image) -> tuple[bytes, bytes]:
    """(EXIF data, XMP data) of a PIL image, empty where it has none."""
    found = image.info.get("exif") or b""
    if not found and "Raw profile type exif" in image.info:  # of PNG files by ImageMagick
        try:
            found = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        except (ValueError, AttributeError):
            pass
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    return found, xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp


def orientation(exif, xmp=b"") -> int:
    """1 to 8: what EXIF data says, else what XMP data says, else 1. Both are bytes, as they stand in a file, in any
    state."""
    value = _exif_orientation(exif)
    if value is None:
        match = _XMP.search(xmp)
        value = int(match[1]) if match else 1
    return value if 1 <= value <= 8 else 1


def _exif_orientation(exif):
    """What the first directory says; None if it says nothing, or can't be read so far."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, n = struct.unpack_from(order + "HHI", tiff, at)
            if tag == ORIENTATION and n == 1 and kind in _INTEGERS:
                return struct.unpack_from(order + _INTEGERS[kind], tiff, at + 8)[0]
    except struct.error:  # cut short
        pass
    return None


def upright(array, orientation) -> np.ndarray:
    """A view of an array [H, W, 3] as EXIF's orientation wants it shown."""
    return _UPRIGHT[orientation](array) if orientation > 1 else array
