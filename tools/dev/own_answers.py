#!/usr/bin/env python3
"""Does it pay to calibrate on a model's own answers? The tables of docs/calibration.md.

A row is a recipe, a number of rows and a source of them, quantized with each draw and compared with the float model on the
same texts: the mean KL over the draws, its standard error on one of them, and how far the draws are apart. A draw of own
answers is `calibrate` with another seed, one of a file is the recipe's `calibration.seed`. The recipe's limit of tokens is
lifted, but for the real model's plain text, which is cut to as many tokens as the own answers have.

KL is measured on two texts: one that others wrote, which own answers are not like, and own answers to prompts that
calibration did not use, which is what the model says when it is served.

Records are appended to WORK/MODEL/records.jsonl; a run that was stopped goes on.
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
from ms_pangu_quant.chats.prompts import SHIPPED
from ms_pangu_quant.errors import PanguQuantError, RequestError
from ms_pangu_quant.evaluation.samples import Journal, read_records, write_records
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.recipe.parse import find_recipe
from tools.peers.compare import markdown, number
from tools.peers.measure import ROOT

PLAIN, OWN, GENERAL = "text of others", "own answers", "own answers, the package's prompts"
MAX_LENGTH = 512


@dataclass(frozen=True)
class Model:
    """plain     file of text that others wrote.
    cases        (recipe, rows, draws); sources are those of them that are measured.
    texts        another such file to measure on, and how many of its rows; as many own answers.
    asked        of calibrate.
    """

    name: str
    checkpoint: Path
    plain: Path
    cases: Sequence[tuple[str, int, int]]
    sources: Sequence[str]
    texts: tuple[Path, int]
    asked: Mapping[str, Any]

    @property
    def is_embedded(self) -> bool:
        return self.checkpoint.parent == ASSETS


def models(real: Path | None) -> list[Model]:
    plain, texts, sources = ASSETS / "calibration.jsonl", (ASSETS / "validation.jsonl", 120), (PLAIN, OWN, GENERAL)
    both = ("w4a8", "w8a8")
    found = [
        Model(
            "openpangu-mini",
            ASSETS / "openpangu-mini",
            plain,
            [(recipe, rows, 3) for rows in (128, 32, 64, 224) for recipe in both],  # what matters most first
            sources,
            texts,
            {"samples": 224},
        ),
        Model(
            "openpangu-mini-tied",
            ASSETS / "openpangu-mini-tied",
            plain,
            [(recipe, 128, 1) for recipe in both],
            sources,
            texts,
            {"samples": 128},
        ),
    ]
    if real is not None:
        found.append(
            Model(
                "smollm2",
                real / "smollm2",
                real / "calibration.jsonl",
                [(recipe, 32, 1) for recipe in both],
                (OWN, PLAIN),
                (real / "validation.jsonl", 16),
                {"samples": 48, "max_new_tokens": 256},
            )
        )
    return found


def own_answers(model: Model, source: str, seed: int, folder: Path) -> tuple[Path, Path]:
    """(to calibrate on, to measure on), made if they are not there; no prompt is in both.

    The embedded checkpoints are measured on answers to validation.jsonl's prompts, the others on their last rows.
    """
    if not model.is_embedded:
        path = folder / f"own_{seed}.jsonl"
        made = calibrate(CalibrationRequest(model.checkpoint, seed=seed, **model.asked), path, resume=True)
        rows = [row for _, row in read_records(made.output)]
        used, kept = rows[: -model.texts[1]], rows[-model.texts[1] :]
        if {row["prompt"] for row in used} & {row["prompt"] for row in kept}:
            raise RequestError(f"{made.output}: a prompt is in both parts; ask for fewer samples")
        write_records(folder / f"used_{seed}.jsonl", used)
        write_records(folder / "kept_back.jsonl", kept)
        return folder / f"used_{seed}.jsonl", folder / "kept_back.jsonl"
    prompts, name = (SHIPPED, "general") if source == GENERAL else (None, "own")
    request = CalibrationRequest(model.checkpoint, prompts, seed=seed, **model.asked)
    used_path = calibrate(request, folder / f"{name}_{seed}.jsonl", resume=True).output
    texts, rows_wanted = model.texts
    asked = [row["messages"][1]["content"].partition(" /")[0] for _, row in read_records(texts)][:rows_wanted]
    write_records(folder / "validation_prompts.jsonl", ({"prompt": each} for each in asked))
    request = CalibrationRequest(model.checkpoint, folder / "validation_prompts.jsonl", samples=rows_wanted, seed=99)
    return used_path, calibrate(request, folder / "validation_answers.jsonl", resume=True).output


def measure(model: Model, work: Path, said: Callable[[str], None]) -> list[dict[str, Any]]:
    folder = work / model.name
    path = folder / "records.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(path) as journal:
        known = {tuple(record["key"]): record for _, record in read_records(path)}
        for recipe, rows, draw in _in_turn(model.cases):
            for source in model.sources:
                key = (source, recipe, rows, draw)
                if key not in known:
                    said(f"{model.name}: {', '.join(map(str, key))}")
                    same = known.get((OWN, recipe, rows, draw), {}).get("tokens")
                    known[key] = {"key": key, **_measured(model, folder, key, None if model.is_embedded else same)}
                    journal.append(known[key])
    return list(known.values())


def _in_turn(cases: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """(recipe, rows, draw): of each number of rows the first draws first, so that a run that is stopped has some of all."""
    sizes = dict.fromkeys(rows for _, rows, _ in cases)
    found = [(rows, draw, recipe) for recipe, rows, draws in cases for draw in range(draws)]
    order = sorted(found, key=lambda case: (list(sizes).index(case[0]), case[1]))
    return [(recipe, rows, draw) for rows, draw, recipe in order]


def _measured(model: Model, folder: Path, key: tuple[str, str, int, int], tokens: int | None) -> dict[str, Any]:
    """tokens  that plain text may have at most."""
    source, recipe, rows, draw = key
    own, answers = own_answers(model, source, 0 if source == PLAIN else draw, folder)
    content = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))
    samples = round(rows / 1.125)  # one in nine is held out
    content["calibration"] = {"samples": samples, "max_length": MAX_LENGTH, "seed": draw}
    if source == PLAIN and tokens is not None:
        content["calibration"]["tokens"] = round(tokens / 1.125)
    output = folder / "quantized"
    shutil.rmtree(output, ignore_errors=True)
    quantize(model.checkpoint, content, output, calibration=model.plain if source == PLAIN else own)
    used = json.loads((output / "quantization_report.json").read_text())["calibration"]
    kl = []
    for texts in (model.texts[0], answers):
        found = compare(model.checkpoint, output, texts, limit=model.texts[1], max_length=MAX_LENGTH)
        kl.append((found.kl_mean, found.kl_se))
    shutil.rmtree(output)
    return {"tokens": used["tokens"], "rows": used["sequences"], "kl": kl}


def table(model: Model, records: Sequence[Mapping[str, Any]]) -> str:
    titles = ["recipe", "rows", "calibrated on", "tokens"]
    titles += ["KL, text of others", "s.e.", "draws", "KL, own answers", "s.e.", "draws"]
    lines = [titles, ["---", "---:", "---", *["---:"] * 7]]
    for recipe, rows, _ in sorted(model.cases, key=lambda case: (case[0], case[1])):
        for source in (PLAIN, OWN, GENERAL):
            mine = [record for record in records if tuple(record["key"][:3]) == (source, recipe, rows)]
            if mine:
                tokens = np.mean([record["tokens"] for record in mine])
                cells = [f"`{recipe}`", str(rows), source, f"{tokens:,.0f}"]
                for index in range(2):
                    kls, errors = ([record["kl"][index][figure] for record in mine] for figure in range(2))
                    spread = f"{number(min(kls))} to {number(max(kls))}" if len(kls) > 1 else "one"
                    cells += [number(float(np.mean(kls))), number(float(np.mean(errors)), 1), spread]
                lines.append(cells)
    return markdown(lines)


def tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/dev/own_answers.py --only openpangu-mini")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "accuracy_output" / "own_answers", help="folder of texts and records"
    )
    parser.add_argument("--real", type=Path, help="folder that tools/real/checkpoint.py made; without it no real model")
    parser.add_argument("--as-is", action="store_true", help="tables of what has been measured so far, measure nothing")
    parser.add_argument("--only", nargs="+", help="these models alone")
    chosen = parser.parse_args(arguments)
    try:
        for model in models(chosen.real):
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
