"""A written checkpoint directory with other tensors in it."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.checkpoint.writer import HASHES_FILE


def edit(directory, change):
    """change(dict of all tensors) in place; the directory has one tensor file afterwards and no recorded hashes."""
    tensors = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    for file in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json", directory / HASHES_FILE):
        file.unlink()
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "model.safetensors")
