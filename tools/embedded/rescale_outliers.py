#!/usr/bin/env python3
"""Write a checkpoint with other outlier channels and the same function, bit for bit.

A channel that one tensor makes larger and the next makes smaller again changes nothing in a float network and everything
for a quantizer. The channels are those that stand out already: in each norm, and in the rows of v_proj and up_proj, where
the largest weight (with the bias) is at least four times the median row's. Factors are powers of two, so every product,
sum and logit keeps its bits, whatever the dtype.

  --factor 2   the channels of the norms twice as large, their readers' columns half as large
  --flatten    every such channel of norms, v_proj and up_proj brought to within a factor of two of the median
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.files import write_safetensors
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import OutputError, PanguQuantError
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.transforms.fold import fold_scale

STANDS_OUT = 4.0  # times the median
NORM_INPUTS = ("attention_input", "mlp_input")


def producer_size(block: Block, input_name: str) -> NDArray[np.float32]:
    """Largest absolute weight of each channel of what produces this input, its bias included."""
    producer = layout.sites_reading(input_name)[0].producer
    weight = np.abs(block[f"{producer}.weight"])
    size = weight if weight.ndim == 1 else weight.max(axis=1)
    bias = block.tensors.get(f"{producer}.bias")
    return size if bias is None else np.maximum(size, np.abs(bias))


def divisors(block: Block, input_name: str, factor: float | None) -> NDArray[np.float32]:
    """A power of two for each channel, 1 for ordinary ones: 1 / factor, or without a factor what flattens the channel."""
    size = producer_size(block, input_name)
    ratio = size / np.median(size)
    chosen = np.exp2(np.rint(np.log2(np.maximum(ratio, 1e-30)))) if factor is None else np.full_like(ratio, 1 / factor)
    return np.where(ratio >= STANDS_OUT, chosen, 1.0).astype(np.float32)


def rescaled(block: Block, factor: float | None) -> Block:
    """The block with other scales between producers and readers; the same function."""
    for input_name in reversed(layout.INPUT_NAMES if factor is None else NORM_INPUTS):
        s = divisors(block, input_name, factor)
        block, _ = fold_scale(block, {input_name: InputStats(0, np.zeros(1, np.float32))}, input_name, s)
    return block


def write(source: Path, output: Path, factor: float | None) -> int:
    """Returns how many tensors changed. Raises OutputError where a value does not survive in the checkpoint's dtype."""
    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{output}: is not empty; name another directory")
    reader = CheckpointReader(source)
    entries = reader.files.entries
    changed = {}
    for index in range(reader.config.num_hidden_layers):
        block, prefix = reader.block(index), layout.block_prefix(index)
        for name, value in rescaled(block, factor).tensors.items():
            if np.array_equal(value, block.tensors[name]):
                continue
            dtype = entries[prefix + name].dtype
            stored = value.astype(dtype)
            if not (np.isfinite(value).all() and np.array_equal(stored.astype(np.float32), value)):
                raise OutputError(f"{prefix}{name}: a rescaled value is out of {dtype}'s range; take a smaller factor")
            changed[prefix + name] = stored
    output.mkdir(parents=True, exist_ok=True)
    for file in reader.files.files:
        kept = {name: changed.get(name, entry) for name, entry in entries.items() if entry.file == file}
        write_safetensors(output / file.name, kept)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, output / path.name)
    return len(changed)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__,
        example="python tools/embedded/rescale_outliers.py openPangu-Embedded-7B --factor 2 --output rescaled-7b",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--factor", type=float, help="a power of two")
    how.add_argument("--flatten", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.factor is not None and (chosen.factor <= 0 or np.frexp(chosen.factor)[0] != 0.5):
        parser.error(f"--factor: got {chosen.factor}, wanted a power of two")
    try:
        count = write(chosen.checkpoint, chosen.output, chosen.factor)
    except PanguQuantError as error:
        print(f"rescale_outliers: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.output}: {count} tensors changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
