#!/usr/bin/env bash
# transformers 5.17.0: a Qwen-VL chat that goes on from its own cache gets the positions of whatever the model generated last.
# A picture of n tokens takes up fewer positions than n; how many fewer is kept on the model (model.rope_deltas), not in the cache. If generate()
# is called for chat A with a DynamicCache, then for chat B, then for A's next turn with A's cache, A's new tokens get their positions from B's
# picture: here -29 in place of 15 after a larger picture, 27 after a text. Without a warning; the logits are off. Why it surprises: the cache
# is an object of the caller's, and each chat by itself is right. It concerns servers, evaluations and multi-turn rollouts that keep a cache
# for each chat and share one model. Shown with Qwen2.5-VL.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.17.0" "numpy==2.3.5" >&2
HOME=$home OMP_NUM_THREADS=1 "$home/venv/bin/python" - <<'EOF'
import sys

import torch
import transformers
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
sizes = dict(intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
config = Qwen2_5_VLConfig(
    text_config=dict(hidden_size=64, rope_parameters=rope, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes),
    vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]),
    image_token_id=10,
    video_token_id=11,
    vision_start_token_id=12,
    vision_end_token_id=13,
)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
settings = dict(do_sample=False, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, output_logits=True)


def prompt(side):
    """A text with a picture of side x side patches, or without one."""
    ids = torch.tensor([[20, 12] + [10] * (side * side // 4) + [13] + list(range(30, 36))])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if side:
        inputs |= dict(mm_token_type_ids=(ids == 10).int(), image_grid_thw=torch.tensor([[1, side, side]]))
        inputs |= dict(pixel_values=torch.randn(side * side, 1176, generator=torch.Generator().manual_seed(1)))
    return inputs


positions = []
model.model.language_model.register_forward_pre_hook(
    lambda module, _, inputs: positions.append(inputs["position_ids"].flatten().tolist()), with_kwargs=True
)


def second_turn(between=None):
    cache = DynamicCache(config=config.text_config)
    said = model.generate(**prompt(8), past_key_values=cache, **settings).sequences
    if between is not None:
        model.generate(**prompt(between), **settings)
    positions.clear()
    ids = torch.cat([said, torch.tensor([[40, 41, 42]])], 1)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    return positions[0], out.logits[0]


found = []
alone = second_turn()
print(f"transformers {transformers.__version__}: positions of the second turn of chat A, a picture of 8 x 8 patches: {alone[0]}")
for what, side in {"a picture of 8 x 8": 8, "a picture of 16 x 16": 16, "a text": 0}.items():
    other = second_turn(side)
    found.append(other[0] == alone[0])
    off = (other[1] - alone[1]).abs().max() / alone[1].std()
    print(f"the same after the model answered {what} in between: {other[0]}; logits off by {off:.2f} standard deviations")
sys.exit(found != [True, False, False])
EOF
