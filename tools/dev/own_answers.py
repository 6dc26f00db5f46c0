#!/usr/bin/env python3
"""Does it pay to calibrate on a model's own answers? The tables of docs/calibration.md.

Each row is a source of calibration text, a recipe and a number of rows, quantized with each draw of that text and compared
with the float model on the same validation text: the mean KL over the draws, and how far the draws are apart. A draw of
own answers is `calibrate` with another seed, one of a file is the recipe's `calibration.seed`. Rows are never cut short by
the recipe's limit of tokens, which is lifted.

The embedded checkpoints' validation text is validation.jsonl, 120 chats. The real model (tools/real/checkpoint.py) has
two: Python's standard library, and answers of its own to prompts that calibration did not use.

Records are appended to WORK/records.jsonl; a run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np
import yaml

from ms_pangu_quant import ASSETS, CalibrationRequest, calibrate, compare, quantize
from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.evaluation.samples import Journal, read_records, write_pieces
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.recipe.parse import find_recipe
from tools.peers.compare import markdown, number
from tools.peers.measure import ROOT

OWN, PLAIN = "own answers", "plain"


@dataclass(frozen=True)
class Model:
    """cases: (recipe, rows, draws). plain is the file that own answers are held against; texts name -> (file, rows)."""

    name: str
    checkpoint: Path
    plain: Path
    cases: Sequence[tuple[str, int, int]]
    texts: Mapping[str, tuple[Path, int]]
    own: Mapping[str, Any]
    kept_back: int = 0


def models(work: Path, real: Path | None) -> list[Model]:
    validation = {"KL": (ASSETS / "validation.jsonl", 120)}
    plain = ASSETS / "calibration.jsonl"
    sizes = [(recipe, rows, 3) for rows in (128, 32, 224, 64) for recipe in ("w4a8", "w8a8")]  # what matters most first
    found = [
        Model("openpangu-mini", ASSETS / "openpangu-mini", plain, sizes, validation, {"samples": 224}),
        Model(
            "openpangu-mini-tied",
            ASSETS / "openpangu-mini-tied",
            plain,
            [("w8a8", 128, 3), ("w4a8", 128, 3)],
            validation,
            {"samples": 224},
        ),
    ]
    if real is not None:
        kept = work / "smollm2" / "kept_back.jsonl"
        texts = {"KL, standard library": (real / "validation.jsonl", 24), "KL, own answers": (kept, 24)}
        found.append(
            Model(
                "smollm2",
                real / "smollm2",
                real / "calibration.jsonl",
                [("w8a8", 48, 1), ("w4a8", 48, 1)],
                texts,
                {"samples": 78, "max_new_tokens": 512},
                kept_back=24,
            )
        )
    return found


def own_answers(model: Model, seed: int, work: Path) -> Path:
    """Made if they are not there; the last `kept_back` rows apart, of which none has a prompt of the others."""
    made = calibrate(CalibrationRequest(model.checkpoint, seed=seed, **model.own), work / f"own_{seed}.jsonl", resume=True)
    if not model.kept_back:
        return made.output
    lines = made.output.read_bytes().splitlines(keepends=True)
    used, kept = lines[: -model.kept_back], lines[-model.kept_back :]
    prompts = [{json.loads(line)["prompt"] for line in part} for part in (used, kept)]
    if prompts[0] & prompts[1]:
        raise PanguQuantError(f"{made.output}: a prompt is in both parts; ask for fewer samples")
    write_pieces(work / "kept_back.jsonl", kept)
    write_pieces(work / f"used_{seed}.jsonl", used)
    return work / f"used_{seed}.jsonl"


def measure(model: Model, work: Path, said: Callable[[str], None]) -> list[dict[str, Any]]:
    folder = work / model.name
    path = folder / "records.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(path) as journal:
        known = {tuple(record["key"]): record for _, record in read_records(path)}
        for recipe, rows, draws in model.cases:
            for source in (PLAIN, OWN):
                for draw in range(draws):
                    key = (source, recipe, rows, draw)
                    if key not in known:
                        said(f"{model.name}: {', '.join(map(str, key))}")
                        known[key] = {"key": key, **_measured(model, folder, source, recipe, rows, draw)}
                        journal.append(known[key])
    return list(known.values())


def _measured(model: Model, folder: Path, source: str, recipe: str, rows: int, draw: int) -> dict[str, Any]:
    file = own_answers(model, draw, folder) if source == OWN else model.plain
    if model.kept_back:
        own_answers(model, 0, folder)  # also what is measured on
    content = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))
    samples = round(rows / 1.125)  # one in nine is held out
    content["calibration"] = {"samples": samples, "max_length": 512, "seed": draw}
    output = folder / "quantized"
    shutil.rmtree(output, ignore_errors=True)
    quantize(model.checkpoint, content, output, calibration=file)
    used = json.loads((output / "quantization_report.json").read_text())["calibration"]
    found = {}
    for name, (texts, limit) in model.texts.items():
        compared = compare(model.checkpoint, output, texts, limit=limit, max_length=512)
        found[name] = {"kl": compared.kl_mean, "se": compared.kl_se}
    shutil.rmtree(output)
    return {"tokens": used["tokens"], "rows": used["sequences"], "kl": found}


def table(model: Model, records: Sequence[Mapping[str, Any]]) -> str:
    titles = ["recipe", "rows", "text", "tokens"]
    for name in model.texts:
        titles += [name, "s.e.", "draws"]
    lines = [titles, ["---", "---:", "---", *["---:"] * (len(titles) - 3)]]
    for recipe, rows, _ in sorted(model.cases):
        for source in (PLAIN, OWN):
            mine = [record for record in records if tuple(record["key"][:3]) == (source, recipe, rows)]
            if not mine:
                continue
            cells = [f"`{recipe}`", str(rows), source, f"{np.mean([record['tokens'] for record in mine]):,.0f}"]
            for name in model.texts:
                kls = [record["kl"][name]["kl"] for record in mine]
                spread = f"{number(min(kls))} to {number(max(kls))}" if len(kls) > 1 else "one"
                error = np.mean([record["kl"][name]["se"] for record in mine])
                cells += [number(float(np.mean(kls))), number(float(error), 1), spread]
            lines.append(cells)
    return markdown(lines)


def tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/dev/own_answers.py --work own --only openpangu-mini")
    parser.add_argument("--work", type=Path, default=ROOT / "accuracy_output" / "own_answers", help="folder of records")
    parser.add_argument("--real", type=Path, help="folder that tools/real/checkpoint.py made; without it no real model")
    parser.add_argument("--as-is", action="store_true", help="tables of what has been measured so far, measure nothing")
    parser.add_argument("--only", nargs="+", help="these models alone")
    chosen = parser.parse_args(arguments)
    try:
        for model in models(chosen.work, chosen.real):
            if not chosen.only or model.name in chosen.only:
                path = chosen.work / model.name / "records.jsonl"
                records = (
                    [record for _, record in read_records(path)] if chosen.as_is else measure(model, chosen.work, tell)
                )
                print(f"{model.name}\n\n{table(model, records)}\n", flush=True)
    except PanguQuantError as error:
        print(f"own_answers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
