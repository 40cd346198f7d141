"""Configuration: one YAML file a run plus dotted overrides, checked before anything else is done.

Unknown keys, wrong types and values out of range end with one clear line. The keys themselves stand in
`sslr1.config.settings`.

What YAML leaves to the reader is decided by the setting: a text setting has its text as it is written (007, 2024-10-01,
no and 1e-4 are names like any other), a number setting a decimal number (010 is ten, and 1e-4 a number too). A key that
stands twice is an error.
"""

import hashlib
import json
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from sslr1.config.settings import Config, ConfigError, Section, cut, nearest

NULL = ("", "~", "null", "Null", "NULL")
NUMBERS = (
    (re.compile(r"[-+]?[0-9][0-9_]*"), int),
    (re.compile(r"[-+]?0x[0-9a-fA-F]+"), lambda digits: int(digits, 16)),
    (re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"), float),
)


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
        tree = _parse(text, Config, source) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}{_remedy(text, error)}") from None
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
            takes = _part(takes, part)
        node[leaf] = _given(value, takes, override)
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
        takes = _part(takes, part)
    if takes is not None:  # of a mapping's, too
        return [key]
    return [other for other in _keys(Config) if other.rpartition(".")[2] == key.rpartition(".")[2]] or [key]


def _keys(section):
    for name, field in section.model_fields.items():
        inner = _keys(field.annotation) if _is_section(field.annotation) else ()
        yield from (f"{name}.{key}" for key in inner) if inner else [name]


class _Loader(yaml.SafeLoader):
    """Plain words are left to the setting that takes them, and a key that stands twice in a mapping is a
    ConfigError."""

    yaml_implicit_resolvers = {}
    source = ""

    def made(self, node, takes):
        """The value of a node for a setting of type `takes` (None: unknown)."""
        takes = _member(takes, node)
        kind = get_origin(takes)
        if isinstance(node, yaml.MappingNode) and node.tag == MAP and (kind is dict or _is_section(takes)):
            self.flatten_mapping(node)  # "<<"
            pairs = [(self._key(key), value) for key, value in node.value]
            return {key: self.made(value, _part(takes, key)) for key, value in pairs}
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE and kind in (list, tuple):
            return [self.made(item, get_args(takes)[0]) for item in node.value]
        if _is_text(takes):
            self._check_quotes(node)
        return _plain(node.value, takes) if node.tag in (PLAIN, MERGE) else self.construct_object(node, deep=True)

    def _key(self, node):
        return node.value if node.tag in (PLAIN, MERGE) else self.construct_object(node, deep=True)

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"on line {lines[key.value]} and on line {line}" if line > lines[key.value] else "twice"
                raise ConfigError(f"{self.source}: {key.value} stands {where}: keep one, with all that is meant")
            lines[key.value] = line
        return node

    def _check_quotes(self, node):
        """Raises ConfigError, which shows the quotes, where a text setting has a list or a mapping on its line, or has
        lost what YAML takes for a comment although that names a file."""
        text, (start, end) = node.start_mark.buffer, (node.start_mark.pointer, node.end_mark.pointer)
        meant = text[start:end].rstrip("\n")
        if node.tag == PLAIN:
            comment = re.match(r"[ \t]+#[^\n]*", text[end:].split("\0")[0])
            meant += comment[0].rstrip() if comment else ""
            if not comment or not os.path.exists(os.path.expanduser(meant)):
                return
        elif isinstance(node, yaml.ScalarNode) or "\n" in meant:
            return
        where = f"{self.source}, line {node.start_mark.line + 1}"
        raise ConfigError(f"{where}: a text setting takes {meant} in quotes: {_quoted(meant)}")


PLAIN, MERGE = "sslr1:plain", "tag:yaml.org,2002:merge"
MAP, SEQUENCE = yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG
_Loader.add_implicit_resolver(MERGE, re.compile("<<$"), "<")
_Loader.add_implicit_resolver(PLAIN, re.compile(""), None)
_Loader.add_constructor(PLAIN, lambda loader, node: _plain(node.value, None))


def _parse(text, takes, source):
    """YAML's value for a setting of type `takes`. Raises ConfigError where a key stands twice or quotes are missing,
    and else YAMLError, and nothing else: PyYAML lets through whatever int(), date() and the like raise."""
    try:
        loader = _Loader(text)
        loader.source = source
        node = loader.get_single_node()
        return None if node is None else loader.made(node, takes)
    except ConfigError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def _given(value, takes, override):
    """An override's value: a text setting's as it stands after the "=", but for quotes around all of it, and null where
    it takes that; other settings' as YAML."""
    if _is_text(takes):
        if value[:1] + value[-1:] in ("[]", "{}"):
            with suppress(yaml.YAMLError):
                if _member(takes, yaml.compose(value, _Loader)) is not takes:
                    return _parse(value, takes, repr(override))
        if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
            return None if value == "" or (value in NULL and type(None) in get_args(takes)) else value
    try:
        found = _parse(value, takes, repr(override))
    except yaml.YAMLError:
        return value
    return found if isinstance(found, str) or not _is_text(takes) else value


def _plain(text, takes):
    """What a plain word of a file is to a setting. A truth value stays a word, which pydantic reads where one is
    taken."""
    if text in NULL:
        return None
    if not _is_text(takes):
        for form, number in NUMBERS:
            try:
                if form.fullmatch(text):
                    return number(text.replace("_", ""))
            except ValueError:  # thousands of digits
                break
    return text


def _member(takes, node):
    """Of a setting that takes a text, a section or a list, what a node of YAML is for. A mapping is a section's where
    it has one of its keys: {new} may name a folder."""
    if get_origin(takes) not in (Union, UnionType):
        return takes
    for part in get_args(takes):
        if isinstance(node, yaml.SequenceNode) and get_origin(part) is list:
            return part
        if isinstance(node, yaml.MappingNode) and _is_section(part):
            if {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)} & part.model_fields.keys():
                return part
    return takes


def _is_section(takes) -> bool:
    return isinstance(takes, type) and issubclass(takes, Section)


def _is_text(takes) -> bool:
    if get_origin(takes) in (Literal, Union, UnionType, Annotated):
        return any(map(_is_text, get_args(takes)))
    return takes is str or isinstance(takes, str)


def _text_names(section) -> set:
    """The last parts of the keys of text settings."""
    names = set()
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            names |= _text_names(field.annotation)
        elif _is_text(field.annotation):
            names.add(name)
    return names


def _part(takes, name):
    """The type of what a section or a mapping of type `takes` has under a name, None if that isn't known."""
    if _is_section(takes):
        return takes.model_fields[name].annotation if name in takes.model_fields else None
    return get_args(takes)[1] if get_origin(takes) is dict else None


def _quoted(text) -> str:
    return json.dumps(text, ensure_ascii=False)


def _remedy(text, error) -> str:
    """How to write the line that YAML can't read, where a tab or missing quotes are to blame; "" elsewhere."""
    mark, lines = getattr(error, "problem_mark", None), re.split("\r\n|[\r\n\x85\u2028\u2029]", text)
    if mark is None or mark.line >= len(lines):
        return ""
    if lines[mark.line][mark.column : mark.column + 1] == "\t":
        return "; write spaces in place of the tab"
    entry = re.fullmatch(r"(\s*[\w.]+: +)(\S.*)", lines[mark.line])
    if entry is None or entry[1].strip(" :") not in _text_names(Config):
        return ""
    lines[mark.line] = entry[1] + _quoted(entry[2].rstrip())
    try:
        yaml.compose("\n".join(lines), _Loader)
    except (yaml.YAMLError, ConfigError, RecursionError):
        return ""
    return f"; text with such signs goes into quotes: {lines[mark.line].strip()}"


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
        tree = _parse(Path(path).read_text(encoding="utf-8"), Config, str(path))
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
        if get_origin(owner) is dict and _is_section(get_args(owner)[1]):
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
    if error["input"] is None and field is not None and _is_text(field.annotation):
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
