"""Rows of `pangu-quant bench --json`, read back: latency, speed-up and memory for each batch size."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms_pangu_quant.errors import DataError
from ms_pangu_quant.suggestion import did_you_mean_path

PHASES = ("prefill", "decode")
_NUMBERS = ("batch_size", "prompt_len", "latency_ms", "tokens_per_s", "spread", "peak_rss_gib", "limit_fraction")
Case = tuple[str, int, int]  # phase, prompt length in tokens, batch size


@dataclass(frozen=True)
class Speed:
    """One file. floating is empty where the float model was not measured in turns with the quantized one."""

    name: str
    quantized: Mapping[Case, Mapping[str, Any]]
    floating: Mapping[Case, Mapping[str, Any]]

    def speedup(self, case: Case) -> float | None:
        """Latency of the float model / latency of the quantized one."""
        if case not in self.floating:
            return None
        return float(self.floating[case]["latency_ms"] / self.quantized[case]["latency_ms"])

    @property
    def memory(self) -> float:
        """Most memory the measuring process held, in GiB: of both models where both were measured."""
        return max(float(row["peak_rss_gib"]) for row in self.quantized.values())


def load_speeds(named: Sequence[str]) -> list[Speed]:
    """Each a file or NAME=FILE. Raises DataError where one is not what bench --json prints, or a name is taken."""
    speeds = []
    for text in named:
        name, _, path = text.rpartition("=")
        speeds.append(_load(Path(path), name or Path(path).stem))
    if len({speed.name for speed in speeds}) < len(speeds):
        raise DataError(f"report: two benches are called the same; got {', '.join(named)}, wanted NAME=FILE")
    return speeds


def cases(speeds: Sequence[Speed]) -> list[Case]:
    """Prefill first, short prompts first, small batches first."""
    found = {case for speed in speeds for case in speed.quantized}
    return sorted(found, key=lambda case: (PHASES.index(case[0]), case[1:]))


def _load(path: Path, name: str) -> Speed:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise DataError(
            f"{path}: {reason}{did_you_mean_path(path)}; wanted the output of pangu-quant bench --json"
        ) from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: got no list of rows; wanted the output of pangu-quant bench --json")
    tables: dict[str, dict[Case, Mapping[str, Any]]] = {"quantized": {}, "float": {}}
    for number, row in enumerate(rows, 1):
        for problem in _problems(row):
            raise DataError(f"{path}: row {number} {problem}; wanted the output of pangu-quant bench --json")
        tables[row["model"]][row["phase"], row["prompt_len"], row["batch_size"]] = row
    if not tables["quantized"]:
        raise DataError(f"{path}: no row of a quantized model; bench the quantized directory, with --against its float one")
    return Speed(name, tables["quantized"], tables["float"])


def _problems(row: Any) -> Iterator[str]:
    if not isinstance(row, dict):
        yield "is not an object"
        return
    for field, allowed in (("model", ("float", "quantized")), ("phase", PHASES)):
        if row.get(field) not in allowed:
            yield f"has {field} {row.get(field)!r}"
    for field in _NUMBERS:
        value = row.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            yield f"has {field} {value!r}"
    if row.get("latency_ms") == 0:
        yield "has latency_ms 0"
