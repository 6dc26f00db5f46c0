"""What the settings of a recipe have in common: frozen dataclasses of plain values, told apart by what they say."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ms_pangu_quant.errors import RecipeError


def setting_names(kind: Any) -> list[str]:
    """Fields that a recipe can fill; needs_* are what an algorithm asks for, not settings."""
    return [field.name for field in dataclasses.fields(kind) if not field.name.startswith("needs_")]


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
