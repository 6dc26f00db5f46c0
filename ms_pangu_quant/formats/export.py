"""export(): a quantized checkpoint in one format becomes the same one in another; the float checkpoint is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import read_json
from ms_pangu_quant.checkpoint.files import TensorEntry
from ms_pangu_quant.checkpoint.writer import REPORT_FILE, QuantizedWriter
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.formats import kv_cache, mindformers
from ms_pangu_quant.formats.reader import Format, QuantizedReader
from ms_pangu_quant.formats.stored import block_tensors


def export(
    reader: QuantizedReader,
    stored_as: Format,
    output: Path,
    *,
    resume: bool = False,
    on_block: Callable[[int], None] = lambda index: None,
) -> int:
    """Write `output`; returns the size of its weight files in bytes.

    The same codes and scales, one block in memory at a time; float tensors are copied byte for byte. What pangu-quant
    rounded comes out as `quantize` would have written it in that format, every byte.
    Raises   CheckpointError for a damaged source, RequestError for scales the format's reader cannot hold, OutputError.
    """
    config = reader.config
    files = stored_as.metadata(config, reader.plan)
    fingerprint = {
        "checkpoint": reader.files.sha256(),
        "format": stored_as.NAME,
        "version of ms_pangu_quant": version("ms_pangu_quant"),
    }
    with QuantizedWriter(output, fingerprint, blocks=config.num_hidden_layers, resume=resume) as writer:
        for index in range(writer.finished, config.num_hidden_layers):
            writer.write_block(_tensors(reader, stored_as, index), {})
            on_block(index)
        if (reader.directory / REPORT_FILE).exists():
            files[REPORT_FILE] = {**read_json(reader.directory / REPORT_FILE), "files": writer.hashes()}
        outer = {name: reader.files.entries[name] for name in layout.outer_shapes(config)}
        return writer.finish(outer, reader.directory, files)


def _tensors(reader: QuantizedReader, stored_as: Format, index: int) -> dict[str, NDArray[Any] | TensorEntry]:
    rounded = reader.rounded_block(index)
    tensors = block_tensors(reader, stored_as, index, rounded)
    if stored_as.NAME == mindformers.NAME and reader.config.torch_dtype == "bfloat16":
        for name, linear in rounded.linears.items():
            if linear.scheme.weight.bits == 8:
                _check_narrow(f"{layout.block_prefix(index)}{name}", tensors)
    if rounded.cache is not None:
        tensors.update({name: reader.files.entries[name] for name in kv_cache.names(index)})
    return tensors


def _check_narrow(name: str, tensors: Mapping[str, NDArray[Any] | TensorEntry]) -> None:
    """MindFormers holds int8 scales of a bfloat16 network in bfloat16 and its loader does not narrow."""
    for key in (f"{name}.weight_scale", f"{name}.input_scale"):
        if key in tensors and tensors[key].dtype != ml_dtypes.bfloat16:
            raise RequestError(
                f"{key}: is not a bfloat16 value, and MindFormers holds the scales of a bfloat16 network in "
                "bfloat16: rounding it would change every weight; use --format ascend or compressed-tensors, or quantize "
                "anew from the float checkpoint"
            )
