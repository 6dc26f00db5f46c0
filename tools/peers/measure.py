"""One row of a table: quantize a checkpoint with some tool, measure what came out, keep the record.

Every row is measured by the same commands of this project, whichever tool rounded it: `pangu-quant compare` and
`pangu-quant evaluate` read the other tools' formats, so weights, smoothing and rotations are those on disk and activations
are rounded as the description says. Each step is a process of its own, whose CPU time and peak memory are the kernel's
account of it (start and imports included; CPU time, because it does not depend on what else the machine does).

A row is a directory: checkpoint/ (what the tool wrote), evaluation/, logs, record.json. A step that the record has is not
done again, as long as row, tool and data are the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ms_pangu_quant.calibration.data import load_token_data
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer import find_tokenizer
from ms_pangu_quant.evaluation.samples import write_json
from ms_pangu_quant.formats.reader import QuantizedReader, open_checkpoint
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.recipe.recipe import CalibrationSettings
from tools.peers import quantizers

ROOT = Path(__file__).resolve().parents[2]
OURS, LLM_COMPRESSOR, MSMODELSLIM = "pangu-quant", "llm-compressor", "msmodelslim"
AMOUNT = CalibrationSettings(samples=128, max_length=512, tokens=24576, seed=0)  # as the shipped recipes; for every tool
Record = dict[str, Any]

# Between us and the process: a fork of this large one would begin with our peak memory as its own, a fork of a small one
# does not, and what the launcher waits is not counted.
METER = """
import json, resource, subprocess, sys, time
began = time.monotonic()
code = subprocess.run(sys.argv[2:]).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    cpu, wall = round(usage.ru_utime + usage.ru_stime, 1), round(time.monotonic() - began, 1)
    json.dump({"cpu_seconds": cpu, "wall_seconds": wall, "peak_bytes": usage.ru_maxrss * 1024}, file)
sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Row:
    """name      of its directory.  scheme  rows of one are compared with each other.
    settings  for ours a recipe's name or content, modifiers for llm-compressor, processors for msModelSlim; None: the float
              model.
    """

    name: str
    scheme: str
    tool: str
    what: str
    settings: Any = None


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share.

    texts     what KL, agreement and perplexity are measured on: its first `limit` rows.
    modes     thinking modes that pass@1 is measured in; none: it is not.
    pythons   tool -> interpreter that has it, or None.
    launcher  command put in front of each process, such as nice.
    """

    checkpoint: Path
    calibration: Path
    texts: Path
    work: Path
    limit: int = 120
    modes: Sequence[str] = ()
    task: str = "mini"
    pythons: Mapping[str, str | None] = field(default_factory=dict)
    launcher: Sequence[str] = ()


def measure(row: Row, setting: Setting, on_step: Callable[[str], None] = lambda step: None) -> Record:
    """The row's record: `quantize`, `compare` and `evaluate` as far as they were wanted, or `failure`, one line."""
    directory = setting.work / row.name
    record = _begin(directory, row, setting)
    record.pop("failure", None)
    try:
        record["tool_version"] = record.get("tool_version") or _version(row, setting)
        target = directory / "checkpoint" if row.settings is not None else setting.checkpoint
        if row.settings is not None and "quantize" not in record:
            on_step("quantize")
            record["quantize"] = _quantize(row, setting, directory)
            _keep(directory, record)
        if row.settings is not None and "compare" not in record:
            on_step("compare")
            record["compare"] = _compare(setting, target, directory)
            _keep(directory, record)
        missing = [mode for mode in setting.modes if mode not in record.get("evaluate", {})]
        if missing:
            on_step(f"evaluate {', '.join(missing)}")
            record["evaluate"] = _evaluate(setting, target, directory)
            _keep(directory, record)
    except quantizers.PeerError as error:
        record["failure"] = str(error)
        _keep(directory, record)  # to be told, and tried again by the next run
    return record


def recorded(row: Row, setting: Setting) -> Record:
    """What the row's record has, without measuring anything or asking whether it is still of the same data."""
    path = setting.work / row.name / "record.json"
    if not path.exists():
        return {"row": asdict(row), "failure": "not yet"}
    record: Record = json.loads(path.read_text())
    return record


def _begin(directory: Path, row: Row, setting: Setting) -> Record:
    """The record so far; a new one, and an empty directory, where the old one is of another row, tool or data."""
    settings = row.settings
    if row.tool == OURS and isinstance(settings, str):
        settings = find_recipe(settings).read_text(encoding="utf-8")
    parts = [row.tool, settings, setting.limit, asdict(AMOUNT)]
    files = [setting.calibration, setting.texts, setting.checkpoint / "config.json"]
    files += sorted(setting.checkpoint.glob("*.safetensors"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    fingerprint = hashlib.sha256(json.dumps([*parts, *digests]).encode()).hexdigest()
    path = directory / "record.json"
    if path.exists():
        record: Record = json.loads(path.read_text())
        if record["fingerprint"] == fingerprint:
            return record
        shutil.rmtree(directory)
    return {"fingerprint": fingerprint, "row": asdict(row), "commit": commit()}


def _keep(directory: Path, record: Record) -> None:
    write_json(directory / "record.json", record)


def commit() -> str:
    """Of the code that measures; with a + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    status = [*git, "status", "--porcelain", "ms_pangu_quant", "configs", ":!*.md"]  # the card is written by the tables
    changed = subprocess.run(status, capture_output=True).stdout
    return (head or "no git") + ("+" if changed else "")


def _version(row: Row, setting: Setting) -> str:
    if row.tool == OURS:
        return commit()
    return quantizers.version_of(setting.pythons.get(row.tool), row.tool)


# --- the steps ------------------------------------------------------------------------------------------------------


def _quantize(row: Row, setting: Setting, directory: Path) -> Record:
    output = directory / "checkpoint"
    shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
    output.parent.mkdir(parents=True, exist_ok=True)
    if row.tool == OURS:
        recipe = directory / "recipe.yaml"
        if isinstance(row.settings, str):
            recipe = find_recipe(row.settings)
        else:
            write_json(recipe, row.settings)
        command = [*_ours("quantize"), str(setting.checkpoint), "--recipe", str(recipe.absolute()), "--output", str(output)]
        if load_recipe(recipe).needs_calibration:
            command += ["--calibration", str(setting.calibration)]
        cost = run(command, setting, directory / "quantize.log")
    else:
        cost = run(_peer_command(row, setting, output), setting, directory / "quantize.log")
        quantizers.give_back_tokenizer(setting.checkpoint, output)
        if not isinstance(open_checkpoint(output), QuantizedReader):
            raise quantizers.PeerError(f"{row.tool} wrote a float checkpoint; did it ignore its settings?")
    return {**cost, "bytes": sum(path.stat().st_size for path in output.glob("*.safetensors"))}


def _peer_command(row: Row, setting: Setting, output: Path) -> list[str]:
    source, data = setting.work / "peers" / "float32", setting.work / "peers" / "calibration"
    if not (source / "config.json").exists():
        quantizers.write_source(setting.checkpoint, source)
    quantizers.write_calibration(_calibration(setting), data)
    python = setting.pythons[row.tool]
    if row.tool == LLM_COMPRESSOR:
        return quantizers.llmcompressor_command(python, source, output, row.settings, data / "token_ids.jsonl")
    return quantizers.msmodelslim_command(python, source, output, row.settings, data / "words.jsonl")


def _calibration(setting: Setting) -> Sequence[Any]:
    """The token ids that this project's recipes calibrate on, those that they hold out included."""
    return load_token_data(
        setting.calibration,
        tokenizer=find_tokenizer(setting.checkpoint),
        vocab_size=CheckpointReader(setting.checkpoint).config.vocab_size,
        max_length=AMOUNT.max_length,
        samples=AMOUNT.texts,
        tokens=AMOUNT.all_tokens,
        seed=AMOUNT.seed,
    ).sequences


def _compare(setting: Setting, target: Path, directory: Path) -> Record:
    command = [*_ours("compare"), str(setting.checkpoint), str(target), "--data", str(setting.texts)]
    run([*command, "--limit", str(setting.limit), "--json"], setting, directory / "compare.log")
    return last_json(directory / "compare.log")


def _evaluate(setting: Setting, target: Path, directory: Path) -> dict[str, Record]:
    """Mode -> problems, passed. Answers that an earlier run wrote are kept; the directory stays, for paired statistics."""
    output = directory / "evaluation"
    command = [*_ours("evaluate"), str(target), "--tasks", setting.task, "--modes", ",".join(setting.modes)]
    run([*command, "--output", str(output), "--json"], setting, directory / "evaluate.log")
    entries = json.loads((output / "summary.json").read_text())["entries"]
    incomplete = [entry["mode"] for entry in entries if not entry["complete"]]
    if incomplete:
        raise quantizers.PeerError(f"{output}: answers in {', '.join(incomplete)} could not be judged; run it again")
    return {entry["mode"]: {"problems": entry["problems"], "passed": entry["passed"]} for entry in entries}


def _ours(command: str) -> list[str]:
    return [sys.executable, "-m", "ms_pangu_quant", command]


def run(command: Sequence[str], setting: Setting, log: Path) -> Record:
    """Run to its end, output into `log`; CPU time and peak memory of it and its children.

    Raises PeerError with what the log says of the error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    usage = log.with_suffix(".usage.json")
    metered = [*setting.launcher, sys.executable, "-S", "-c", METER, str(usage.absolute()), *command]
    with open(log, "wb") as file:
        done = subprocess.run(metered, cwd=ROOT, input=quantizers.ANSWERS.encode(), stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise quantizers.PeerError(f"exit code {done.returncode}: {_complaint(log)} ({log.name})")
    cost: Record = json.loads(usage.read_text())
    return cost


def _complaint(log: Path) -> str:
    """The last line of a log that names an error, or else its last line."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in said if "Error" in line]
    return (named or said or ["no output"])[-1][:200].replace("|", "/")


def last_json(log: Path) -> Record:
    found: Record = json.loads(log.read_text().strip().splitlines()[-1])
    return found
