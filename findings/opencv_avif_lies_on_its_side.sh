#!/usr/bin/env bash
# OpenCV 5.0.0.93 (opencv-python-headless), Pillow 13.0.0: OpenCV turns a phone's JPEG upright and leaves the same photo as AVIF on its side.
# imread() applies EXIF's orientation to JPEG, PNG and WebP. An AVIF says it by a property of its container (irot, imir), which HEIF makes part of
# how the picture is to be shown and which Pillow writes for any photo that EXIF turns: imread() decodes the coded picture and leaves it at
# that, with IMREAD_COLOR and IMREAD_COLOR_RGB alike. Without a warning.
# Why it surprises: imread()'s documentation speaks of EXIF's orientation as honoured unless asked otherwise, and one photo in three formats is right.
# Whom it concerns: whoever reads a data set that was recompressed to AVIF, or photos of phones, by OpenCV (or a loader above it) beside Pillow,
# whose exif_transpose() turns it: rows and columns, boxes and points are exchanged between the two.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "opencv-python-headless==5.0.0.93" "pillow==13.0.0" "numpy==2.3.5" >&2
"$home/venv/bin/python" - "$home" <<'EOF'
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

folder = Path(sys.argv[1])
y, x = np.mgrid[0:1:96j, 0:1:160j]
photo = Image.fromarray(np.stack([255 * x, 255 * y, 128 + 0 * x], -1).astype(np.uint8))  # red grows to the right
turned = Image.Exif()
turned[0x0112] = 6  # to be shown a quarter turn clockwise
options = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "avif": {"quality": 95}}


def upright(pixels):
    """Whether it is turned: red grows downwards then."""
    return pixels.shape[:2] == (160, 96) and bool(pixels[-1, :, 0].mean() > pixels[0, :, 0].mean() + 100)


found = {}
for ending, how in options.items():
    file = folder / f"photo.{ending}"
    photo.save(file, exif=turned, **how)
    by_pillow = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    by_opencv = [cv2.imread(str(file), flag) for flag in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR_RGB)]
    by_opencv[0] = by_opencv[0][..., ::-1]
    found[ending] = upright(by_pillow), *map(upright, by_opencv)
    boxes = [name for name in ("irot", "imir") if name.encode() in file.read_bytes()]
    print(f"{ending}: Pillow {by_pillow.shape[:2]}, upright: {found[ending][0]}; OpenCV {cv2.__version__} {by_opencv[0].shape[:2]}, upright: {found[ending][1:]} {boxes or ''}")
right = {"jpg": (True,) * 3, "png": (True,) * 3, "webp": (True,) * 3, "avif": (True, False, False)}
sys.exit(found != right)
EOF
