"""Models and tokenizers from ordinary Hugging Face folders. No remote code, safetensors only."""

import json
from pathlib import Path

from sslr1.errors import UserError

MODEL_TYPES = ("qwen2_5_vl",)


def check_folder(path) -> Path:
    """The folder, if it holds a model that this version trains.

    Raises UserError for one that is missing, of another family, without safetensors
    weights, or that would run code of its own.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "is not a model folder: it has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"model.path {str(path)!r} {what}. Give a folder in Hugging Face's format, e.g. a download of Qwen/Qwen2.5-VL-3B-Instruct"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"model.path {str(path)!r} holds a {config.get('model_type')!r} model; supported: {', '.join(MODEL_TYPES)}"
        )
    if "auto_map" in config:
        raise UserError(
            f"model.path {str(path)!r} wants to run its own code (auto_map in config.json), which is refused"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model.path {str(path)!r} holds no *.safetensors weights (pickled weights are not read)")
    return folder


def load_model(path, dtype=None):
    """`Qwen2_5_VLForConditionalGeneration` on the CPU in eval mode, in `dtype` (default float32). Errors: `check_folder`'s."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        check_folder(path),
        dtype=dtype or torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
    ).eval()


def load_tokenizer(path):
    """The folder's tokenizer with its chat template. Raises UserError."""
    from transformers import AutoTokenizer

    folder = check_folder(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(
            f"model.path {str(path)!r} has no tokenizer (tokenizer.json): copy the tokenizer files of the original model into it"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path {str(path)!r}: the tokenizer has no chat template (chat_template.jinja): copy it from the original model"
        )
    return tokenizer
