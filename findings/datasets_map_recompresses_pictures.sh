#!/usr/bin/env bash
# datasets 5.2.0, Pillow 13.0.0: a map() that only looks at a picture stores that picture anew, in worse quality.
# If the mapped function reads a picture of a row, and be it for its width, the result holds the picture encoded again by Pillow with its
# defaults, though the function returned nothing but the width: JPEG of quality 95 becomes quality 75, lossless WebP becomes lossy, a JPEG that
# EXIF turns becomes a PNG several times as large. Without a warning. A function that reads other columns only, one that is given the picture by
# input_columns, and filter() keep the file's bytes; so do rows that only name a file on disk.
# Why it surprises: nothing was returned for that column, and PNG pictures come out unchanged. Each further such map() encodes again.
# Whom it concerns: whoever prepares images of Parquet files or of the Hub with map() (sizes, prompts, hashes) and trains on the result.
# cast_column("image", Image(decode=False)) before map() avoids it.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "datasets==5.2.0" "pillow==13.0.0" "numpy==2.3.5" "pyarrow==26.0.1" >&2
HOME=$home HF_HUB_OFFLINE=1 "$home/venv/bin/python" - <<'EOF'
import io
import sys

import numpy as np
from datasets import Dataset, Features, Image, Value, disable_progress_bars
from PIL import Image as Pillow

disable_progress_bars()
rng = np.random.default_rng(0)
y, x = np.mgrid[0:1:240j, 0:1:320j]
waves = np.stack([128 + 90 * np.sin(20 * x * y + phase) for phase in range(3)], -1)
picture = Pillow.fromarray((waves + rng.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8))
turned = Pillow.Exif()
turned[0x0112] = 6


def file(*arguments, **options):
    picture.save(buffer := io.BytesIO(), *arguments, **options)
    return buffer.getvalue()


files = {
    "JPEG, quality 95": file("JPEG", quality=95),
    "the same, turned by EXIF": file("JPEG", quality=95, exif=turned),
    "WebP, lossless": file("WEBP", lossless=True),
    "PNG": file("PNG"),
}
rows = {"name": list(files), "image": [{"bytes": data, "path": None} for data in files.values()]}
before = Dataset.from_dict(rows, features=Features({"name": Value("string"), "image": Image()}))


def stored(dataset):
    return [cell["bytes"] for cell in dataset.cast_column("image", Image(decode=False))["image"]]


looked = before.map(lambda row: {"width": row["image"].width}, keep_in_memory=True)
kept = [
    before.map(lambda row: {"letters": len(row["name"])}, keep_in_memory=True),
    before.map(lambda image: {"width": image.width}, input_columns=["image"], keep_in_memory=True),
    before.filter(lambda row: row["image"].width > 0, keep_in_memory=True),
]
found = []
for i, (name, old, new) in enumerate(zip(files, stored(before), stored(looked), strict=True)):
    pixels = [np.asarray(dataset[i]["image"]).astype(int) for dataset in (before, looked)]
    off = int(abs(pixels[0] - pixels[1]).max())
    found.append((looked[i]["image"].format, off, len(new) / len(old)))
    print(f"{name}: {len(old):,} bytes; after map() read its width: {found[-1][0]} of {len(new):,} bytes, pixels up to {off} off")
same = all(stored(dataset) == list(files.values()) for dataset in kept)
print("the other column read, input_columns, filter(): bytes kept" if same else "bytes changed elsewhere, too")
jpeg, oriented, webp, png = found
sys.exit(not (jpeg[1] > 10 and webp[1] > 10 and oriented[0] == "PNG" and oriented[2] > 2 and png[1] == 0 and same))
EOF
