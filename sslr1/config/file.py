"""Configuration: one YAML file a run plus dotted overrides, checked before anything else is done.

Unknown keys, wrong types and values out of range end with one clear line. The keys themselves stand in
`sslr1.config.settings` and `inputs`; how their text is read, in `text`.
"""

import hashlib
import json
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import get_args, get_origin

import yaml
from pydantic import ValidationError

from sslr1.config.kinds import ConfigError, cut, nearest
from sslr1.config.settings import Config
from sslr1.config.text import is_section, is_text, parse, read_override, remedy, within


def load(path, overrides=(), data=True) -> Config:
    """Read a YAML file (None: begin with nothing), apply `section.key=value` overrides, check everything, as `check`.
    Raises ConfigError, one line."""
    source = f"configuration {str(path)!r}"
    try:
        content = Path(path).read_bytes() if path else b""
        text = content.decode("utf-16" if content.startswith((BOM_UTF16_BE, BOM_UTF16_LE)) else "utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, and names with a NUL in them
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{source} can't be read: {why}") from None
    try:
        tree = parse(text, Config, source) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}{remedy(text, error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold sections, not a {type(tree).__name__}")
    tree = {name: {} if section is None else section for name, section in tree.items()}  # "optim:" and nothing below it
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override: write section.key=value")
        if (others := meant(key)) != [key]:
            written = " or ".join(f"{other}={value}" for other in others)
            raise ConfigError(f"{override}: {key} is not a setting; did you mean {written}?")
        node = tree
        *sections, leaf = key.split(".")
        for depth, section in enumerate(sections):
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        takes = Config
        for part in key.split("."):
            takes = within(takes, part)
        node[leaf] = read_override(value, takes, override)
    config = check(tree, data)
    if config.log.name is None:
        material = json.dumps(_material(config.model_dump(mode="json")), sort_keys=True)
        name = f"{Path(path or 'run').stem}-{hashlib.blake2b(material.encode(), digest_size=3).hexdigest()}"
        config = config.model_copy(update={"log": config.log.model_copy(update={"name": name})})
    return config


def meant(key) -> list:
    """The settings with the last part of a key; the key itself where it is one, and where there are none."""
    takes = Config
    for part in key.split("."):
        takes = within(takes, part)
    if takes is not None:  # of a mapping's, too
        return [key]
    return [other for other in _keys(Config) if other.rpartition(".")[2] == key.rpartition(".")[2]] or [key]


def _keys(section):
    for name, field in section.model_fields.items():
        inner = _keys(field.annotation) if is_section(field.annotation) else ()
        yield from (f"{name}.{key}" for key in inner) if inner else [name]


# what may change between starts of one run: where and how fast, so the same mathematics, rounded otherwise at most.
# eval.path is not among them (without it, images are held out of training), nor is data.decoder (other pixels)
IMMATERIAL = (
    *("checkpoint", "log", "eval.every", "eval.count", "data.cache_mb", "data.max_bad"),
    *(f"rollout.{key}" for key in ("wave_rows", "wave_groups", "batch_invariant", "look_every", "cuda_graphs")),
    *(f"train.{key}" for key in ("threads", "device", "token_budget", "replicate", "recompute", "compile")),
)
PLACES = ("model.path", "data.path", "eval.path")
TASK_PLACE = re.compile(r"tasks\.[^.]+\.(path|root)")  # and these
NEWER = (("data.exclude", None), ("tasks", {}))  # than runs whose names are hashes of all settings


def _material(tree) -> dict:
    """Settings that alter a run's result, by dotted key. The number of steps does where the schedule depends on it."""
    constant = tree["optim"]["schedule"] == "constant"

    def leaves(node, path):
        for key, value in node.items():
            where = f"{path}{key}"
            if where in IMMATERIAL or (where == "train.steps" and constant):
                continue
            if (where, value) in NEWER:
                continue
            if isinstance(value, dict) and value and where not in PLACES:
                yield from leaves(value, f"{where}.")
            else:
                yield where, value

    return dict(leaves(tree, ""))


def check_unchanged(started: Path, config: Config, same_images=lambda: False) -> str:
    """Compare with the configuration that a run was started with. Raises ConfigError with every difference that alters
    the result, unless checkpoint.allow_change. same_images: asked where data.path is another place; whether it holds
    the run's images. Returns a line on that, "" where there is nothing to say."""
    try:
        was = check(of_run(started))  # settings that are newer than the run: by their defaults
    except ConfigError as error:
        raise ConfigError(f"{started}: {str(error).removeprefix(f'{started}: ')}") from None
    before, now = (_material(c.model_dump(mode="json")) for c in (was, config))
    differ = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    differ = [k for k in differ if not (_is_place(k) and _one_place(before.get(k), now.get(k)))]
    moved = "data.path" in differ and same_images()
    if moved:
        differ.remove("data.path")
    changes = [f"{k}: {before.get(k)} → {now.get(k)}" for k in differ]
    if changes and not config.checkpoint.allow_change:
        raise ConfigError(
            f"{started.parent} was started with other settings ({', '.join(changes)}): give this run a log.name of "
            "its own, or set checkpoint.allow_change=true"
        )
    places = f"{before.get('data.path')} → {now.get('data.path')}"
    return f"data.path: {places}, the same images by name and size: the run goes on with them" if moved else ""


def _is_place(key) -> bool:
    return key in PLACES or TASK_PLACE.fullmatch(key) is not None


def _one_place(a, b) -> bool:
    """Whether two paths, or lists of sources, as seen from here, lead to the same files or folders."""

    def real(value):
        if isinstance(value, list):
            return [real(one) for one in value]
        return {**value, "path": real(value["path"])} if isinstance(value, dict) else os.path.realpath(value)

    return a is not None and b is not None and real(a) == real(b)


def of_run(path) -> dict:
    """What a run's own config.yaml holds, which `dump` wrote. Raises ConfigError for one that is empty, or that isn't
    one."""
    try:
        tree = parse(Path(path).read_text(encoding="utf-8"), Config, str(path))
    except (OSError, ValueError, yaml.YAMLError) as error:
        tree = " ".join(str(error).split())
    if not isinstance(tree, dict):
        why = "it is empty" if tree is None else tree if isinstance(tree, str) else f"it is a {type(tree).__name__}"
        raise ConfigError(
            f"{path}: not the configuration that a run was started with ({why[:200]}): put that file back, or start a "
            "run of another log.name"
        )
    return tree


def check(tree: dict, data=True) -> Config:
    """A Config from a nested dict; without `data` it need not say which images. Raises ConfigError, one line that names
    the key."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None
    if data and config.data.path is None:
        raise ConfigError(f"data.path is missing; it takes {type(config.data).model_fields['path'].description}")
    return config


def _explain(error) -> str:
    path = ".".join(map(str, error["loc"]))
    if not path:  # a check over several keys, which words its own line
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    owner, field = Config, None
    for part in error["loc"]:
        if get_origin(owner) is dict and is_section(get_args(owner)[1]):
            owner = get_args(owner)[1]
            continue
        fields = getattr(owner, "model_fields", {})
        if part not in fields:
            break
        field, owner = fields[part], fields[part].annotation
    if error["type"] == "extra_forbidden":
        known, others = list(getattr(owner, "model_fields", {})), meant(path)
        if others != [path]:
            return f"{path} is not a setting; did you mean {' or '.join(others)}?"
        return f"{path} is not a setting; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{path} is missing; it takes {field.description or 'a section'}"
    takes = ", ".join(map(repr, _literals(field.annotation))) if error["type"] == "literal_error" else None
    if error["type"] == "model_type":
        return f"{path} is {_shown(error['input'])}: it is a section, of {', '.join(owner.model_fields)}"
    what = f"one of {takes}" if takes else error["msg"][0].lower() + error["msg"][1:]
    if error["input"] is None and field is not None and is_text(field.annotation):
        return f'{path} is empty; it takes {field.description} (in a file, ~ or null as text goes into quotes: "~")'
    about = f" ({field.description})" if field is not None and field.description else ""
    return f"{path} is {_shown(error['input'])}: {what}{about}"


def _shown(value) -> str:
    try:
        return cut(repr(value), 200)
    except (ValueError, RecursionError):
        return "a number of thousands of digits"


def _literals(annotation):
    """Values of a Literal, or of the one in a union with None."""
    return [value for part in get_args(annotation) for value in (get_args(part) or [part]) if value is not type(None)]


def dump(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
