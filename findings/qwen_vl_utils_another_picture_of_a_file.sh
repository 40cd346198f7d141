#!/usr/bin/env bash
# qwen-vl-utils 0.0.14 and transformers 5.17.0: of one file, the two ways to feed a Qwen-VL see two pictures.
# A chat that names a file can go through qwen_vl_utils.process_vision_info (as the model cards show) or through transformers' load_image (which
# its Qwen2-VL image processor calls where torchvision isn't installed, and its image-text-to-text pipeline). A photo that EXIF turns lies on its
# side by the first and stands upright by the second, with rows and columns of visual tokens exchanged. An RGBA picture is laid on white by the
# first, and by the second shows the colours that lie under its transparent pixels; the same picture with a palette, or grey with alpha, shows
# them by the first, too. Without a warning.
# Why it surprises: both are made for the same models, the documentation uses them as one, and plain RGB files agree to the bit.
# Whom it concerns: whoever trains by one and serves or evaluates by the other, on photos of phones, logos, diagrams, screenshots; boxes and
# points of an answer are then in another frame.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.17.0" "numpy==2.3.5" "pillow==13.0.0" >&2
"$home/venv/bin/pip" install -q --disable-pip-version-check "qwen-vl-utils==0.0.14" "av==18.1.0" "requests" "packaging" >&2
# Of torchvision, which is imported for videos, an old one: newer ones of the index want torch with CUDA
"$home/venv/bin/pip" install -q --disable-pip-version-check --no-deps "torchvision==0.16.2" >&2
HOME=$home "$home/venv/bin/python" - "$home" <<'EOF'
import sys
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers.image_utils import load_image

folder = Path(sys.argv[1])
rows, columns = 224, 448  # multiples of 28, so that nothing is resized
photo = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
turned = Image.Exif()
turned[0x0112] = 6
Image.fromarray(photo).save(folder / "plain.png")
Image.fromarray(photo).save(folder / "turned.png", exif=turned)

# A disc of red where it is opaque, black where it isn't
y, x = np.ogrid[:rows, :columns]
disc = (y - rows / 2) ** 2 + (x - columns / 2) ** 2 < 80**2
red = np.zeros((rows, columns, 4), np.uint8)
red[disc] = (255, 0, 0, 255)
Image.fromarray(red).save(folder / "rgba.png")
palette = Image.fromarray(disc.astype(np.uint8), mode="P")
palette.putpalette([0, 0, 0, 255, 0, 0])
palette.save(folder / "palette.png", transparency=0)
Image.merge("LA", [Image.fromarray(np.uint8(disc * c)) for c in (128, 255)]).save(folder / "grey.png")


def first(file):
    message = {"role": "user", "content": [{"type": "image", "image": str(file)}, {"type": "text", "text": "?"}]}
    return np.asarray(process_vision_info([message])[0][0])


def second(file):
    return np.asarray(load_image(str(file)))


print(f"transformers {transformers.__version__}")
found = {}
for name in ("plain", "turned", "rgba", "palette", "grey"):
    seen = [way(folder / f"{name}.png") for way in (first, second)]
    same = seen[0].shape == seen[1].shape and bool((seen[0] == seen[1]).all())
    found[name] = same, *(own.shape[:2] for own in seen), *(tuple(own[0, 0].tolist()) for own in seen)
    print(f"{name}: qwen-vl-utils {seen[0].shape[:2]}, corner {seen[0][0, 0]}; transformers {seen[1].shape[:2]}, corner {seen[1][0, 0]}; same: {same}")
right = [
    found["plain"][0],
    not found["turned"][0] and found["turned"][1:3] == ((rows, columns), (columns, rows)),
    found["rgba"][3:] == ((255, 255, 255), (0, 0, 0)),
    found["palette"][0] and found["palette"][3] == (0, 0, 0),
    found["grey"][0] and found["grey"][3] == (0, 0, 0),
]
sys.exit(not all(right))
EOF
