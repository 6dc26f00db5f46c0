"""Who computes which scheme in which format, and how: what `inspect --servable` prints and `export` refuses by.

The claims are rows of assets/served.yaml, each with its source. The first row of a consumer that applies to a checkpoint
decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import BackendError, RequestError
from ms_pangu_quant.formats.reader import FORMATS
from ms_pangu_quant.formats.words import INT8_CACHE_WORD, WORDS
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import ARITHMETICS, PRESETS, Arithmetic
from ms_pangu_quant.suggestion import did_you_mean

INTEGER = "integer GEMM"
MEMORY = "float GEMM, weights small in memory only"
DEQUANTIZED = "float GEMM on dequantized weights"
REFUSES = "does not load it"
WRONG = "loads it wrongly"
UNKNOWN = "not known"
INT8_CACHE = "int8 cache"
FLOAT_CACHE = "float cache"
SERVED = (INTEGER, MEMORY, INT8_CACHE)
_VERDICTS = (INTEGER, MEMORY, DEQUANTIZED, INT8_CACHE, FLOAT_CACHE, REFUSES, WRONG, UNKNOWN)

KNOWN = ("executed", "read", "unknown")

_FILE = Path(__file__).parent.parent / "assets" / "served.yaml"
_SCHEMES: dict[str, Arithmetic | None] = {  # by their names in the file; None is the cache of keys and values
    **{name: preset.arithmetic for name, preset in PRESETS.items() if not preset.group_size},
    "int8_cache": None,
}


@dataclass(frozen=True)
class Facts:
    """What a row's condition asks of the layers of one arithmetic; None: of an int8 key/value cache.

    group_size 0 is per channel; biased: any has a bias; online_hadamard: as in ModelConfig.
    """

    arithmetic: Arithmetic | None
    group_size: int
    biased: bool
    online_hadamard: bool = False

    @property
    def word(self) -> str:
        return INT8_CACHE_WORD if self.arithmetic is None else WORDS[self.arithmetic]


@dataclass(frozen=True)
class Row:
    """`verdict` for layers of `schemes` in `format`, if they are biased / grouped so / of these group sizes (None: any).

    known: one of KNOWN, how; `source` says where.
    """

    format: str
    schemes: tuple[Arithmetic | None, ...]
    consumer: str
    versions: str
    verdict: str
    note: str
    known: str
    source: str
    biased: bool | None = None
    group_sizes: tuple[int, ...] | None = None

    def applies(self, facts: Facts) -> bool:
        return (
            facts.arithmetic in self.schemes
            and self.biased in (None, facts.biased)
            and (self.group_sizes is None or facts.group_size in self.group_sizes)
        )


@cache
def table() -> tuple[Row, ...]:
    """Every row of assets/served.yaml, in its order."""
    return read_table(_FILE.read_text(encoding="utf-8"), _FILE.name)


def read_table(text: str, where: str) -> tuple[Row, ...]:
    """text is YAML; where is what errors call it. Raises BackendError naming the row and the key."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BackendError(f"{where}: not readable as YAML: {error}") from None
    if not isinstance(raw, dict) or not all(name in FORMATS and isinstance(rows, list) for name, rows in raw.items()):
        raise BackendError(f"{where}: wanted a list of rows below each of {', '.join(FORMATS)}, and nothing else")
    return tuple(
        _row(stored_as, row, f"{where}: {stored_as}: row {number}")
        for stored_as, rows in raw.items()
        for number, row in enumerate(rows, 1)
    )


def _row(stored_as: str, raw: Any, where: str) -> Row:
    if not isinstance(raw, dict):
        raise BackendError(f"{where}: is {raw!r}, wanted {', '.join(_KEYS)}")
    where = f"{where} ({raw.get('consumer')})"
    for key in (*raw, *_TEXTS, "schemes", "verdict", "known"):
        if key not in _KEYS:
            raise BackendError(f"{where}: unknown key {key!r}{did_you_mean(str(key), _KEYS)}; known: {', '.join(_KEYS)}")
        lawful, wanted = _KEYS[key]
        if not lawful(raw.get(key)):
            raise BackendError(f"{where}: {key} is {raw.get(key)!r}, wanted {wanted}")
    return Row(
        format=stored_as,
        schemes=tuple(_SCHEMES[scheme] for scheme in raw["schemes"]),
        verdict=raw["verdict"],
        known=raw["known"],
        biased=raw.get("biased"),
        group_sizes=tuple(raw["group_sizes"]) if "group_sizes" in raw else None,
        **{key: raw[key] for key in _TEXTS},
    )


def _is_list(value: Any, lawful: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(lawful, value))


_TEXTS = ("consumer", "versions", "note", "source")
_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of a row in the file: whether a value is lawful, and what is
    **dict.fromkeys(_TEXTS, (lambda value: isinstance(value, str) and value != "", "a text (a number in quotes)")),
    "schemes": (
        lambda value: _is_list(value, lambda each: each in [*_SCHEMES]),
        f"a list of some of {', '.join(_SCHEMES)}",
    ),
    "verdict": (lambda value: value in _VERDICTS, f"one of: {'; '.join(_VERDICTS)}"),
    "known": (lambda value: value in KNOWN, f"one of: {', '.join(KNOWN)}"),
    "biased": (lambda value: isinstance(value, bool), "true or false"),
    "group_sizes": (
        lambda value: _is_list(value, lambda each: type(each) is int and each >= 0),
        "a list of whole numbers, 0 for per channel",
    ),
}


def facts_of(config: ModelConfig, plan: Plan) -> tuple[Facts, ...]:
    """One for each arithmetic that occurs, and one for an int8 cache."""
    found = []
    for arithmetic in ARITHMETICS:
        layers = [(site, scheme) for _, site, scheme in plan if scheme is not None and scheme.arithmetic == arithmetic]
        if layers:
            biased = any(site in config.biased for site, _ in layers)
            found.append(Facts(arithmetic, layers[0][1].group_size, biased, config.online_hadamard))
    if plan.cache is not None:
        found.append(Facts(None, 0, False, config.online_hadamard))
    return tuple(found)


def rows_for(stored_as: str, facts: Facts) -> list[Row]:
    """One row for each consumer that this project knows of. None but itself knows its online Hadamard."""
    found: dict[str, Row] = {}
    for row in table():
        if row.format == stored_as and row.applies(facts):
            if facts.online_hadamard and not row.consumer.startswith("ms_pangu_quant"):
                note = f"has no Hadamard matrix in front of {layout.DOWN_PROJ.short}_proj"
                row = replace(row, verdict=REFUSES, note=note, known="read", source="-")
            found.setdefault(row.consumer, row)
    return list(found.values())


def check_served(stored_as: str, facts: Iterable[Facts]) -> None:
    """Raises RequestError if no consumer would compute one of these schemes from this format."""
    for each in facts:
        rows = rows_for(stored_as, each)
        if any(row.verdict in SERVED for row in rows):
            continue
        formats = sorted({row.format for row in table()})
        others = [name for name in formats if any(row.verdict in SERVED for row in rows_for(name, each))]
        reasons = "; ".join(f"{row.consumer} {row.versions} {row.verdict}: {row.note}" for row in rows) or "none is known"
        scheme = "an int8 key/value cache" if each.arithmetic is None else each.word
        scheme = f"{each.word} in groups of {each.group_size}" if each.group_size else scheme
        what = f"{scheme}{' with biases' if each.biased else ''} in the {stored_as} format"
        at_all = "" if each.arithmetic is None else ", or --allow-unserved to write it all the same"
        raise RequestError(f"{what}: no program computes it ({reasons}); use --format {' or '.join(others)}{at_all}")
