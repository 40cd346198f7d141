"""Fuzz of the configuration: whatever the file and the overrides hold, there is a Config that survives being written
and read, or one line that says what is wrong."""

import math
import tempfile
from pathlib import Path

import yaml
from hypothesis import strategies as st

from sslr1 import config
from sslr1.config.kinds import Section


def _fields(section, path=()):
    for name, field in section.model_fields.items():
        yield (*path, name), field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, (*path, name))


FIELDS = dict(_fields(config.Config))
KEYS = sorted(FIELDS)
WORDS = [
    "rotation",
    "ordering",
    "adaptive",
    "cosine",
    "gspo",
    "none",
    "null",
    "true",
    "1e-3",
    "12",
    "",
    "a\nb",
    "~",
    "=",
    "٣",
]
NUMBERS = [
    0,
    -1,
    1,
    7,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    1e-300,
    1e308,
    -0.0,
    0.5,
    math.inf,
    -math.inf,
    math.nan,
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.text(max_size=12),
    st.binary(max_size=4),
    st.dates(),
    st.builds(pow, st.just(16), st.just(5000)),  # more digits than Python writes
)
NAMES = st.one_of(
    st.sampled_from(sorted({name for key in KEYS for name in key})), st.sampled_from(WORDS), st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(NAMES, st.integers(), st.none()), inner, max_size=3)
    ),
    max_leaves=6,
)


def _fitting(annotation):
    """Values that a setting of this type is likely to take."""
    text = str(annotation)
    if "Literal" in text:
        return st.sampled_from(config.file._literals(annotation))
    if "dict" in text:
        return st.dictionaries(st.sampled_from(["rotation", "ordering", "similarity"]), st.integers(1, 4), max_size=3)
    if "tuple" in text:
        return st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(list)
    kinds = {
        "bool": st.booleans(),
        "int": st.integers(100, 400),
        "float": st.floats(0.01, 0.99),
        "str": st.text(max_size=9),
    }
    return st.one_of([kind for name, kind in kinds.items() if name in text] + [st.none()] * ("None" in text))


SETTINGS = [(key, field) for key, field in FIELDS.items() if "config" not in str(field.annotation)]
FIT = st.sampled_from(SETTINGS).flatmap(lambda pair: st.tuples(st.just(pair[0]), _fitting(pair[1].annotation)))
ANY = st.tuples(st.one_of(st.sampled_from(KEYS), st.lists(NAMES, min_size=1, max_size=3).map(tuple)), VALUES)
EDITS = st.one_of(
    st.lists(FIT, max_size=8),
    st.tuples(st.lists(FIT, max_size=3), st.lists(ANY, max_size=3)).map(lambda two: two[0] + two[1]),
)
FRAGMENTS = [
    "{",
    "}",
    "[",
    "]",
    ":",
    "- ",
    "&a ",
    "*a",
    "!!int ",
    "!!binary ",
    "!!timestamp ",
    "!!set ",
    "!!float ",
    "? ",
    "\n",
    "  ",
    "'",
    '"',
]
FRAGMENTS += [
    "\\ud800",
    "2001-99-99",
    "0b_",
    "0x_",
    "1:99",
    "9" * 5000,
    "[" * 1500,
    "model:",
    "optim:",
    "\t",
    "\x85",
    "<<: ",
    "|",
    ".nan",
    "%YAML 9",
]
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), NAMES), max_size=12).map("".join)
SCALARS = st.one_of(st.sampled_from(NUMBERS).map(str), st.sampled_from(WORDS), st.text(max_size=12), TEXTS)
OVERRIDES = st.lists(
    st.one_of(st.tuples(st.sampled_from(KEYS).map(".".join), SCALARS).map("=".join), st.text(max_size=12)), max_size=3
)
GOOD = {"model": {"path": "m"}, "data": {"path": "d"}}


def edited(edits):
    """A good tree with some of it replaced."""
    tree = {name: dict(section) for name, section in GOOD.items()}
    for key, value in edits:
        node = tree
        for name in key[:-1]:
            inner = node.get(name)
            node[name] = inner = inner if isinstance(inner, dict) else {}
            node = inner
        node[key[-1]] = value
    return tree


def survives(load):
    """Whether load() gives a Config; then it is itself when it has been written and read. Anything but a ConfigError of
    one line is a failure."""
    try:
        found = load()
    except config.ConfigError as error:
        assert str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 2000, str(error)[:3000]
        return False
    again = config.check(yaml.safe_load(config.dump(found)))
    assert again == found and config.dump(again) == config.dump(found)
    return True


def check_tree(edits):
    tree = edited(edits)
    survives(lambda: config.check(tree))


def check_file(content, overrides):
    """content: bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(content)
        survives(lambda: config.load(path, overrides))


def dumped(tree) -> bytes:
    """As YAML, where YAML can hold it; else nothing."""
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode()
    except (ValueError, yaml.YAMLError):
        return b""


CONTENTS = st.one_of(
    EDITS.map(edited).map(dumped), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=30)
)


CHECKS = [(EDITS, check_tree), (st.tuples(CONTENTS, OVERRIDES), lambda case: check_file(*case))]
