"""What is stored of a block, by quantize() and by export()."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import RoundedBlock
from ms_pangu_quant.checkpoint.files import TensorEntry
from ms_pangu_quant.formats import kv_cache
from ms_pangu_quant.formats.reader import Format, Reader


def block_tensors(
    reader: Reader, stored_as: Format, index: int, rounded: RoundedBlock
) -> dict[str, NDArray[Any] | TensorEntry]:
    """A block's tensors under their full names; what no transform has changed is copied in its own dtype."""
    prefix = layout.block_prefix(index)
    tensors: dict[str, NDArray[Any] | TensorEntry] = {}
    for name, value in rounded.kept.items():
        entry = reader.files.entries[prefix + name]
        unchanged = np.array_equal(reader.files.read_float32(prefix + name), value)
        tensors[prefix + name] = entry if unchanged else value
    for site in layout.SITES:
        if site.name in rounded.linears:
            for key, stored in stored_as.encode(rounded.floats, site, rounded.linears[site.name]).items():
                tensors[f"{prefix}{site.name}.{key}"] = stored
    if rounded.cache is not None:
        tensors.update({f"{prefix}{name}": value for name, value in kv_cache.encode(rounded.cache).items()})
    return tensors
