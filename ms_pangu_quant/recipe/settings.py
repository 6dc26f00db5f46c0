"""What the settings of a recipe have in common: frozen dataclasses of plain values, of the types that they are annotated
with, told apart by what they say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ms_pangu_quant.errors import RecipeError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def setting_names(kind: Any) -> list[str]:
    """Fields that a recipe can fill."""
    return [field.name for field in dataclasses.fields(kind)]


def check_types(settings: Any, name: str) -> None:
    """For __post_init__. Raises RecipeError if a setting is not what its annotation says; name: what a recipe calls them.

    Ranges, and what goes with what, are the settings' own to check.
    """
    hints = get_type_hints(type(settings))
    for each in setting_names(settings):
        value = getattr(settings, each)
        if not _fits(value, hints[each]):
            raise RecipeError(f"{name}.{each}: got {value!r}, wanted {_wanted(hints[each])}")


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if kind in (Sequence, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(each, arguments[0]) for each in value)
    if hint in (int, float):  # a bool is an int to Python, and neither to us; NaN is below nothing
        number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return number and (hint is int or abs(value) <= sys.float_info.max)
    if hint in (bool, str, NoneType):
        return isinstance(value, hint)
    raise TypeError(f"{hint}: no type of a setting; wanted bool, int, float, str, Literal, a sequence of these, or None")


def _wanted(hint: Any) -> str:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return " or ".join(filter(None, (", ".join(arguments[:-1]), arguments[-1])))
    if kind in (Union, UnionType):
        return " or ".join(_wanted(each) for each in arguments if each is not NoneType)
    return f"a list of {_wanted(arguments[0]).removeprefix('a ')}s" if kind in (Sequence, tuple) else _WORDS[hint]


def digest_of(**parts: Any) -> str:
    """sha256 of what the parts say. Raises RecipeError if one has something that no fields tell from another."""
    told = {name: canonical(part, f"recipe.{name}") for name, part in parts.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def canonical(value: Any, where: str) -> Any:
    """As JSON has it, the same for all that says the same: a dataclass is its type and its fields, 1.0 is 1."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [f"{type(value).__module__}.{type(value).__qualname__}", canonical(fields, where)]
    if isinstance(value, Mapping):
        return {str(key): canonical(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(each, where) for each in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise RecipeError(
        f"{where}: got a {type(value).__name__}, wanted a dataclass of plain values: its fields tell one run from another"
    )
