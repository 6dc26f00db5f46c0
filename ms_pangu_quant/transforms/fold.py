"""Moves a per-channel scale from the input of some linear layers into whatever produces that input, exactly.

For y = (x / s) (W * s)^T the layers' weights are multiplied by s along their inputs, and the producer of x is divided by s:
a norm's weight, or the rows (and bias) of the linear layer whose output channels reach the input unmixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.layout import ATTENTION_OUTPUT, NORMS, sites_reading
from ms_pangu_quant.quantizers.grid import row_pieces
from ms_pangu_quant.quantizers.threads import by_element

Real = TypeVar("Real", np.float32, np.float64)


def scale_channels(block: Block, input_name: str) -> int:
    """How many independent scales the producer of this input can absorb.

    All of them, but for that of o: one value channel feeds a whole group of query heads.
    """
    if input_name == ATTENTION_OUTPUT:
        return block.config.num_key_value_heads * block.config.head_dim
    return block.weight(sites_reading(input_name)[0]).shape[1]


def reduce_to_producer(block: Block, input_name: str, values: NDArray[Real], by: np.ufunc = np.maximum) -> NDArray[Real]:
    """Max, or what `by` makes, of values [in] over the input channels that share one of the producer; [scale_channels]."""
    if input_name != ATTENTION_OUTPUT:
        return values
    config = block.config
    grouped = values.reshape(config.num_key_value_heads, -1, config.head_dim)
    return np.asarray(by.reduce(grouped, axis=1).reshape(-1), dtype=values.dtype)


def expand_to_input(block: Block, input_name: str, s: NDArray[Real]) -> NDArray[Real]:
    """A scale for every input channel [in] from the producer's [scale_channels]."""
    if input_name != ATTENTION_OUTPUT:
        return s
    config = block.config
    per_head = s.reshape(config.num_key_value_heads, 1, config.head_dim)
    group = config.num_attention_heads // config.num_key_value_heads
    return np.ascontiguousarray(np.broadcast_to(per_head, (len(per_head), group, config.head_dim)).reshape(-1))


def fold_scale(
    block: Block, stats: Mapping[str, InputStats], input_name: str, s: NDArray[np.float32]
) -> tuple[Block, dict[str, InputStats]]:
    """Divide the input `input_name` by s [scale_channels] > 0; the block computes the same function.

    Returns the new block and the statistics of its inputs.
    """
    if s.shape != (scale_channels(block, input_name),) or not (np.isfinite(s).all() and (s > 0).all()):
        raise ValueError(f"scale of {input_name}: wanted {scale_channels(block, input_name)} positive finite numbers")
    wide = expand_to_input(block, input_name, s)
    sites = sites_reading(input_name)
    changed = {f"{site.name}.weight": _times_inputs(block.weight(site), wide) for site in sites}
    producer = sites[0].producer
    weight = changed.get(f"{producer}.weight", block[f"{producer}.weight"])
    changed[f"{producer}.weight"] = weight / (s if producer in NORMS else s[:, None])
    bias = block.tensors.get(f"{producer}.bias")
    if bias is not None:
        changed[f"{producer}.bias"] = bias / s
    return block.replace(changed), {**stats, input_name: stats[input_name].scaled(wide)}


def fold_changes(inputs: Iterable[str], name: str) -> bool:
    """Whether a scale of one of these inputs goes into this tensor of a block."""
    layer, _, kind = name.rpartition(".")
    sites = [site for input_name in inputs for site in sites_reading(input_name)]
    return any(layer == site.producer or (layer == site.name and kind == "weight") for site in sites)


def _times_inputs(weight: NDArray[np.float32], s: NDArray[np.float32]) -> NDArray[np.float32]:
    """weight [out, in] * s [in]."""
    product = np.empty_like(weight)

    def multiply(rows: slice) -> None:
        np.multiply(weight[rows], s, out=product[rows])

    by_element(multiply, row_pieces(weight))
    return product
