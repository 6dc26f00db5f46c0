"""A decoder block as values: Block, as a float checkpoint has it, and RoundedBlock, as it is stored and served.

Both are handed from room to room and never changed; what changes one returns another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.scheme import INT8_CACHE, QuantScheme

if TYPE_CHECKING:
    from ms_pangu_quant.quantizers.grid import QuantizedWeight
    from ms_pangu_quant.quantizers.kv_cache import QuantizedCache


@dataclass(frozen=True)
class Block:
    """One decoder block: float32 tensors, names as in layout.block_shapes, weights [out, in]."""

    config: ModelConfig
    tensors: Mapping[str, NDArray[np.float32]]

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.tensors[name]

    def weight(self, site: layout.LinearSite) -> NDArray[np.float32]:
        return self.tensors[f"{site.name}.weight"]

    def bias(self, site: layout.LinearSite) -> NDArray[np.float32] | None:
        return self.tensors.get(f"{site.name}.bias")

    def replace(self, changed: Mapping[str, NDArray[np.float32]]) -> Block:
        return Block(self.config, {**self.tensors, **changed})


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized layer.

    input_scale   the factor x is multiplied by before rounding; None means per-token dynamic.
    input_offset  zero point of a static layer: the code of x is round(x * input_scale) + input_offset, clipped to int8.
                  What pangu-quant rounds has 0; other programs' checkpoints may not.
    """

    scheme: QuantScheme
    weight: QuantizedWeight
    input_scale: float | None = None
    input_offset: int = 0

    @property
    def offset_correction(self) -> NDArray[np.int32]:
        """What the zero point adds to the integer products, [out] int32, to be taken off: input_offset * sum(codes)."""
        sums = self.weight.codes.sum(axis=1, dtype=np.int64)
        return np.asarray(self.input_offset * sums, np.int32)


@dataclass(frozen=True)
class RoundedBlock:
    """A block whose layers are rounded, all that are to be or only some yet; of a float checkpoint, none.

    floats   the float block. The weights of rounded layers may still be in it, and are not looked at.
    linears  the rounded layers by site name.
    cache    grids that keys and values are cached in; None for floats.
    errors   relative error of each rounded weight by site name; empty for a block that was read.
    """

    floats: Block
    linears: Mapping[str, QuantizedLinear] = field(default_factory=dict)
    cache: QuantizedCache | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.floats.config

    @property
    def plan(self) -> BlockPlan:
        found = (self.linears.get(site.name) for site in layout.SITES)
        schemes = tuple(linear.scheme if linear else None for linear in found)
        return BlockPlan(schemes, None if self.cache is None else INT8_CACHE)

    @property
    def notes(self) -> dict[str, str]:
        """What a quantizer had to do that was not asked for (damping raised), by site name."""
        return {site: linear.weight.note for site, linear in self.linears.items() if linear.weight.note}

    @property
    def kept(self) -> dict[str, NDArray[np.float32]]:
        """The tensors that stay float."""
        return {name: self.floats[name] for name in self.plan.float_shapes(self.config)}
