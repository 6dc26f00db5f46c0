"""Whether a directory already holds what a run would write, so that a run that is started once more has nothing to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms_pangu_quant.checkpoint.config import ModelConfig, read_json
from ms_pangu_quant.checkpoint.files import INDEX_FILE
from ms_pangu_quant.checkpoint.writer import HASHES_FILE, JOURNAL, REPORT_FILE
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.formats.reader import Format, QuantizedReader, find_format
from ms_pangu_quant.formats.verify import hash_faults


def finished_report(output: Path, fingerprint: Mapping[str, str], stored_as: Format) -> dict[str, Any] | None:
    """The report in `output` if what is there was made with this fingerprint in this format and no file has changed since.

    None     where nothing is finished, or what is there does not say what made it.
    Raises   OutputError where it was made with something else, or a file is damaged.
    """
    if (output / JOURNAL).exists() or not all(
        (output / name).is_file() for name in ("config.json", REPORT_FILE, HASHES_FILE)
    ):
        return None
    report = read_json(output / REPORT_FILE)
    made_with = report.get("fingerprint")
    if not isinstance(made_with, Mapping):
        return None
    changed = sorted(key for key in {*made_with, *fingerprint} if made_with.get(key) != fingerprint.get(key))
    if find_format(output, ModelConfig.from_file(output / "config.json")).NAME != stored_as.NAME:
        changed.append("format")
    if changed:
        raise OutputError(
            f"{output}: holds a finished checkpoint, made with another {', '.join(changed)}; choose another --output"
        )
    for fault in hash_faults(output):
        raise OutputError(f"{output}: holds a finished checkpoint that is damaged: {fault}; choose another --output")
    return report


def stored_bytes(output: Path) -> int:
    """Size of a finished directory's weight files."""
    return int(read_json(output / INDEX_FILE)["metadata"]["total_size"])


def is_exported(reader: QuantizedReader, stored_as: Format, output: Path) -> bool:
    """Whether `output` is that checkpoint's whole export. False also where the checkpoint does not say what made it."""
    if not (reader.directory / REPORT_FILE).is_file():
        return False
    made_with = read_json(reader.directory / REPORT_FILE).get("fingerprint")
    return isinstance(made_with, Mapping) and finished_report(output, made_with, stored_as) is not None
