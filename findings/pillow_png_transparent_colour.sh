#!/bin/sh
# Pillow 13.0.0 (seen on Python 3.11; pypng 0.20220715.0 as an independent reader).
# Behaviour: a PNG file may name one transparent colour (tRNS) in the depth of the file. Pillow scales 2- and 4-bit grey pixels to 8
# bits but leaves the colour as it stands in the file, so convert("RGBA") finds no transparent pixel; 16-bit grey ("I;16") comes out
# opaque too, and 16-bit RGB is matched by the colour's lower bytes instead of its upper ones. 1- and 8-bit files are right.
# has_transparency_data is True for all of them. Why it surprises: the same picture at 8 bits is transparent; PNG optimisers reduce
# grey pictures to 2 and 4 bits, which turns the ground of a cut-out from white to its hidden colour.
# Concerns: whoever lays transparent pictures on white before a vision model sees them (Qwen's own utilities do, by Pillow).
set -eu
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 pypng==0.20220715.0
"$home/venv/bin/python" - <<'P'
import io
import sys

import png
from PIL import Image

unlike = []
for depth in (1, 2, 4, 8, 16):
    key = 2 * (2**depth - 1) // 3 or 1  # a light grey is transparent, in the left half of a picture of 8 x 4 px
    file = io.BytesIO()
    rows = [[key] * 4 + [0] * 4 for _ in range(4)]
    png.Writer(8, 4, greyscale=True, bitdepth=depth, transparent=key).write(file, rows)
    *_, pixels, _ = png.Reader(bytes=file.getvalue()).asRGBA()
    wanted = sum(alpha == 0 for row in pixels for alpha in list(row)[3::4])
    image = Image.open(io.BytesIO(file.getvalue()))
    named = image.has_transparency_data
    try:
        found = list(image.convert("RGBA").getchannel("A").tobytes()).count(0)
    except ValueError as error:
        found = f"ValueError: {error}"
    print(f"grey of {depth:2} bits: {wanted} transparent px by pypng, {found} by Pillow; has_transparency_data {named}")
    if found != wanted:
        unlike.append(depth)
key = (0x12FF, 0x34FF, 0x56FF)
file = io.BytesIO()
png.Writer(8, 4, greyscale=False, bitdepth=16, transparent=key).write(file, [list(key) * 4 + [0] * 12 for _ in range(4)])
*_, pixels, _ = png.Reader(bytes=file.getvalue()).asRGBA()
wanted = sum(alpha == 0 for row in pixels for alpha in list(row)[3::4])
found = list(Image.open(io.BytesIO(file.getvalue())).convert("RGBA").getchannel("A").tobytes()).count(0)
print(f"RGB of 16 bits: {wanted} transparent px by pypng, {found} by Pillow")
sys.exit(not (unlike == [2, 4, 16] and found != wanted))
P
