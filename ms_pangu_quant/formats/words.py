"""The words that MindFormers' and msModelSlim's descriptions have for a layer's scheme; no other room spells them."""

from __future__ import annotations

from typing import Any

from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.recipe.scheme import PRESETS, W4A8, W8A8, W8A8_STATIC, Arithmetic, QuantScheme

FLOAT = "FLOAT"
INT8_CACHE_WORD = "C8"
WORDS: dict[Arithmetic, str] = {W8A8_STATIC: "W8A8", W8A8: "W8A8_DYNAMIC", W4A8: "W4A8_DYNAMIC"}


def word_of(scheme: QuantScheme | None) -> str:
    return FLOAT if scheme is None else WORDS[scheme.arithmetic]


def scheme_of(word: Any, group_size: int, where: str) -> QuantScheme | None:
    """The scheme of a layer that is described so. group_size is that of int4 layers; 0 is one scale per output channel.

    Raises CheckpointError for another word.
    """
    if word == FLOAT:
        return None
    for preset in PRESETS.values():
        if WORDS[preset.arithmetic] == word:
            return preset.grouped(group_size) if preset.weight.bits == 4 else preset
    raise CheckpointError(f"{where} is {word!r}, wanted one of {', '.join((*WORDS.values(), FLOAT))}")
