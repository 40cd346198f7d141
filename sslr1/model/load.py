"""Models and tokenizers from ordinary Hugging Face folders. No remote code, safetensors only."""

import json
from contextlib import contextmanager
from pathlib import Path

from sslr1.errors import UserError
from sslr1.model import parallel

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")


def check_folder(path) -> Path:
    """The folder, if it holds a model that this version trains.

    Raises UserError for one that is missing, of another family, without safetensors
    weights or some of them, with an index that leads elsewhere, or that would run code of its own.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        what = "is not a model folder: it has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(
            f"model.path {str(path)!r} {what}. Give a folder in Hugging Face's format, e.g. a download of Qwen/Qwen2.5-VL-3B-Instruct"
        )
    config = _json(folder / "config.json")
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
    index = folder / "model.safetensors.index.json"
    for name in sorted({str(n) for n in dict(_json(index).get("weight_map", {})).values()} if index.is_file() else ()):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a safetensors file of that folder")
        if not (folder / name).is_file():
            raise UserError(f"{index} names {name!r}, which is not there: the download is not complete")
    return folder


def _json(file) -> dict:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{file} is not a JSON file of settings")
    return tree


def load_model(path, dtype=None):
    """transformers' own model of the folder on the CPU in eval mode, in `dtype` (default float32). Errors: `check_folder`'s."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        check_folder(path),
        dtype=dtype or torch.float32,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    ).eval()


def skeleton(path):
    """The folder's model without its weights: parameters on the meta device, buffers (rotary tables) real. In eval mode.

    What `load_weights` fills after it has been sharded, so that no rank ever holds more than its share. Errors: `check_folder`'s.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    folder = check_folder(path)
    with _parameters_on_meta():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype="float32")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


@contextmanager
def _parameters_on_meta():
    from torch import nn

    register = nn.Module.register_parameter

    def without_storage(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is tied keeps its identity
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = without_storage
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_weights(model, path) -> None:
    """Fill a model's parameters, sharded or not, from the folder's safetensors: of each tensor only this rank's rows are read.

    Names that published checkpoints use are translated as transformers does. Raises UserError for a tensor that is missing,
    unknown or of another shape.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    folder = check_folder(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    once = {id(p): name for name, p in reversed(parameters.items())}  # one name of those that share a parameter
    transforms = get_model_conversion_mapping(model)
    renames = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in parameters.items()}
    filled = set()
    for file in sorted(folder.glob("*.safetensors")):
        with _opened(file) as tensors:
            for key in tensors.keys():
                name, converted = rename_source_key(key, renames, converters, model.base_model_prefix, shapes)
                piece, parameter = tensors.get_slice(key), parameters.get(name)
                if converted is not None or parameter is None:
                    raise UserError(f"{file}: tensor {key!r} is not a parameter of a {model.config.model_type} model")
                if list(parameter.shape) != piece.get_shape():
                    raise UserError(
                        f"{file}: {key!r} has shape {piece.get_shape()}, config.json makes it {list(parameter.shape)}"
                    )
                if id(parameter) in filled and once[id(parameter)] != name:
                    continue  # a head that is tied, and stored nevertheless
                parallel.fill(parameter, piece)
                filled.add(id(parameter))
    missing = [name for name, p in parameters.items() if id(p) not in filled]
    if missing:
        raise UserError(f"{str(folder)!r} lacks {len(missing)} of the model's tensors, e.g. {missing[0]!r}")


@contextmanager
def _opened(file):
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None
    with tensors:
        yield tensors


def freeze(model, part) -> None:
    """Train everything ("none"), or leave the vision tower as it is ("vision"): its gradients and moments are then never made."""
    model.requires_grad_(True)
    if part == "vision":
        model.model.visual.requires_grad_(False)


def load_tokenizer(path):
    """The folder's tokenizer with its chat template. Raises UserError."""
    from transformers import AutoTokenizer

    folder = check_folder(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(
            f"model.path {str(path)!r} has no tokenizer (tokenizer.json): copy the tokenizer files of the original model into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise all kinds
        raise UserError(
            f"model.path {str(path)!r}: its tokenizer can't be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path {str(path)!r}: the tokenizer has no chat template (chat_template.jinja): copy it from the original model"
        )
    return tokenizer
