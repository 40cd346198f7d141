#!/usr/bin/env bash
# transformers 5.17.0: a model saved in shards over one saved as a single file is not the one that is loaded again.
# save_pretrained(folder, max_shard_size=…) removes older shards from the folder, but leaves model.safetensors of an earlier save there;
# from_pretrained prefers that file to the new index, so it loads the old weights, without a warning. The other way round (one file over
# shards) is clean. It concerns whoever saves a grown model, or with a smaller max_shard_size, into a folder that held one before: training
# scripts that write the same output folder again, merges of adapters into the base model's folder.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.17.0" "numpy==2.3.5" >&2
HOME=$home OMP_NUM_THREADS=1 "$home/venv/bin/python" - "$home/model" <<'EOF'
import sys
from pathlib import Path

import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

folder = Path(sys.argv[1])
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
model = Qwen2ForCausalLM(Qwen2Config(**sizes))
model.save_pretrained(folder)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1.0)
model.save_pretrained(folder, max_shard_size="100KB")
loaded = Qwen2ForCausalLM.from_pretrained(folder)
off = {round((a - b).abs().max().item(), 3) for a, b in zip(model.parameters(), loaded.parameters(), strict=True)}
print("transformers", transformers.__version__, "holds", *sorted(path.name for path in folder.glob("*safetensors*")))
print("largest difference of any weight between what was saved last and what is loaded:", *sorted(off))
sys.exit(off != {1.0})
EOF
