"""What produced a run: the checkpoint by its bytes, how it was quantized, versions and machine."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.writer import REPORT_FILE
from ms_pangu_quant.formats.reader import Reader, open_checkpoint
from ms_pangu_quant.formats.words import INT8_CACHE_WORD, word_of
from ms_pangu_quant.installation import version
from ms_pangu_quant.pipeline.prepare import checkpoint_hash

if TYPE_CHECKING:
    from ms_pangu_quant.inference.endpoint import Description

_PACKAGES = ("ms_pangu_quant", "mindspore", "mindformers", "numpy", "scipy")


def of_checkpoint(directory: Path, device: str, head: str = "stored") -> dict[str, Any]:
    """Reads the whole checkpoint once. head as of load(), told where it is not stored."""
    reader = open_checkpoint(directory)
    return {
        "model": directory.resolve().name,
        "checkpoint_sha256": checkpoint_hash(reader),
        "checkpoint_bytes": reader.files.nbytes,
        "precision": precision(reader),
        "recipe": _recipe(reader),
        "device": device,
        **({} if head == "stored" else {"head": head}),
        **environment(),
    }


def of_endpoint(server: Description, asked_with: str, tokenizer: Path) -> dict[str, Any]:
    """What a server says of itself; it alone knows the checkpoint. asked_with: "token ids" or "chats"."""
    return {
        "model": server.model,
        "served_by": {**asdict(server), "asked_with": asked_with},
        "tokenizer": tokenizer.resolve().name,
        **environment(),
    }


def environment() -> dict[str, Any]:
    versions = {package: found for package in _PACKAGES if (found := version(package)) is not None}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}"
    return {"versions": versions, "python": platform.python_version(), "machine": machine}


def precision(reader: Reader) -> str:
    """The word for the scheme of most of its layers, and for an int8 cache; or a float checkpoint's dtype."""
    if reader.format is not None:
        schemes = [scheme for _, _, scheme in reader.plan]
        most, count = Counter(schemes).most_common(1)[0]
        group = f" g{most.group_size}" if most is not None and most.group_size else ""
        mixed = "" if count == len(schemes) else " (mixed)"
        return word_of(most) + group + mixed + (f" {INT8_CACHE_WORD}" if reader.plan.cache else "")
    return Counter(entry.dtype.name for entry in reader.files.entries.values()).most_common(1)[0][0]


def _recipe(reader: Reader) -> dict[str, Any] | None:
    """The recipe and the errors of each block, from the report beside every format; None for a float checkpoint."""
    path = reader.directory / REPORT_FILE
    if reader.format is None or not path.exists():
        return None
    report = read_json(path)
    return {name: report.get(name) for name in ("recipe", "fingerprint", "blocks", "bytes_before", "calibration")}
