"""What `inspect` shows of a checkpoint directory: its layers, the graphs it is served by, and who computes its schemes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.writer import REPORT_FILE
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.consumers import facts_of, rows_for
from ms_pangu_quant.formats.reader import FORMATS, Reader, open_checkpoint
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.suggestion import did_you_mean


def inspection(directory: Path) -> dict[str, Any]:
    """Scheme, bits and error of each layer, and the totals."""
    reader = open_checkpoint(directory)
    quantized = reader.format is not None
    report = _report(directory / REPORT_FILE) if quantized else {}
    blocks = report.get("blocks", [])
    layers, bits, weights = [], 0.0, 0
    for place, (name, site, scheme) in enumerate(reader.plan):
        outputs, inputs = layout.site_shape(reader.config, site)
        stored = 8 * sum(
            entry.nbytes
            for key, entry in reader.files.entries.items()
            if key.startswith(f"{name}.") and not key.endswith(".bias") and not kv_cache.is_cache_tensor(key)
        )
        index = place // len(layout.SITES)
        error = blocks[index]["weight_error"].get(site.name) if index < len(blocks) else None
        layers.append(
            {
                "name": name,
                "scheme": word_of(scheme),
                "bits_per_weight": stored / (outputs * inputs),
                "weight_error": error,
            }
        )
        bits, weights = bits + stored, weights + outputs * inputs
    return {
        "directory": str(directory),
        "quantized": quantized,
        "trained_rows": str(reader.rows) if reader.rows else None,
        "layers": layers,
        "output_error": [block.get("output_error") for block in blocks],
        "held_out_error": [block.get("held_out_error") for block in blocks],
        "bytes": reader.files.nbytes,
        "bytes_before": report.get("bytes_before"),
        "bits_per_weight": bits / weights,
        "weights": weights,
        "cache": cache_of(reader),
    }


def _report(path: Path) -> dict[str, Any]:
    """What is shown of it has been looked at; empty where there is none. Raises CheckpointError."""
    report = read_json(path) if path.exists() else {}
    blocks = report.get("blocks", [])
    whole = isinstance(blocks, list) and all(
        isinstance(block, dict)
        and isinstance(block.get("weight_error"), dict)
        and all(map(_is_number, block["weight_error"].values()))
        and all(block.get(key) is None or _is_number(block[key]) for key in ("output_error", "held_out_error"))
        for block in blocks
    )
    if not whole or not _is_number(report.get("bytes_before", 1)):
        raise CheckpointError(f"{path}: is not a report of pangu-quant; delete it to see the layers without it")
    return report


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def cache_of(reader: Reader) -> dict[str, Any]:
    """What keys and values are cached as, the bytes of one token, and whether the grids have zero points."""
    int8 = reader.plan.cache is not None
    found: dict[str, Any] = {
        "dtype": "int8" if int8 else "float",
        "bytes_per_token": kv_cache.bytes_per_token(reader.config, 1 if int8 else 2),
        "bytes_per_token_bfloat16": kv_cache.bytes_per_token(reader.config, 2),
    }
    if int8:
        blocks = range(reader.config.num_hidden_layers)
        caches = [kv_cache.read_cache(reader.files, reader.config, index) for index in blocks]
        grids = [grid for cache in caches for grid in (cache.key, cache.value)]
        found["zero_points"] = any(grid.offset.any() for grid in grids)
        found["scales_per_head"] = max(len(set(row.tolist())) for grid in grids for row in grid.scale)
    return found


def graphs(directory: Path, device: str) -> dict[str, Any]:
    """The operators of the network's prefill and decode graphs on a device; neither is run."""
    if device not in ("ascend", "cpu"):
        raise RequestError(f"--device: got {device!r}{did_you_mean(device, ('ascend', 'cpu'))}, wanted ascend or cpu")
    reader = open_checkpoint(directory)
    from ms_pangu_quant.network import runtime

    runtime.start("cpu", "graph")
    from ms_pangu_quant.network.graph import device_backend, operator_counts

    phases = {
        phase: [asdict(each) for each in operator_counts(reader.config, reader.plan, device_backend(device), phase=phase)]
        for phase in ("prefill", "decode")
    }
    words = dict(Counter(word_of(scheme) for _, _, scheme in reader.plan))
    return {"directory": str(directory), "device": device, "layers": words, "phases": phases}


def servability(directory: Path) -> dict[str, Any]:
    """Which programs compute its schemes, in each format, and how."""
    reader = open_checkpoint(directory)
    if reader.format is None:
        raise RequestError(f"{directory}: is a float checkpoint; --servable is about quantized ones")
    rows = [
        {
            "format": name,
            "scheme": each.word,
            "group_size": each.group_size,
            "consumer": row.consumer,
            "versions": row.versions,
            "verdict": row.verdict,
            "note": row.note,
            "known": row.known,
            "source": row.source,
        }
        for each in facts_of(reader.config, reader.plan)
        for name in FORMATS
        for row in rows_for(name, each)
    ]
    return {"directory": str(directory), "format": reader.format.NAME, "rows": rows}
