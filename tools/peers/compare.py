#!/usr/bin/env python3
"""This project beside llm-compressor and msModelSlim: the same checkpoint, calibration data and evaluator for all.

Each tool quantizes the float checkpoint; what it wrote is read back and measured: mean KL to the float model on held-out
text, top-1 agreement, perplexity, pass@1 on the embedded problems, CPU time, peak memory and size (docs/accuracy.md).
WORK/peers.json and WORK/peers.md are written after every row. A run that was stopped goes on with what is missing;
delete WORK (or a row's folder in it) to measure again.

The other tools are no dependency of this project. Make them an environment each, with any Python that has them:
  python -m venv llmc && llmc/bin/pip install llmcompressor==0.14.0.1
  python -m venv slim && slim/bin/pip install msmodelslim==26.1.0 torch==2.13.0 transformers==4.57.1 accelerate
A row whose tool is missing or fails says so in the table.

exit code  0 every row was measured, 3 some were not, 2 the request cannot be done
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

from ms_pangu_quant.errors import PanguQuantError
from ms_pangu_quant.evaluation.samples import write_json, write_pieces
from ms_pangu_quant.job.arguments import Parser
from tools.peers.measure import LLM_COMPRESSOR, MSMODELSLIM, OURS, ROOT, Record, Row, Setting, measure
from tools.peers.quantizers import linear_quant

ASSETS = ROOT / "ms_pangu_quant/assets"
LAYERS = {"targets": "Linear", "ignore": ["lm_head"]}


def compressed(*, bits: int = 8, group_size: int = 0, static: bool = False) -> dict[str, Any]:
    """A modifier's arguments for a scheme that is not among llm-compressor's presets (W8A8; W4A8 in groups of 128)."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group" if group_size else "channel", "symmetric": True}
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor" if static else "token", "dynamic": not static}
    if group_size:
        weights["group_size"] = group_size
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {**inputs, "symmetric": True}}
    return {"ignore": ["lm_head"], "config_groups": {"group_0": group}}


W4A8_CHANNEL, W8A8_STATIC = compressed(bits=4), compressed(static=True)
W4A8_G64 = compressed(bits=4, group_size=64)
SMOOTH_08 = {"SmoothQuantModifier": {"smoothing_strength": 0.8}}
SMOOTH_05 = {"SmoothQuantModifier": {"smoothing_strength": 0.5}}
SPIN = {"SpinQuantModifier": {"rotations": ["R1", "R2"], "transform_type": "hadamard"}}
ITER_SMOOTH = {"type": "iter_smooth", "include": ["*"]}
FLEX_SMOOTH = {"type": "flex_smooth_quant", "include": ["*"]}

FLOAT = Row("float", "float", OURS, "the checkpoint as it is")
W8A8, STATIC, GROUP, CHANNEL = "W8A8", "W8A8, static", "W4A8, groups of 128", "W4A8, per channel"
MIXED = "W4A8 and W8A8, 4.5 bits"
ROWS = (
    FLOAT,
    Row("w8a8", W8A8, OURS, "`w8a8`", "w8a8"),
    Row("w8a8_rtn", W8A8, OURS, "`w8a8_rtn`", "w8a8_rtn"),
    Row("llmc_w8a8_rtn", W8A8, LLM_COMPRESSOR, "RTN", {"QuantizationModifier": {**LAYERS, "scheme": "W8A8"}}),
    Row(
        "llmc_w8a8_gptq",
        W8A8,
        LLM_COMPRESSOR,
        "SmoothQuant 0.8, GPTQ",
        {**SMOOTH_08, "GPTQModifier": {**LAYERS, "scheme": "W8A8"}},
    ),
    Row("slim_w8a8", W8A8, MSMODELSLIM, "minmax", [linear_quant()]),
    Row("slim_w8a8_iter", W8A8, MSMODELSLIM, "iter_smooth, minmax", [ITER_SMOOTH, linear_quant()]),
    Row("w8a8_static", STATIC, OURS, "`w8a8_static`", "w8a8_static"),
    Row(
        "llmc_w8a8_static",
        STATIC,
        LLM_COMPRESSOR,
        "SmoothQuant 0.8, GPTQ",
        {**SMOOTH_08, "GPTQModifier": W8A8_STATIC},
    ),
    Row(
        "slim_w8a8_static",
        STATIC,
        MSMODELSLIM,
        "iter_smooth, minmax, with zero points",
        [ITER_SMOOTH, linear_quant(act="per_tensor", symmetric=False)],
    ),
    Row("w4a8_g128", GROUP, OURS, "`w4a8_g128`", "w4a8_g128"),
    Row("w4a8_g128_rtn", GROUP, OURS, "`w4a8_g128_rtn`", "w4a8_g128_rtn"),
    Row("llmc_w4a8_rtn", GROUP, LLM_COMPRESSOR, "RTN", {"QuantizationModifier": {**LAYERS, "scheme": "W4A8"}}),
    Row(
        "llmc_w4a8_gptq",
        GROUP,
        LLM_COMPRESSOR,
        "SmoothQuant 0.8, GPTQ",
        {**SMOOTH_08, "GPTQModifier": {**LAYERS, "scheme": "W4A8"}},
    ),
    Row(
        "llmc_w4a8_gptq_05",
        GROUP,
        LLM_COMPRESSOR,
        "SmoothQuant 0.5, GPTQ",
        {**SMOOTH_05, "GPTQModifier": {**LAYERS, "scheme": "W4A8"}},
    ),
    Row(
        "llmc_w4a8_spin",
        GROUP,
        LLM_COMPRESSOR,
        "SpinQuant R1 R2, GPTQ",
        {**SPIN, "GPTQModifier": {**LAYERS, "scheme": "W4A8"}},
    ),
    Row(
        "llmc_w4a8_awq",
        GROUP,
        LLM_COMPRESSOR,
        "AWQ",
        {"AWQModifier": {}, "QuantizationModifier": {**LAYERS, "scheme": "W4A8"}},
    ),
    Row("w4a8_mixed", MIXED, OURS, "`w4a8_mixed`", "w4a8_mixed"),
    Row("w4a8", CHANNEL, OURS, "`w4a8`", "w4a8"),
    Row("w4a8_rtn", CHANNEL, OURS, "`w4a8_rtn`", "w4a8_rtn"),
    Row(
        "llmc_w4a8_channel",
        CHANNEL,
        LLM_COMPRESSOR,
        "SmoothQuant 0.8, GPTQ",
        {**SMOOTH_08, "GPTQModifier": W4A8_CHANNEL},
    ),
    Row("slim_w4a8_iter", CHANNEL, MSMODELSLIM, "iter_smooth, ssz", [ITER_SMOOTH, linear_quant(bits=4, method="ssz")]),
    Row("slim_w4a8_flex", CHANNEL, MSMODELSLIM, "flex_smooth, ssz", [FLEX_SMOOTH, linear_quant(bits=4, method="ssz")]),
    Row("slim_w4a8_gptq", CHANNEL, MSMODELSLIM, "iter_smooth, gptq", [ITER_SMOOTH, linear_quant(bits=4, method="gptq")]),
    Row("slim_w4a8_quarot", CHANNEL, MSMODELSLIM, "quarot, ssz", [{"type": "quarot"}, linear_quant(bits=4, method="ssz")]),
)


GROUP_64 = "W4A8, groups of 64"
ONLINE_W8A8, ONLINE_W4A8, CACHED = "W8A8, Hadamard online", "W4A8, Hadamard online", "W8A8, int8 cache"
SPIN_RANDOM = {"SpinQuantModifier": {"rotations": ["R1", "R2"], "transform_type": "random-hadamard"}}  # of 36 * 2^n too


def llmc(name: str, scheme: str, what: str, modifiers: Mapping[str, Any]) -> Row:
    return Row(name, scheme, LLM_COMPRESSOR, what, modifiers)


# On a pretrained model, whose widths 128 does not divide; SpinQuant and AutoRound in each scheme.
REAL_ROWS = (
    FLOAT,
    Row("w8a8", W8A8, OURS, "`w8a8`", "w8a8"),
    Row("w8a8_rtn", W8A8, OURS, "`w8a8_rtn`", "w8a8_rtn"),
    *(row for row in ROWS if row.scheme == W8A8 and row.tool != OURS),
    llmc("llmc_w8a8_spin", W8A8, "SpinQuant R1 R2, GPTQ", {**SPIN_RANDOM, "GPTQModifier": {**LAYERS, "scheme": "W8A8"}}),
    Row("w8a8_online", ONLINE_W8A8, OURS, "`w8a8_online`", "w8a8_online"),
    Row("w8a8_kv8", CACHED, OURS, "`w8a8_kv8`", "w8a8_kv8"),
    *(row for row in ROWS if row.scheme == STATIC),
    llmc("llmc_w8a8_static_spin", STATIC, "SpinQuant R1 R2, GPTQ", {**SPIN_RANDOM, "GPTQModifier": W8A8_STATIC}),
    *(row for row in ROWS if row.scheme == CHANNEL),
    llmc("llmc_w4a8_channel_spin", CHANNEL, "SpinQuant R1 R2, GPTQ", {**SPIN_RANDOM, "GPTQModifier": W4A8_CHANNEL}),
    llmc("llmc_w4a8_channel_autoround", CHANNEL, "AutoRound", {"AutoRoundModifier": {**W4A8_CHANNEL, "iters": 200}}),
    Row("w4a8_online", ONLINE_W4A8, OURS, "`w4a8_online`", "w4a8_online"),
    Row("w4a8_g64", GROUP_64, OURS, "`w4a8_g64`", "w4a8_g64"),
    llmc("llmc_w4a8_g64_gptq", GROUP_64, "SmoothQuant 0.8, GPTQ", {**SMOOTH_08, "GPTQModifier": W4A8_G64}),
    llmc("llmc_w4a8_g64_spin", GROUP_64, "SpinQuant R1 R2, GPTQ", {**SPIN_RANDOM, "GPTQModifier": W4A8_G64}),
    llmc("llmc_w4a8_g64_autoround", GROUP_64, "AutoRound", {"AutoRoundModifier": {**W4A8_G64, "iters": 200}}),
)


def measure_all(
    rows: Sequence[Row], setting: Setting, on_row: Callable[[Sequence[Record]], None] = lambda records: None
) -> list[Record]:
    """The rows' records in order; on_row is called with all that are known after each. Progress goes to stderr."""
    records: list[Record] = []
    for number, row in enumerate(rows, 1):
        place = f"{setting.work.name} {number}/{len(rows)} {row.name}"
        record = measure(row, setting, on_step=lambda step, place=place: print(f"{place}: {step}", file=sys.stderr))
        if "failure" in record:
            print(f"{place}: NOT MEASURED: {record['failure']}", file=sys.stderr)
        records.append(record)
        on_row(records)
    return records


# --- the table ------------------------------------------------------------------------------------------------------


def table(records: Sequence[Record], modes: Sequence[str]) -> str:
    """Markdown; a row for each record, empty cells for what was not measured."""
    titles = ["scheme", "tool", "what", "mean KL, nats", "s.e.", "top-1", "perplexity"]
    titles += [*(f"pass@1, {mode}" for mode in modes), "CPU s", "peak memory", "size"]
    lines = [titles, ["---", "---", "---", *["---:"] * (len(titles) - 3)]]
    lines += [cells(record, modes) for record in records]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table: titles, the line below them, rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(record: Record, modes: Sequence[str]) -> list[str]:
    row = record["row"]
    found = [row["scheme"], row["tool"], row["what"]]
    if "failure" in record:
        return [*found, f"not measured: {record['failure']}", *[""] * (len(modes) + 6)]
    compared, quantized = record.get("compare"), record.get("quantize")
    if compared is None:
        found += ["0" if row["settings"] is None else "", "", "", ""]
    else:
        found += [number(compared["kl_mean"]), number(compared["kl_se"], 1)]
        found += [f"{compared['top1_agreement']:.2%}", f"{compared['ppl_quantized']:.4f}"]
    found += [passed(record, mode) for mode in modes]
    if quantized is None:
        return [*found, "", "", ""]
    sizes = [f"{quantized[name] / 2**20:.{digits}f} MiB" for name, digits in (("peak_bytes", 0), ("bytes", 2))]
    return [*found, f"{quantized['cpu_seconds']:.0f}", *sizes]


def passed(record: Record, mode: str) -> str:
    entry = record.get("evaluate", {}).get(mode)
    return f"{entry['passed'] / entry['problems']:.1%}" if entry else ""


def number(value: float | None, digits: int = 2) -> str:
    if value is None:  # JSON has no infinity
        return "-"
    return f"{value:.{digits}g}" if value >= 1e-4 or value == 0 else f"{value:.{digits - 1}e}"


def ratios(records: Sequence[Record]) -> str:
    """Markdown: in each scheme, the best KL of this project's rows over the best of the others'."""
    best: dict[tuple[str, bool], tuple[float, str]] = {}
    for record in records:
        if "compare" in record and "failure" not in record:
            row = record["row"]
            key = row["scheme"], row["tool"] == OURS
            name = row["what"] if row["tool"] == OURS else f"{row['tool']}, {row['what']}"
            best[key] = min(best.get(key, (float("inf"), "")), (record["compare"]["kl_mean"], name))
    lines = ["| scheme | this project | best of the others | ratio of the KLs |", "|---|---|---|---:|"]
    for scheme in dict.fromkeys(scheme for scheme, _ in best):
        if (scheme, True) in best and (scheme, False) in best:
            (kl, what), (theirs, who) = best[scheme, True], best[scheme, False]
            lines.append(f"| {scheme} | {what}: {number(kl)} | {who}: {number(theirs)} | {kl / theirs:.3f} |")
    return "\n".join(lines)


def provenance(records: Sequence[Record]) -> str:
    """One line: what measured, and which versions were measured."""
    commits = sorted({record["commit"] for record in records if "failure" not in record}) or ["none: nothing was measured"]
    versions = sorted(
        {f"{record['row']['tool']} {record['tool_version']}" for record in records if record.get("tool_version")}
    )
    others = [version for version in versions if not version.startswith(OURS)]
    return f"Measured at commit {', '.join(commits)}{'; ' if others else ''}{', '.join(others)}."


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/peers/compare.py --work accuracy_output --limit 60")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=ASSETS / "openpangu-mini", help="float (embedded one)")
    parser.add_argument("--calibration", type=Path, default=ASSETS / "calibration.jsonl", help="128 of its rows are used")
    parser.add_argument("--texts", type=Path, default=ASSETS / "validation.jsonl", help="held-out rows for the KL")
    parser.add_argument("--limit", type=int, default=120, help="of these rows (default: 120)")
    parser.add_argument("--modes", default="no_think,slow_think", help="of pass@1, separated by commas; '' leaves it out")
    parser.add_argument("--task", default="mini", help="benchmark of pass@1 (default: mini)")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], help="these rows alone")
    add_options(parser)
    chosen = parser.parse_args(arguments)
    rows = [row for row in ROWS if not chosen.only or row.name in chosen.only]
    setting = setting_of(chosen, chosen.checkpoint, chosen.calibration, chosen.texts, chosen.work)
    modes = [mode for mode in chosen.modes.split(",") if mode]
    setting = replace(setting, limit=chosen.limit, modes=modes, task=chosen.task)

    def write(records: Sequence[Record]) -> None:
        write_json(chosen.work / "peers.json", {"provenance": provenance(records), "rows": list(records)})
        text = "\n\n".join([table(records, modes), ratios(records), provenance(records)])
        write_pieces(chosen.work / "peers.md", [text.encode() + b"\n"])

    try:
        records = measure_all(rows, setting, write)
    except PanguQuantError as error:
        print(f"peers/compare: {error}", file=sys.stderr)
        return 2
    print((chosen.work / "peers.md").read_text())
    return 3 if any("failure" in record for record in records) else 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of every tool that measures."""
    parser.add_argument("--work", type=Path, default=ROOT / "accuracy_output", help="folder of checkpoints and records")
    parser.add_argument("--llmcompressor-python", metavar="PYTHON", help="interpreter that has llmcompressor")
    parser.add_argument("--msmodelslim-python", metavar="PYTHON", help="interpreter that has msmodelslim")
    parser.add_argument(
        "--launcher", default="", metavar="COMMAND", help="put in front of each process, such as 'nice -n 10'"
    )


def setting_of(chosen: Any, checkpoint: Path, calibration: Path, texts: Path, work: Path) -> Setting:
    pythons: Mapping[str, str | None] = {
        LLM_COMPRESSOR: chosen.llmcompressor_python,
        MSMODELSLIM: chosen.msmodelslim_python,
    }
    return Setting(checkpoint, calibration, texts, work, pythons=pythons, launcher=chosen.launcher.split())


if __name__ == "__main__":
    sys.exit(main())
