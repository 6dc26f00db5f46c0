"""What "W8A8" or "W4A8" means, as frozen values that are checked when they are made.

A TensorScheme says how one tensor is rounded; a QuantScheme pairs the weight's with the activation's; PRESETS are the
schemes the runtime can compute. Only symmetric schemes exist: the integer kernels of the target have no zero point for
weights, and per-token activations of these models are centred well enough that none is missed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ms_pangu_quant.errors import RecipeError

Granularity = Literal["tensor", "token", "channel", "group"]


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor becomes integers.

    granularity   one scale per tensor; per token (row of activations, x [tokens, in] -> scale [tokens, 1]); per output
                  channel (weight [out, in] -> scale [out, 1]); per group of group_size inputs (-> scale [out, in/group]).
    dynamic       True: the scale is taken from the tensor at run time; False: it is stored.
    full_range    False: scale = absmax / (2^(b-1) - 1), codes symmetric about 0 (-127..127).
                  True: scale = absmax / ((2^b - 1) / 2), i.e. /127.5 or /7.5, codes -128..127 (arXiv:2512.23367, sec. 3).
    bfloat16_scale  round the scale up to a bfloat16 value before rounding the weight to it: MindFormers holds the scales
                  of a bfloat16 network in bfloat16, and a scale changed after rounding is an error in every weight.
    """

    bits: int
    granularity: Granularity
    dynamic: bool = False
    group_size: int = 0
    full_range: bool = False
    bfloat16_scale: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RecipeError(f"bits: got {self.bits}, wanted 4 or 8")
        if self.granularity not in ("tensor", "token", "channel", "group"):
            raise RecipeError(f"granularity: got {self.granularity!r}, wanted tensor, token, channel or group")
        if (self.granularity == "group") != (self.group_size > 0) or self.group_size < 0:
            raise RecipeError(
                f"group_size: got {self.group_size} with granularity {self.granularity!r}; "
                "a positive group_size goes with granularity 'group', and only with it"
            )
        if self.group_size % 2:
            raise RecipeError(f"group_size: got {self.group_size}, wanted an even number (two int4 share a byte)")

    @property
    def code_min(self) -> int:
        return -self.code_max - 1 if self.full_range else -self.code_max

    @property
    def code_max(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    @property
    def divisor(self) -> float:
        """absmax / divisor is the scale."""
        return (2**self.bits - 1) / 2 if self.full_range else float(self.code_max)

    def groups(self, in_features: int) -> int:
        """Number of scales per output channel of a weight [out, in_features]."""
        if self.granularity != "group":
            return 1
        if in_features % self.group_size:
            raise RecipeError(f"group_size {self.group_size} does not divide the {in_features} inputs of the layer")
        return in_features // self.group_size


class Arithmetic(NamedTuple):
    """What decides which kernel multiplies a layer: backends have a linear method for each, formats a word and a layout.

    dynamic  each token's scale is taken from it at run time; else one scale for the whole input is stored.
    """

    weight_bits: int
    activation_bits: int
    dynamic: bool


W8A8_STATIC, W8A8, W4A8 = Arithmetic(8, 8, False), Arithmetic(8, 8, True), Arithmetic(4, 8, True)
ARITHMETICS = [W8A8_STATIC, W8A8, W4A8]


@dataclass(frozen=True)
class QuantScheme:
    """A weight scheme and the activation scheme it is multiplied with."""

    weight: TensorScheme
    activation: TensorScheme

    def __post_init__(self) -> None:
        wanted = {each.activation_bits for each in ARITHMETICS if each.weight_bits == self.weight.bits}
        if self.activation.bits not in wanted:
            raise RecipeError(f"activation bits: got {self.activation.bits}, wanted {' or '.join(map(str, wanted))}")
        if self.weight.dynamic:
            raise RecipeError("weights are rounded once: a dynamic weight scheme does not exist")
        if not self.activation.dynamic and (self.weight.bits != 8 or self.weight.granularity != "channel"):
            raise RecipeError("static activations go with 8-bit per-channel weights only (QuantBatchMatmul's contract)")

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.weight.bits, self.activation.bits, self.activation.dynamic)

    @property
    def group_size(self) -> int:
        """Inputs that share a weight scale; 0 where a whole output channel does."""
        return self.weight.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight, scales included (a scale is 32 bits)."""
        return self.weight.bits + 32 * self.weight.groups(in_features) / in_features

    def grouped(self, size: int) -> QuantScheme:
        """The same with a weight scale for every `size` inputs; 0: for every output channel."""
        granularity: Granularity = "group" if size else "channel"
        return replace(self, weight=replace(self.weight, granularity=granularity, group_size=size))

    def with_range(self, *, full_range: bool) -> QuantScheme:
        return replace(self, weight=replace(self.weight, full_range=full_range))


_PER_TOKEN = TensorScheme(bits=8, granularity="token", dynamic=True)
_PER_TENSOR = TensorScheme(bits=8, granularity="tensor", bfloat16_scale=True)
_W8 = TensorScheme(bits=8, granularity="channel", bfloat16_scale=True)

PRESETS: dict[str, QuantScheme] = {
    "w8a8": QuantScheme(_W8, _PER_TOKEN),
    "w8a8_static": QuantScheme(_W8, _PER_TENSOR),
    "w4a8": QuantScheme(TensorScheme(bits=4, granularity="channel"), _PER_TOKEN),
    "w4a8_g256": QuantScheme(TensorScheme(bits=4, granularity="group", group_size=256), _PER_TOKEN),
    "w4a8_g128": QuantScheme(TensorScheme(bits=4, granularity="group", group_size=128), _PER_TOKEN),
    "w4a8_g64": QuantScheme(TensorScheme(bits=4, granularity="group", group_size=64), _PER_TOKEN),
    "w4a8_g32": QuantScheme(TensorScheme(bits=4, granularity="group", group_size=32), _PER_TOKEN),
}

INT8_CACHE = TensorScheme(bits=8, granularity="channel")  # of keys and values
