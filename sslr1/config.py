"""Configuration: one YAML file a run plus dotted overrides, checked before anything else is done.

Unknown keys, wrong types and values out of range end with one clear line. The keys themselves stand in `sslr1.settings`.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import get_args

import yaml
from pydantic import ValidationError

from sslr1.settings import Config, ConfigError, cut, nearest


def load(path, overrides=()) -> Config:
    """Read a YAML file (None: begin with nothing), apply `section.key=value` overrides, check everything. Raises ConfigError,
    one line."""
    try:
        text = Path(path).read_text(encoding="utf-8") if path else ""
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, and names with a NUL in them
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"configuration {str(path)!r} can't be read: {why}") from None
    try:
        tree = _parse(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration {str(path)!r} must hold sections, not a {type(tree).__name__}")
    tree = {name: {} if section is None else section for name, section in tree.items()}  # "optim:" and nothing below it
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not an override: write section.key=value")
        node = tree
        *sections, leaf = key.split(".")
        for depth, section in enumerate(sections):
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {'.'.join(sections[: depth + 1])} is a value, not a section")
        try:
            node[leaf] = _parse(value)
        except yaml.YAMLError:
            node[leaf] = value
    config = check(tree)
    if config.log.name is None:
        material = json.dumps(_material(config.model_dump(mode="json")), sort_keys=True)
        name = f"{Path(path or 'run').stem}-{hashlib.blake2b(material.encode(), digest_size=3).hexdigest()}"
        config = config.model_copy(update={"log": config.log.model_copy(update={"name": name})})
    return config


def _parse(text):
    """YAML's value. Raises YAMLError, and nothing else: PyYAML lets through whatever int(), date() and the like raise."""
    try:
        return yaml.safe_load(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


# what may change between starts of one run: where and how fast, so the same mathematics, rounded otherwise at most.
# eval.path is not among them (without it, images are held out of training), nor is data.decoder (other pixels)
IMMATERIAL = (
    *("checkpoint", "log", "eval.every", "eval.count", "data.cache_mb", "data.max_bad"),
    *(f"rollout.{key}" for key in ("wave_rows", "wave_groups", "batch_invariant", "look_every", "cuda_graphs")),
    *(f"train.{key}" for key in ("threads", "device", "token_budget", "replicate", "recompute", "compile")),
)
PLACES = ("model.path", "data.path", "eval.path")


def _material(tree) -> dict:
    """Settings that alter a run's result, by dotted key. The number of steps does where the schedule depends on it."""
    constant = tree["optim"]["schedule"] == "constant"

    def leaves(node, path):
        for key, value in node.items():
            where = f"{path}{key}"
            if where in IMMATERIAL or (where == "train.steps" and constant):
                continue
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{where}.")
            else:
                yield where, value

    return dict(leaves(tree, ""))


def check_unchanged(started: Path, config: Config) -> None:
    """Compare with the configuration that a run was started with. Raises ConfigError with every difference that alters the
    result, unless checkpoint.allow_change."""
    try:
        was = check(of_run(started))  # settings that are newer than the run: by their defaults
    except ConfigError as error:
        raise ConfigError(f"{started}: {str(error).removeprefix(f'{started}: ')}") from None
    before, now = (_material(c.model_dump(mode="json")) for c in (was, config))
    differ = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    differ = [k for k in differ if not (k in PLACES and _one_place(before.get(k), now.get(k)))]
    changes = [f"{k}: {before.get(k)} → {now.get(k)}" for k in differ]
    if changes and not config.checkpoint.allow_change:
        raise ConfigError(
            f"{started.parent} was started with other settings ({', '.join(changes)}): give this run a log.name of its own, "
            "or set checkpoint.allow_change=true"
        )


def _one_place(a, b) -> bool:
    """Whether two paths, as seen from here, lead to one file or folder."""
    return a is not None and b is not None and os.path.realpath(a) == os.path.realpath(b)


def of_run(path) -> dict:
    """What a run's own config.yaml holds, which `dump` wrote. Raises ConfigError for one that is empty, or that isn't one."""
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        tree = " ".join(str(error).split())
    if not isinstance(tree, dict):
        why = "it is empty" if tree is None else tree if isinstance(tree, str) else f"it is a {type(tree).__name__}"
        raise ConfigError(
            f"{path}: not the configuration that a run was started with ({why[:200]}): put that file back, or start a run of "
            "another log.name"
        )
    return tree


def check(tree: dict) -> Config:
    """A Config from a nested dict. Raises ConfigError, one line that names the key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0])) from None


def _explain(error) -> str:
    path = ".".join(map(str, error["loc"]))
    if not path:  # a check over several keys, which words its own line
        return str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
    owner, field = Config, None
    for part in error["loc"]:
        fields = getattr(owner, "model_fields", {})
        if part not in fields:
            break
        field, owner = fields[part], fields[part].annotation
    if error["type"] == "extra_forbidden":
        known = list(getattr(owner, "model_fields", {}))
        return f"{path} is not a setting; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{path} is missing; it takes {field.description or 'a section'}"
    takes = ", ".join(map(repr, _literals(field.annotation))) if error["type"] == "literal_error" else None
    if error["type"] == "model_type":
        return f"{path} is {_shown(error['input'])}: it is a section, of {', '.join(owner.model_fields)}"
    what = f"one of {takes}" if takes else error["msg"][0].lower() + error["msg"][1:]
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
