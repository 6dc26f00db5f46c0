#!/usr/bin/env python3
"""Put trained runs and their data into a folder as the package ships them.

Writes openpangu-mini/ and openpangu-mini-tied/, calibration.jsonl (chats of the training distribution), validation.jsonl
(chats on combinations of steps held out for choosing), heldout.jsonl and validation_problems.jsonl (problems in HumanEval's
form), beside each checkpoint prompts.jsonl (what `pangu-quant calibrate` asks it), and prints each file's SHA-256. The same
runs give the same bytes. Afterwards put heldout.jsonl's hash into evaluation/tasks/humaneval.py, and run make goldens and
make tables.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

from ms_pangu_quant.checkpoint.writer import hash_file
from ms_pangu_quant.job.arguments import Parser
from tools.embedded.chats import asked, chat
from tools.embedded.problems import problems

ASSETS = Path(__file__).resolve().parents[2] / "ms_pangu_quant/assets"
CHECKPOINTS = ("openpangu-mini", "openpangu-mini-tied")
HELD_OUT = {2: 70, 3: 105, 4: 85, 5: 40}  # steps -> problems
VALIDATION = {2: 47, 3: 70, 4: 57, 5: 26}
PROMPTS = 160
LETTERED = 0.25  # chosen on validation's, so that a float model solves about three of four


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(output: Path, seed: int) -> None:
    """The files of data; they depend on the seed alone."""
    for name, split, count in (("calibration", "train", 256), ("validation", "validation", 600)):
        rng = random.Random(f"{seed} {name}")
        write_rows(output / f"{name}.jsonl", [chat(rng, split) for _ in range(count)])
    for name, split, counts, prefix, drawn in (
        ("heldout", "test", HELD_OUT, "Mini", seed),
        ("validation_problems", "validation", VALIDATION, "MiniValidation", seed + 1),
    ):
        write_rows(output / f"{name}.jsonl", list(problems(drawn, split, counts, prefix, LETTERED)))
    for name in CHECKPOINTS:
        rng = random.Random(f"{seed} prompts")
        (output / name).mkdir(exist_ok=True)
        write_rows(output / name / "prompts.jsonl", [asked(rng, "train") for _ in range(PROMPTS)])


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/embedded/ship.py --untied runs/untied --tied runs/tied")
    parser.add_argument("--untied", type=Path, required=True, help="run of configs/embedded/openpangu-mini.yaml")
    parser.add_argument("--tied", type=Path, required=True, help="run of configs/embedded/openpangu-mini-tied.yaml")
    parser.add_argument("--output", type=Path, default=ASSETS, help="the package's assets")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    for name, run in zip(CHECKPOINTS, (chosen.untied, chosen.tied), strict=True):
        if not (run / "checkpoint/config.json").is_file():
            print(
                f"embedded/ship: {run}: holds no checkpoint/; wanted a finished run of tools/embedded/train.py",
                file=sys.stderr,
            )
            return 2
        shutil.copytree(run / "checkpoint", chosen.output / name, dirs_exist_ok=True)
    write_data(chosen.output, chosen.seed)
    for path in sorted(chosen.output.glob("*.jsonl")) + sorted(chosen.output.glob("openpangu-mini*/*")):
        print(f"{hash_file(path)}  {path.relative_to(chosen.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
