"""What settings are made of: sections, paths, sources of images, and the error of all that is wrong with them."""

import difflib
import os
from pathlib import PurePath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from sslr1.errors import UserError

BUILTIN_IMAGES = "builtin:scenes"
# What is built in, and of which family
BUILTIN_MODELS = {"builtin:tiny": "qwen2_5_vl", "builtin:tiny-qwen3-vl": "qwen3_vl", "builtin:tiny-qwen3.5": "qwen3_5"}


class ConfigError(UserError):
    """A line for the user: the key's full path, the value, what the key takes. What can't be printed is escaped."""

    def __init__(self, text):
        super().__init__(cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), 1500))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits(cls, value):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PydanticCustomError("too_wide", "Input should fit into 64 bits")
        return value


def _tidy(path):
    """One spelling of a path: "~" is the home folder, no slash at its end, none doubled, no "." between two; what is
    built in as it is."""
    if path.startswith("builtin:"):
        if path not in (known := [*BUILTIN_MODELS, BUILTIN_IMAGES]):
            raise PydanticCustomError(
                "builtin", "nothing of that name is built in; {near}", {"near": nearest(path, known)}
            )
        return path
    path = str(PurePath(os.path.expanduser(path)))
    return f"./{path}" if path.startswith("~") else path  # a folder of that name, the next time too


Place = Annotated[str, Field(min_length=1), AfterValidator(_tidy)]


SOURCE = "a source is a path or {path: …, weight: …, column: …}"


class ImageSource(Section):
    """One of several places that images come from, or one whose column is to be named."""

    path: Place
    weight: float | None = Field(None, gt=0)
    column: Annotated[str, Field(min_length=1)] | None = None


def _source(given):
    """A path where that is all that is said."""
    if isinstance(given, dict):
        try:
            given = ImageSource(**given)
        except (ValidationError, TypeError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, first["loc"])) or "a source"
            said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
            raise PydanticCustomError("source", f"{where}: {said}; {SOURCE}") from None
    if isinstance(given, ImageSource) and given.weight is None and given.column is None:
        return given.path
    if not isinstance(given, str | ImageSource) or given == "":
        raise PydanticCustomError("source", SOURCE)
    return given


def _sources(given):
    if not isinstance(given, list):
        found = _source(given)
        return _source(found.model_copy(update={"weight": None})) if isinstance(found, ImageSource) else found
    found = [_source(one) for one in given]
    if not found:
        raise PydanticCustomError("source", "a list of sources has at least one")
    return found if len(found) > 1 else _sources(found[0])


Images = Annotated[Place | ImageSource | list[Place | ImageSource], BeforeValidator(_sources)]
NoImages = Annotated[
    Place | ImageSource | list[Place | ImageSource] | None,
    BeforeValidator(lambda given: given if given is None else _sources(given)),
]


def nearest(name, known):
    close = difflib.get_close_matches(name[:100], known, 1, 0.5)
    return f"did you mean {close[0]}? Known: {', '.join(known)}" if close else f"known: {', '.join(known)}"


def cut(text, length) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
