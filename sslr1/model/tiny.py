"""A tiny Qwen2.5-VL, Qwen3-VL or Qwen3.5 with random weights and a small byte-level tokenizer, as an ordinary Hugging
Face folder.

For the demo and the tests: everything downstream loads it exactly as it would load Qwen/Qwen2.5-VL-3B-Instruct,
Qwen/Qwen3-VL-4B-Instruct or Qwen/Qwen3.5-4B.
    python -m sslr1.model.tiny FOLDER [--seed N] [--family qwen3_vl]
"""

import argparse
import json
from pathlib import Path

from sslr1.files import open_to_all, write_whole
from sslr1.model.folder import weight_files

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 768

TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.06,
)
VISION = dict(hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128, initializer_range=0.06)
PATCHES_OF_16 = dict(  # Qwen3-VL's image processor, and Qwen3.5's
    size={"longest_edge": 128 * 128, "shortest_edge": 64 * 64},
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
    processor_class="Qwen3VLProcessor",
    image_processor_type="Qwen2VLImageProcessorFast",
)
# What a family has of its own: text and vision settings beside those above, and its image processor's as published
FAMILIES = {
    "qwen2_5_vl": dict(
        text=dict(
            num_hidden_layers=2,
            rope_parameters={"rope_type": "default", "rope_theta": 2.0, "mrope_section": [4, 6, 6]},
        ),
        vision=dict(depth=2, fullatt_block_indexes=[0, 1]),
        processor=dict(
            image_processor_type="Qwen2VLImageProcessor",
            patch_size=14,
            merge_size=2,
            temporal_patch_size=2,
            min_pixels=56 * 56,
            max_pixels=112 * 112,
            image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711],
        ),
    ),
    "qwen3_vl": dict(  # as in published ones: heads wider than hidden_size / heads, some layers without deepstack
        text=dict(
            num_hidden_layers=3,
            head_dim=64,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 2.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
        ),
        vision=dict(depth=3, num_position_embeddings=8 * 8, deepstack_visual_indexes=[0, 1]),
        processor=PATCHES_OF_16,
    ),
    "qwen3_5": dict(  # as in published ones: three linear layers a full one, two value heads a key head, gates, a
        # rotary part of the head, the text model's own end that is not a turn's, and no generation_config.json
        text=dict(
            num_hidden_layers=4,
            head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 2.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        ),
        vision=dict(depth=2, num_position_embeddings=8 * 8),
        processor=PATCHES_OF_16,
        thinks=True,
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What templates that open the thinking themselves write there, of 4 billion parameters and more
OPENED = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"


def tiny_tokenizer(thinks=False):
    """Byte-level BPE learnt from the puzzles' own questions, digits one by one as in Qwen. thinks: <think> and </think>
    are tokens of their own, and the chat template opens that block."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sslr1.puzzles import batch, prompts

    questions = dict.fromkeys(templates for levels in batch.QUESTIONS.values() for templates in levels.values())
    texts = [text for group in (*questions, prompts.THINKING, prompts.DIRECT) for text in group]
    texts += ["user\n", "assistant\n", " clockwise", " counter-clockwise"] * 4
    thinking = ["<think>", "</think>"] if thinks else []
    bpe = Tokenizer(models.BPE())
    pieces = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pieces += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        sorted(texts),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL) - len(thinking),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bpe.add_special_tokens(list(SPECIAL))
    bpe.add_tokens(thinking)  # not special: they stay in what a completion says
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    mark = "assistant\n"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(mark, mark + OPENED) if thinks else CHAT_TEMPLATE
    return tokenizer


def build_tiny(
    folder,
    seed: int = 0,
    tie: bool = True,
    text=None,
    vision=None,
    max_pixels=None,
    family: str = "qwen2_5_vl",
    dtype: str = "float32",
) -> Path:
    """Write the model to `folder` (made if missing) and return it: 0.65 million parameters (Qwen3-VL: 1.2) unless
    `text` and `vision` change the configuration. theta 2 and a wide initialisation make place along an image's width
    visible to so small a model.

    seed: of the weights; tie: head and embeddings share one matrix; max_pixels: the processor's bound on a canvas, 16
    visual tokens if not given; family: a key of FAMILIES; dtype: of the files. Weights are drawn on torch's default
    device."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    from sslr1.model.gated_delta_net import cast

    own = FAMILIES[family]
    thinks = own.get("thinks", False)
    tokenizer = tiny_tokenizer(thinks)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    special = dict(
        vocab_size=VOCABULARY,
        tie_word_embeddings=tie,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>" if thinks else "<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    config = AutoConfig.for_model(
        family,
        text_config={**TEXT, **own["text"], **special, **(text or {})},
        vision_config={**VISION, **own["vision"], **(vision or {})},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    folder = Path(folder)
    cast(model, getattr(torch, dtype))
    model.save_pretrained(folder)
    if thinks:
        (folder / "generation_config.json").unlink()
    tokenizer.save_pretrained(folder)
    open_to_all(weight_files(folder), folder)
    processor = bounded(own["processor"], max_pixels) if max_pixels else own["processor"]
    # last: its presence says that the folder is complete
    write_whole(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    return folder


def bounded(processor, max_pixels) -> dict:
    """An image processor's settings with that bound on a canvas, under whichever name it has there."""
    if "size" in processor:
        return processor | {"size": processor["size"] | {"longest_edge": max_pixels}}
    return processor | {"max_pixels": max_pixels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m sslr1.model.tiny", description="Write a tiny Qwen2.5-VL or Qwen3-VL with random weights."
    )
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2_5_vl")
    arguments = parser.parse_args()
    print(build_tiny(arguments.folder, arguments.seed, family=arguments.family))
