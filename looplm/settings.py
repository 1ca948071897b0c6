"""Strict sections of settings: frozen, explained field by field, with faults told in one line.

Recipes are built of them. An unknown key is an error that names the nearest known one, a value out of range an error
that names the key, the value and what is accepted.
"""

import difflib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict about keys, its fields explained by the text under each."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def validated(cls, values: Any, name: str) -> Self:
        """This section from plain values, e.g. as read from YAML.

        Args:
            name: what a fault is told about, e.g. the path of the file.

        Raises:
            ValueError: one line with the first fault, its key, value and remedy.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{name}: a mapping is needed, with the keys {', '.join(cls.model_fields)}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{name}: {_first_fault(cls, error)}") from None

    @classmethod
    def read(cls, path: str | Path, example: str) -> Self:
        """This section from a recipe file.

        Args:
            example: a shipped recipe of this kind, named where there is no such file.

        Raises:
            ValueError: no such file, not YAML, or a fault in it.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no such recipe: {path}; see recipes/{example} for an example")
        try:
            return cls.validated(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _first_fault(section: type[Section], error: ValidationError) -> str:
    """The first fault in words; a mistyped key comes before the missing one that it was meant to be."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault, places = faults[0], _places(faults[0])
    key = ".".join(places)
    if fault["type"] == "extra_forbidden":
        known = _keys(section, places[:-1])
        nearest = difflib.get_close_matches(places[-1], known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if fault["type"] == "missing":
        return f"{key} is missing"
    reasons = [other["msg"].removeprefix("Value error, ") for other in faults if _places(other) == places]
    reason = ", or ".join(dict.fromkeys(reasons))
    return f"{key} is {fault['input']!r}: {reason}" if key else reason


def _places(fault: ErrorDetails) -> list[str]:
    """Where a fault is, without the alternative of a union that it is about."""
    return [str(part) for part in fault["loc"] if not str(part).startswith(("constrained-", "literal["))]


def _keys(section: type[Section], places: list[str]) -> list[str]:
    """The known keys of the section found at `places` below another one."""
    found: Any = section
    for place in places:
        found = found.model_fields[place].annotation if _is_section(found) else get_args(found)[-1]
        found = next((part for part in _alternatives(found) if part is not types.NoneType), found)
    return list(found.model_fields) if _is_section(found) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without the metadata of `Annotated`; another annotation is the only one of itself."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that was probably meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
