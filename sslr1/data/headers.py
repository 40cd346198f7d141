"""Which files libjpeg-turbo and DALI may decode: those that they read exactly as Pillow does. What a file's header says settles it.

Pillow's word counts. DALI scales 16-bit and CMYK pixels otherwise, looks at neither WebP's nor XMP's orientation, reads on
behind damaged EXIF data, doesn't look at what follows a JPEG file's last row, and makes room for whatever size a header claims.
"""

import re
import struct
from typing import NamedTuple

MAX_PIXELS = 89_478_485  # 256 MiB as RGB, where Pillow begins to warn: a larger image is taken for a decompression bomb
ORIENTATION = 0x0112
_BASELINE, _PROGRESSIVE, _SCAN, _APP1 = (0xC0, 0xC1), 0xC2, 0xDA, 0xE1
_OTHER_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, restart interval, comment, application data
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan, where restart markers and stuffed bytes are no ends
_PNG_EXTRAS = (b"eXIf", b"iTXt", b"zTXt", b"Raw profile")  # chunks that may hold an orientation, or too much text


class Header(NamedTuple):
    """jpeg: else it is a PNG; height, width: in px, as stored; turned: it says how it has to be turned; scan: where a baseline
    JPEG file's pixels begin, None in others."""

    jpeg: bool
    height: int
    width: int
    turned: bool = False
    scan: int | None = None


def read(data) -> Header | None:
    """The Header of a file (bytes) that is a JPEG or PNG without anything out of the ordinary, of at most MAX_PIXELS; else None."""
    try:
        if data[:2] == b"\xff\xd8":
            return _read_jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return _read_png(data)
    except (IndexError, struct.error):  # a header that is cut short
        pass
    return None


def whole(data, header) -> bool:
    """Whether what follows a baseline JPEG file's pixels is its end; a progressive one is decoded to its end before the first row
    is out."""
    if header.scan is None:
        return True
    end = _MARKER.search(data, header.scan)
    return end is not None and end[0] == b"\xff\xd9"


def _read_jpeg(data):
    at, frame, orientation = 2, None, 1
    while True:
        mark, code, length = struct.unpack_from(">BBH", data, at)
        if mark != 0xFF:
            return None
        if code in (*_BASELINE, _PROGRESSIVE):
            frame = code
            depth, height, width, colours = struct.unpack_from(">BHHB", data, at + 4)
            if depth != 8 or colours not in (1, 3) or not 0 < height * width <= MAX_PIXELS:
                return None
        elif code == _APP1:
            found = _orientation(data[at + 4 : at + 2 + length])
            if found is None:
                return None
            orientation = max(orientation, found)
        elif code != _SCAN and code not in _OTHER_SEGMENTS:
            return None
        at += 2 + length
        if code == _SCAN:
            break
    if frame is None:
        return None
    return Header(True, height, width, orientation > 1, None if frame == _PROGRESSIVE else at)


def _orientation(segment):
    """1 to 8 from EXIF data whose first directory is whole, 1 where it has none; None for other data, and for XMP's orientation."""
    if segment[:6] != b"Exif\0\0":
        return None if b"tiff:Orientation" in segment else 1
    tiff = segment[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    entries = [struct.unpack_from(order + "HHIHxx", tiff, start + 2 + 12 * n) for n in range(count)]
    turns = [entry[1:] for entry in entries if entry[0] == ORIENTATION]
    if len(turns) > 1 or not all(kind == 3 and n == 1 and 1 <= value <= 8 for kind, n, value in turns):
        return None
    return turns[0][2] if turns else 1


def _read_png(data):
    kind, width, height, depth = struct.unpack_from(">4sIIB", data, 12)
    ordinary = kind == b"IHDR" and depth <= 8 and 0 < height * width <= MAX_PIXELS
    return Header(False, height, width) if ordinary and not any(extra in data for extra in _PNG_EXTRAS) else None
