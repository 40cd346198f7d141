#!/usr/bin/env bash
# transformers 5.17.0: making one Qwen-VL image processor with max_pixels changes every later one of the process.
# Qwen2VLImageProcessor(Pil).__init__ writes min_pixels and max_pixels into `self.size`, which is the class's own dict unless `size` was given.
# So a processor made later with the defaults, or from a folder whose preprocessor_config.json gives no bounds, resizes to the bounds of
# the first: here 12 visual tokens for a picture in place of 391, without a word. Which picture sizes a model sees depends on what was loaded
# before it. It concerns training and evaluation with two processors in one process (a policy and a judge, Qwen2-VL beside Qwen2.5-VL).
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.17.0" "numpy==2.3.5" "pillow==13.0.0" >&2
HOME=$home OMP_NUM_THREADS=1 "$home/venv/bin/python" - <<'EOF'
import sys

import numpy as np
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

picture = np.zeros((480, 640, 3), np.uint8)


def tokens(processor):
    grid = processor(images=[picture], return_tensors="np")["image_grid_thw"]
    return int(grid.prod()) // processor.merge_size**2


before = tokens(Qwen2VLImageProcessorPil())
small = tokens(Qwen2VLImageProcessorPil(max_pixels=112 * 112))
after = tokens(Qwen2VLImageProcessorPil())
print("transformers", transformers.__version__, "visual tokens of a picture of 640x480")
print(f"default processor: {before}; one with max_pixels=112*112: {small}; default processor made after it: {after}")
sys.exit(not before > 300 > 20 > small == after)
EOF
