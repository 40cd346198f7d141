#!/usr/bin/env bash
# transformers 5.17.0: generate() of a vision-language model runs the vision tower once for each sequence it returns, on the same picture.
# With num_return_sequences=8 (or num_beams=8) a Qwen2.5-VL's pixels are copied eight times and all copies go through the tower and the prompt
# through the language model, before the first token. An encoder-decoder's encoder runs once, on one copy, and its output is what is repeated.
# Why it surprises: the picture is encoded before anything is drawn and the argument speaks of what comes out; the pages on generation don't say.
# Whom it concerns: GRPO and best-of-n with generate(), whose groups share a prompt of hundreds of visual tokens: memory of pixels, the tower's
# time and the prompt's grow by the size of the group. A picture's features, once computed and given as inputs_embeds, avoid the tower's part.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.17.0" "numpy==2.3.5" >&2
HOME=$home OMP_NUM_THREADS=1 "$home/venv/bin/python" - <<'EOF'
import sys

import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
sizes = dict(intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
seer = Qwen2_5_VLForConditionalGeneration(
    Qwen2_5_VLConfig(
        text_config=dict(hidden_size=64, rope_parameters=rope, **ends, **sizes),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1]),
        image_token_id=10,
        video_token_id=11,
        vision_start_token_id=12,
        vision_end_token_id=13,
    )
).eval()
writer = T5ForConditionalGeneration(
    T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **ends)
).eval()

side = 16  # patches; 64 visual tokens
ids = torch.tensor([[20, 12] + [10] * (side * side // 4) + [13] + list(range(30, 36))])
picture = dict(pixel_values=torch.randn(side * side, 1176), image_grid_thw=torch.tensor([[1, side, side]]))
chat = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 10).int(), **picture)
text = dict(input_ids=ids, attention_mask=torch.ones_like(ids))

seen = {"tower": [], "language": [], "encoder": []}
seer.model.visual.register_forward_pre_hook(lambda module, inputs: seen["tower"].append(len(inputs[0])))
seer.model.language_model.register_forward_pre_hook(
    lambda module, _, inputs: seen["language"].append(inputs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
)
writer.encoder.register_forward_pre_hook(
    lambda module, _, inputs: seen["encoder"].append(inputs["input_ids"].numel()), with_kwargs=True
)

print(f"transformers {transformers.__version__}; a prompt of {ids.numel()} tokens, a picture of {side * side} patches")
found = {}
several = dict(num_return_sequences=8, do_sample=True), dict(num_beams=8, do_sample=False)
for settings in (dict(do_sample=False), *several):
    for rows in seen.values():
        rows.clear()
    for network, inputs in ((seer, chat), (writer, text)):
        network.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **settings)
    found[str(settings)] = [rows[0] for rows in seen.values()]
    assert len(seen["tower"]) == len(seen["encoder"]) == 1
    print(f"{settings}: patches through the tower {seen['tower'][0]}, prompt tokens through its language model {seen['language'][0]}; "
          f"tokens through an encoder-decoder's encoder {seen['encoder'][0]}")
once = [side * side, ids.numel(), ids.numel()]
eight = [8 * side * side, 8 * ids.numel(), ids.numel()]
sys.exit([*found.values()] != [once, eight, eight])
EOF
