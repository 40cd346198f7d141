"""A Hugging Face model folder, read as transformers reads it: which files hold the weights, what its settings say, and
in one line what doesn't fit, before a weight is read."""

import json
import os
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from sslr1.errors import UserError
from sslr1.files import LFS, NOT_FETCHED, no_folder

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def check_folder(path) -> Path:
    """The folder, if it holds a model that this version trains.

    Raises UserError for one that `check_config` refuses, or whose weights (`weight_files`) are not there or not whole;
    headers are read, weights aren't.
    """
    folder = check_config(path)
    for file in weight_files(folder):
        with opened(file):
            pass
    return folder


def holds_adapter(path) -> bool:
    """Whether a folder is an adapter: PEFT's settings of one, and no model's weights beside them."""
    folder = Path(path)
    return (folder / ADAPTER[0]).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


def base_of(path) -> Path:
    """The model's folder of model.path: itself, or where that is an adapter the one that the adapter names, by its path
    or by the name of a download in the hub's cache. Raises UserError where that isn't there."""
    folder = Path(path)
    if not holds_adapter(folder):
        return folder
    named = settings(folder / ADAPTER[0]).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{folder / ADAPTER[0]} names no base_model_name_or_path, the model's folder that it adapts")
    base = Path(named) if Path(named).is_dir() else _snapshot(_cache() / f"models--{named.replace('/', '--')}")
    if base is None or holds_adapter(base):
        what = "is no folder here" if base is None else "is an adapter, too"
        raise UserError(
            f"model.path {str(path)!r} is an adapter of {named!r}, which {what}: put the folder of that model into "
            f"base_model_name_or_path of its {ADAPTER[0]}"
        )
    return base


def check_config(path) -> Path:
    """The folder, or of an adapter its base's, if its config.json is of a model that this version trains.

    Raises UserError for one that is missing, of another family, quantised, or that would run code of its
    own.
    """
    folder = base_of(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path {str(path)!r} {_no_model(folder)}")
    config = settings(folder / "config.json")
    if not config.get("model_type"):
        raise UserError(f"model.path {str(path)!r}: its config.json has no model_type, so it is not a model's")
    if config["model_type"] not in MODEL_TYPES:
        raise UserError(
            f"model.path {str(path)!r} holds a {config['model_type']!r} model; supported: {', '.join(MODEL_TYPES)}"
        )
    if "auto_map" in config:
        raise UserError(
            f"model.path {str(path)!r} wants to run its own code (auto_map in config.json), which is refused"
        )
    if quantised := config.get("quantization_config") or config.get("quantization"):  # MLX's
        method = _method(quantised)
        raise UserError(
            f"model.path {str(path)!r} holds quantised weights (quantization_config in config.json: {method}), which "
            "can't be trained: give the folder of the model that they were made from"
        )
    return folder


def _no_model(folder) -> str:
    """What a folder without config.json is."""
    example = "Give a folder in Hugging Face's format, e.g. a download of Qwen/Qwen2.5-VL-3B-Instruct"
    if not folder.is_dir():
        cached = _snapshot(_cache() / f"models--{folder.as_posix().replace('/', '--')}")
        there = f", or give its download in the hub's cache, {cached}" if cached else ""
        return f"{no_folder(folder)}{there}. {example}"
    if (folder / "snapshots").is_dir():
        return (
            f"is the hub's cache of a model, which is in {_snapshot(folder)}: give that folder"
            if _snapshot(folder)
            else "is the hub's cache of a model whose download is not complete: it has no snapshots/…/config.json"
        )
    if inner := sorted(folder.glob("models--*")) or sorted((folder / "hub").glob("models--*")):
        return f"is the hub's cache, of {len(inner)} models: give one's folder, e.g. {_snapshot(inner[0]) or inner[0]}"
    adapters = [name for name in ADAPTER[1:] if (folder / name).is_file()]
    if adapters:
        return f"is an adapter ({adapters[0]}) without its {ADAPTER[0]}, which names its base model"
    if (folder / "hf" / "config.json").is_file():
        return f"is a checkpoint of a run: its model is {folder / 'hf'}"
    if (folder / "checkpoints").is_dir():
        return (
            "is a run's folder: a model is in checkpoints/step-…/hf, or take one out of it with sslr1 export model "
            f"{folder} OUT"
        )
    return f"is not a model folder: it has no config.json. {example}"


def _cache() -> Path:
    """Where the hub's own client keeps downloads."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def _snapshot(repository):
    """The model's folder in the hub's cache of it: of its main branch, else the newest. None where there is none."""
    found = sorted(repository.glob("snapshots/*/config.json"), key=lambda file: file.lstat().st_mtime)
    main = repository / "refs" / "main"
    named = repository / "snapshots" / main.read_text().strip() if main.is_file() else None
    folders = [file.parent for file in found]
    return named if named in folders else folders[-1] if folders else None


def _method(quantised) -> str:
    """How a configuration says that weights were quantised."""
    if not isinstance(quantised, dict):
        return str(quantised)
    named = quantised.get("quant_method") or next((key for key in quantised if key.startswith("load_in_")), None)
    return str(named or quantised)[:100]


def weight_files(folder) -> list[Path]:
    """The files that hold a model folder's weights, as transformers' `from_pretrained` finds them: `model.safetensors`
    if it is there, else exactly the files that `model.safetensors.index.json` names, in the order of their names.
    (Before both comes what `transformers_weights` of config.json names, as in transformers.) Whatever else lies there
    is not looked at.

    Everything that reads weights asks here. Raises UserError where there are none, an index leads out of the folder, or
    a file that it names is missing.
    """
    folder = Path(folder)
    named = settings(folder / "config.json").get("transformers_weights")
    if named is not None:
        named = _inside(folder / "config.json", named, (".safetensors", ".safetensors.index.json"))
        if not named.endswith(".index.json"):
            return [_there(folder / named, folder / "config.json")]
    elif (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / (named or INDEX)
    if not index.is_file():
        raise UserError(f"model.path {str(folder)!r} {_no_weights(folder)}")
    names = settings(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} names no files (weight_map): take the original model's")
    names = sorted({_inside(index, name, (".safetensors",)) for name in names.values()})
    return [_there(folder / name, index) for name in names]


def _inside(index, name, endings) -> str:
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or not name.endswith(endings):
        raise UserError(f"{index} names {name!r}, which is not a safetensors file of that folder")
    return name


def _there(file, index) -> Path:
    if not file.is_file():
        raise UserError(f"{index} names {file.name!r}, which is not there: the download is not complete")
    return file


def _no_weights(folder) -> str:
    """What a folder without weights that transformers would read holds instead."""
    found = sorted(p.name for p in folder.iterdir() if p.name.endswith((*WEIGHTS, ".index.json")))
    other = [name for name in found if name.endswith(".safetensors")]
    if not other:
        kinds = f": {_listed(found)} can't be" if found else ""
        return f"holds no safetensors weights (pickled weights are not read{kinds})"
    shards = [name for name in other if name.startswith("model-")]
    if shards:
        return f"holds {_listed(shards)}, but no {INDEX} that names them: the download is not complete"
    if set(other) == {"adapter_model.safetensors"}:
        return (
            f"holds an adapter (adapter_model.safetensors), but no model, and no {ADAPTER[0]} that would name its base"
        )
    return f"holds no {SINGLE} and no {INDEX}; {_listed(other)} is not what transformers reads a model from"


def _listed(names) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def settings(file) -> dict:
    """What a JSON file of settings holds. Raises UserError."""
    check_whole(file)
    try:
        tree = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{file} is not a JSON file of settings")
    return tree


def check_whole(file) -> None:
    """Raises UserError for a file that is empty, or stands for one that Git LFS has not fetched."""
    try:
        with open(file, "rb") as data:
            head = data.read(len(LFS))
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    if head == LFS:
        raise UserError(f"{file} {NOT_FETCHED}")
    if not head:
        raise UserError(f"{file} is empty: the download is not complete")


@contextmanager
def opened(file):
    """A safetensors file, of which only the header has been read. Raises UserError for one that is not whole."""
    from safetensors import SafetensorError, safe_open

    if Path(file).stat().st_size:
        check_whole(file)
    try:
        tensors = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None
    with tensors:
        yield tensors


def chat_template(folder) -> str | None:
    """The chat template that the folder's processor has, which need not be its tokenizer's: as in transformers'
    processors that of processor_config.json, else chat_template.json's. None leaves it to the tokenizer
    (chat_template.jinja, or its own settings). Raises UserError."""
    for name in ("processor_config.json", "chat_template.json"):
        file = Path(folder) / name
        template = settings(file).get("chat_template") if file.is_file() else None
        if isinstance(template, dict):
            template = template.get("default", template)
        if template is not None and not isinstance(template, str):
            raise UserError(f"{file}: its chat_template is no text")
        if template is not None:
            return template
    return None
