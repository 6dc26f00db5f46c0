#!/usr/bin/env python3
"""Does it pay to calibrate on a model's own answers? The tables of docs/calibration.md.

A row is a recipe, a number of rows, the tokens that are read of each and a source of them, quantized with each draw and
compared with the float model on the same texts: the mean KL over the draws, its standard error on one of them, and how far
the draws are apart. A draw of own answers is `calibrate` with another seed, one of a file is the recipe's
`calibration.seed`. The recipe's limit of tokens is lifted, but for the real model's plain text beside own answers, which is
cut to as many tokens as those have.

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
MAX_LENGTH = 512  # of the texts that KL is measured on


_AS_MANY_TOKENS = ((32, 256), (64, 128), (16, 512))  # rows and their length


@dataclass(frozen=True)
class Case:
    """length  tokens that are read of a row at most.
    sources    in this order; plain text is cut to the tokens of own answers.
    """

    recipe: str
    rows: int
    draws: int
    sources: Sequence[str]
    length: int = 512


@dataclass(frozen=True)
class Model:
    """plain     file of text that others wrote.
    cases        what matters most first.
    texts        another such file to measure on, and how many of its rows; as many own answers.
    asked        of calibrate.
    """

    name: str
    checkpoint: Path
    plain: Path
    cases: Sequence[Case]
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
            [Case(recipe, rows, 3, sources) for rows in (128, 32, 64, 224) for recipe in both],
            texts,
            {"samples": 224},
        ),
        Model(
            "openpangu-mini-tied",
            ASSETS / "openpangu-mini-tied",
            plain,
            [Case(recipe, 128, 1, sources) for recipe in both],
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
                [Case(recipe, 32, 3, (OWN, PLAIN)) for recipe in both]
                + [Case(recipe, rows, 1, (PLAIN,), length) for recipe in both for rows, length in _AS_MANY_TOKENS]
                + [Case(recipe, 64, 1, (PLAIN,)) for recipe in both],
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
        for case, draw in _in_turn(model.cases):
            for source in case.sources:
                key = (source, case.recipe, case.rows, case.length, draw)
                if key not in known:
                    said(f"{model.name}: {', '.join(map(str, key))}")
                    same = known.get((OWN, *key[1:]), {}).get("tokens")
                    known[key] = {"key": key, **_measured(model, folder, key, None if model.is_embedded else same)}
                    journal.append(known[key])
    return list(known.values())


def _in_turn(cases: Sequence[Case]) -> list[tuple[Case, int]]:
    """Each case and draw: of the cases of a size the first draws first, so that a run that is stopped has some of all."""
    sizes = list(dict.fromkeys((case.rows, case.length) for case in cases))
    found = [(case, draw) for case in cases for draw in range(case.draws)]
    return sorted(found, key=lambda each: (sizes.index((each[0].rows, each[0].length)), each[1]))


def _measured(model: Model, folder: Path, key: tuple[str, str, int, int, int], tokens: int | None) -> dict[str, Any]:
    """tokens  that plain text may have at most."""
    source, recipe, rows, length, draw = key
    own, answers = own_answers(model, source, 0 if source == PLAIN else draw, folder)
    content = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))
    samples = round(rows / 1.125)  # one in nine is held out
    content["calibration"] = {"samples": samples, "max_length": length, "seed": draw}
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
    titles = ["recipe", "rows", "of up to", "calibrated on", "tokens"]
    titles += ["KL, text of others", "s.e.", "draws", "KL, own answers", "s.e.", "draws"]
    lines = [titles, ["---", "---:", "---:", "---", *["---:"] * 7]]
    sizes = dict.fromkeys((case.recipe, case.rows, case.length) for case in model.cases)
    for size in sorted(sizes):
        for source in (PLAIN, OWN, GENERAL):
            mine = [record for record in records if tuple(record["key"][:4]) == (source, *size)]
            if mine:
                tokens = np.mean([record["tokens"] for record in mine])
                cells = [f"`{size[0]}`", *map(str, size[1:]), source, f"{tokens:,.0f}"]
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
                if chosen.as_is:
                    records = [record for _, record in read_records(path)] if path.exists() else []
                else:
                    records = measure(model, chosen.work, tell)
                print(f"{model.name}\n\n{table(model, records)}\n", flush=True)
    except PanguQuantError as error:
        print(f"own_answers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
