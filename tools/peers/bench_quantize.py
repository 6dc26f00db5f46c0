#!/usr/bin/env python3
"""How long post-training quantization takes, and how much memory: this project beside llm-compressor.

Every tool does the same to the same checkpoint: SmoothQuant behind the norms (strength 0.8), then W8A8 rounded to
nearest, one scale for each output channel, on the same 16 sequences of 512 token ids (--samples, --length), and writes
what it made. Each is a process of its own: wall and CPU time and peak resident memory from its start to its end are the
kernel's account of it. In turns, --repeats times; the table has the medians.

llm-compressor runs once on the checkpoint's own bfloat16 and once on float32, which it is given as a Llama
(quantizers.py). It is no dependency of this project; make it an environment, as compare.py says.

The checkpoint: python tools/dev/make_checkpoint.py --shape 1b --output 1b

exit code  0 every row was measured, 3 some were not
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.evaluation.samples import write_json
from ms_pangu_quant.job.arguments import Parser
from tools.peers import quantizers
from tools.peers.measure import LLM_COMPRESSOR, Record, Setting, commit, run

SMOOTH = "  - smooth: {alpha: 0.8, inputs: [attention_input, mlp_input]}"
RECIPES = {"smooth": SMOOTH, "smooth_search": "  - smooth_search"}
ROWS = {
    "pangu-quant": "SmoothQuant 0.8, RTN",
    "pangu-quant, searched": "`w8a8`: strength of each input searched, RTN",
    "llm-compressor float32": "SmoothQuant 0.8, RTN",
    "llm-compressor bfloat16": "SmoothQuant 0.8, RTN",
}
MODIFIERS = {
    "SmoothQuantModifier": {"smoothing_strength": 0.8},
    "QuantizationModifier": {"targets": "Linear", "ignore": ["lm_head"], "scheme": "W8A8"},
}


def command_of(row: str, chosen: argparse.Namespace, output: Path) -> list[str]:
    if row.startswith("pangu-quant"):
        recipe = chosen.work / f"{'smooth_search' if 'searched' in row else 'smooth'}.yaml"
        lines = [
            "why: Time and memory of quantization.",
            "scheme: w8a8",
            "transforms:",
            RECIPES[recipe.stem],
            "rounding: rtn",
            f"calibration: {{samples: {chosen.samples}, max_length: {chosen.length}, seed: 0}}",
        ]
        recipe.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "ms_pangu_quant", "quantize", str(chosen.checkpoint.absolute())]
        data = chosen.work / "calibration" / "token_ids.jsonl"
        command += ["--calibration", str(data.absolute()), "--recipe", str(recipe.absolute())]
        return [*command, "--output", str(output.absolute())]
    dtype = row.rsplit(" ", 1)[1]
    source = chosen.work / dtype
    if not (source / "config.json").exists():
        quantizers.write_source(chosen.checkpoint, source, dtype)
    return quantizers.llmcompressor_command(
        chosen.llmcompressor_python,
        source,
        output,
        MODIFIERS,
        chosen.work / "calibration" / "token_ids.jsonl",
        dtype=dtype,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__, example="python tools/peers/bench_quantize.py 1b --llmcompressor-python llmc/bin/python"
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, default=Path("quantize_times"), help="folder of what is written")
    parser.add_argument("--llmcompressor-python", metavar="PYTHON", help="interpreter that has llmcompressor")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="these rows alone")
    chosen = parser.parse_args(arguments)
    vocabulary = CheckpointReader(chosen.checkpoint).config.vocab_size
    ids = np.random.default_rng(0).integers(3, vocabulary, (chosen.samples, chosen.length)).astype(np.int32)
    quantizers.write_calibration(list(ids), chosen.work / "calibration")
    setting = Setting(chosen.checkpoint, chosen.work, chosen.work, chosen.work)
    records: dict[str, list[Record]] = {row: [] for row in chosen.only}
    for repeat in range(chosen.repeats):
        for number, row in enumerate(chosen.only):
            output = chosen.work / "output"
            shutil.rmtree(output, ignore_errors=True)
            try:
                if row.startswith(LLM_COMPRESSOR):
                    quantizers.version_of(chosen.llmcompressor_python, LLM_COMPRESSOR)
                command = command_of(row, chosen, output)
                records[row].append(run(command, setting, chosen.work / "logs" / f"{number}-{repeat}.log"))
            except quantizers.PeerError as error:
                records[row].append({"failure": str(error)})
            shutil.rmtree(output, ignore_errors=True)
            print(f"{row}: {json.dumps(records[row][-1])}", file=sys.stderr)
            write_json(chosen.work / "times.json", {"commit": commit(), "rows": records})
    print(table(records))
    return 3 if any("failure" in record for found in records.values() for record in found) else 0


def table(records: dict[str, Sequence[Record]]) -> str:
    """Markdown; medians of the repetitions that ended well."""
    lines = ["| tool | what | wall s | CPU s | peak memory GiB |", "|---|---|---:|---:|---:|"]
    for row, found in records.items():
        good = [record for record in found if "failure" not in record]
        if not good:
            lines.append(f"| {row} | {ROWS[row]} | not measured: {found[-1]['failure'] if found else ''} | | |")
            continue
        wall, cpu, peak = (statistics.median(r[key] for r in good) for key in ("wall_seconds", "cpu_seconds", "peak_bytes"))
        lines.append(f"| {row} | {ROWS[row]} | {wall:.0f} | {cpu:.0f} | {peak / 2**30:.2f} |")
    return "\n".join(lines) + f"\n\nMeasured at commit {commit()}."


if __name__ == "__main__":
    sys.exit(main())
