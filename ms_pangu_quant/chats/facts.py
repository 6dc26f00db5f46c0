"""What is known of a file of own answers: what made it, and figures of its rows. Kept in a JSON file beside it.

Holds no times and no paths: the same run writes the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ms_pangu_quant.calibration.data import TokenData, read_data
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer_files import read_json
from ms_pangu_quant.checkpoint.writer import hash_file
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.evaluation.extract import fenced_blocks
from ms_pangu_quant.recipe.recipe import Recipe

Row = Mapping[str, Any]
FAULTS = ("loop", "unfinished thought", "empty", "benchmark")  # what a dropped answer has


def facts_file(output: Path) -> Path:
    return output.with_suffix(".json")


def origin_of(path: Path) -> dict[str, Any] | None:
    """The facts of a file of own answers, read beside it; None for other files, and for one that was changed since."""
    beside = facts_file(path)
    if path.suffix == beside.suffix or not path.is_file() or not beside.is_file():
        return None
    with suppress(CheckpointError):
        found = read_json(beside)
        if found.get("made_by") and found.get("sha256") == hash_file(path):
            return found
    return None


def calibration_data(path: Path, reader: CheckpointReader, recipe: Recipe, *, allow_benchmark_overlap: bool) -> TokenData:
    """As much of a file as the recipe uses, its last rows held out, with what made it."""
    used = recipe.calibration
    data = read_data(
        path, reader.directory, reader.config, used.texts, used.max_length, used.seed,
        tokens=used.all_tokens, allow_benchmark_overlap=allow_benchmark_overlap,
    )  # fmt: skip
    return replace(data, held_out=used.held_out_of(len(data.sequences)), origin=origin_of(path))


def facts_of(rows: Sequence[Row], faults: Sequence[str], too_long: int, wanted: int) -> dict[str, Any]:
    """faults  one for each dropped answer.  too_long  prompts that left no room for one.  wanted  rows."""
    code, characters = 0, 0
    for row in rows:
        answer = row["messages"][-1]["content"].rpartition("[unused17]")[2]
        whole, cut = fenced_blocks(answer)
        code += sum(map(len, [*whole, cut or ""]))
        characters += len(answer)
    modes = {
        mode: {
            "rows": len(mine),
            "tokens": sum(len(row["token_ids"]) for row in mine),
            "thought_tokens": sum(row["thought_tokens"] for row in mine),
        }
        for mode in dict.fromkeys(row["mode"] for row in rows)
        if (mine := [row for row in rows if row["mode"] == mode])
    }
    return {
        "rows": len(rows),
        "wanted": wanted,
        "tokens": sum(len(row["token_ids"]) for row in rows),
        "cut": sum(row["finish_reason"] == "length" for row in rows),
        "modes": modes,
        "kinds": dict(Counter(row["kind"] for row in rows)),
        "languages": dict(Counter(row["language"] for row in rows)),
        "code": round(code / max(characters, 1), 3),
        "dropped": {fault: count for fault in FAULTS if (count := faults.count(fault))},
        "prompts_too_long": too_long,
    }


def told(facts: Mapping[str, Any]) -> str:
    """The line of figures at the end of a run."""
    modes = ", ".join(
        f"{mode} {each['rows']} of {each['tokens']}"
        + (f" ({each['thought_tokens']} thought)" if each["thought_tokens"] else "")
        for mode, each in facts["modes"].items()
    )
    languages = ", ".join(f"{name} {count}" for name, count in facts["languages"].items())
    dropped = ", ".join(f"{name} {count}" for name, count in facts["dropped"].items()) or "none"
    missing = f" of {facts['wanted']}" if facts["rows"] < facts["wanted"] else ""
    skipped = f"; {facts['prompts_too_long']} prompts are longer than the context" if facts["prompts_too_long"] else ""
    return (
        f"{facts['rows']}{missing} rows of {facts['tokens']} tokens: {modes}; prompts: {languages}; code "
        f"{facts['code']:.0%} of what is answered; cut {facts['cut']}; dropped: {dropped}{skipped}"
    )
