"""The text of settings: YAML, and overrides.

What YAML leaves to the reader is decided by the setting: a text setting has its text as it is written (007, 2024-10-01,
no and 1e-4 are names like any other), a number setting a decimal number (010 is ten, and 1e-4 a number too). A key that
stands twice is an error.
"""

import json
import os
import re
from contextlib import suppress
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import yaml

from sslr1.config.kinds import ConfigError, Section
from sslr1.config.settings import Config

NULL = ("", "~", "null", "Null", "NULL")
NUMBERS = (
    (re.compile(r"[-+]?[0-9][0-9_]*"), int),
    (re.compile(r"[-+]?0x[0-9a-fA-F]+"), lambda digits: int(digits, 16)),
    (re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"), float),
)


class _Loader(yaml.SafeLoader):
    """Plain words are left to the setting that takes them, and a key that stands twice in a mapping is a
    ConfigError."""

    yaml_implicit_resolvers = {}
    source = ""

    def made(self, node, takes):
        """The value of a node for a setting of type `takes` (None: unknown)."""
        takes = _member(takes, node)
        kind = get_origin(takes)
        if isinstance(node, yaml.MappingNode) and node.tag == MAP and (kind is dict or is_section(takes)):
            self.flatten_mapping(node)  # "<<"
            pairs = [(self._key(key), value) for key, value in node.value]
            return {key: self.made(value, within(takes, key)) for key, value in pairs}
        if isinstance(node, yaml.SequenceNode) and node.tag == SEQUENCE and kind in (list, tuple):
            return [self.made(item, get_args(takes)[0]) for item in node.value]
        if is_text(takes):
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
        raise ConfigError(f"{where}: a text setting takes {meant} in quotes: {quoted(meant)}")


PLAIN, MERGE = "sslr1:plain", "tag:yaml.org,2002:merge"
MAP, SEQUENCE = yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, yaml.resolver.BaseResolver.DEFAULT_SEQUENCE_TAG
_Loader.add_implicit_resolver(MERGE, re.compile("<<$"), "<")
_Loader.add_implicit_resolver(PLAIN, re.compile(""), None)
_Loader.add_constructor(PLAIN, lambda loader, node: _plain(node.value, None))


def parse(text, takes, source):
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


def read_override(value, takes, override):
    """An override's value: a text setting's as it stands after the "=", but for quotes around all of it, and null where
    it takes that; other settings' as YAML."""
    if is_text(takes):
        if value[:1] + value[-1:] in ("[]", "{}"):
            with suppress(yaml.YAMLError):
                if _member(takes, yaml.compose(value, _Loader)) is not takes:
                    return parse(value, takes, repr(override))
        if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
            return None if value == "" or (value in NULL and type(None) in get_args(takes)) else value
    try:
        found = parse(value, takes, repr(override))
    except yaml.YAMLError:
        return value
    return found if isinstance(found, str) or not is_text(takes) else value


def _plain(text, takes):
    """What a plain word of a file is to a setting. A truth value stays a word, which pydantic reads where one is
    taken."""
    if text in NULL:
        return None
    if not is_text(takes):
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
        if isinstance(node, yaml.MappingNode) and is_section(part):
            if {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)} & part.model_fields.keys():
                return part
    return takes


def is_section(takes) -> bool:
    return isinstance(takes, type) and issubclass(takes, Section)


def is_text(takes) -> bool:
    if get_origin(takes) in (Literal, Union, UnionType, Annotated):
        return any(map(is_text, get_args(takes)))
    return takes is str or isinstance(takes, str)


def _text_names(section) -> set:
    """The last parts of the keys of text settings."""
    names = set()
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            names |= _text_names(field.annotation)
        elif is_text(field.annotation):
            names.add(name)
    return names


def within(takes, name):
    """The type of what a section or a mapping of type `takes` has under a name, None if that isn't known."""
    if is_section(takes):
        return takes.model_fields[name].annotation if name in takes.model_fields else None
    return get_args(takes)[1] if get_origin(takes) is dict else None


def quoted(text) -> str:
    return json.dumps(text, ensure_ascii=False)


def remedy(text, error) -> str:
    """How to write the line that YAML can't read, where a tab or missing quotes are to blame; "" elsewhere."""
    mark, lines = getattr(error, "problem_mark", None), re.split("\r\n|[\r\n\x85\u2028\u2029]", text)
    if mark is None or mark.line >= len(lines):
        return ""
    if lines[mark.line][mark.column : mark.column + 1] == "\t":
        return "; write spaces in place of the tab"
    entry = re.fullmatch(r"(\s*[\w.]+: +)(\S.*)", lines[mark.line])
    if entry is None or entry[1].strip(" :") not in _text_names(Config):
        return ""
    lines[mark.line] = entry[1] + quoted(entry[2].rstrip())
    try:
        yaml.compose("\n".join(lines), _Loader)
    except (yaml.YAMLError, ConfigError, RecursionError):
        return ""
    return f"; text with such signs goes into quotes: {lines[mark.line].strip()}"
