"""What stands in a file's header: whether libjpeg-turbo or DALI may decode it, and how it has to be turned.

They are given what they read exactly as Pillow does: ordinary JPEG files to the one, opaque 8-bit PNG files to the
other. Pillow's word counts for all else. DALI scales 16-bit pixels otherwise, drops transparency, and makes room for
whatever size a header claims.
"""

import struct
from typing import NamedTuple

from sslr1.data import pixels

MAX_PIXELS = 89_478_485  # 256 MiB as RGB, where Pillow begins to warn: a larger image is taken for a decompression bomb
_FRAMES, _SCAN, _APP1 = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1  # baseline, extended and progressive
_OTHER_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comment, application data
# Chunks of a PNG file that may hold an orientation, too much text, or a transparent colour
_PNG_EXTRAS = (b"eXIf", b"iTXt", b"zTXt", b"Raw profile", b"tRNS")
_GREY, _RGB, _PALETTE = 0, 2, 3


class Header(NamedTuple):
    """jpeg: else it is a PNG; height, width: in px, as stored; orientation: EXIF's, 1 to 8."""

    jpeg: bool
    height: int
    width: int
    orientation: int = 1


def read(data) -> Header | None:
    """The Header of a file (bytes) that is a JPEG or PNG without anything out of the ordinary, of at most MAX_PIXELS;
    else None."""
    try:
        if is_jpeg(data):
            return _read_jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _read_png(data)
    except (IndexError, struct.error):  # a header that is cut short
        pass
    return None


def is_jpeg(data) -> bool:
    return data[:2] == b"\xff\xd8"


def orientation(data) -> int:
    """A JPEG file's, whatever else is the matter with it."""
    found = {}
    try:
        for code, start, end in _segments(data):
            if code == _APP1:
                _note(found, data[start:end])
    except struct.error:
        pass
    return pixels.orientation(found.get("exif", b""), found.get("xmp", b""))


def _segments(data):
    """(code, start, end) of what each segment of a JPEG file holds, to the one that begins its first scan."""
    at, code = 2, None
    while code != _SCAN:
        mark, code, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF:
            return
        if code == 0xFF:  # a byte of padding
            at += 1
            continue
        yield code, at + 4, at + 2 + length
        at += 2 + length


def _note(found, segment):
    """Keep the first EXIF and the first XMP data."""
    if segment[:6] == b"Exif\0\0":
        found.setdefault("exif", segment)
    elif segment[:29] == b"http://ns.adobe.com/xap/1.0/\0":
        found.setdefault("xmp", segment)


def _read_jpeg(data):
    size, found, code = None, {}, None
    for code, start, end in _segments(data):
        if code in _FRAMES:
            depth, height, width, colours = struct.unpack_from(">BHHB", data, start)
            if depth != 8 or colours not in (1, 3) or not 0 < height * width <= MAX_PIXELS:
                return None
            size = height, width
        elif code == _APP1:
            _note(found, data[start:end])
        elif code != _SCAN and code not in _OTHER_SEGMENTS:
            return None
    if size is None or code != _SCAN:
        return None
    return Header(True, *size, pixels.orientation(found.get("exif", b""), found.get("xmp", b"")) if found else 1)


def _read_png(data):
    kind, width, height, depth, colours = struct.unpack_from(">4sIIBB", data, 12)
    opaque = colours in (_GREY, _RGB, _PALETTE) and not any(extra in data for extra in _PNG_EXTRAS)
    ordinary = kind == b"IHDR" and depth <= 8 and opaque and 0 < height * width <= MAX_PIXELS
    return Header(False, height, width) if ordinary else None
