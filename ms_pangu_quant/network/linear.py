"""Which linear method each layer of a quantized network gets, and how stored tensors become its parameters."""

from __future__ import annotations

from collections.abc import Mapping

from mindformers.parallel_core.inference.quantization.golden_stick.config import GoldenStickConfig
from mindformers.parallel_core.inference.tensor_parallel.layers import LinearBase, UnquantizedLinearMethod

from ms_pangu_quant.backends.hadamard import RotatedInput
from ms_pangu_quant.checkpoint.config import HADAMARD_METHOD
from ms_pangu_quant.errors import BackendError, CheckpointError

# A layer MindFormers computes as one -> the layers its parts come from.
_PARTS = {"linear_qkv": ("linear_q", "linear_k", "linear_v"), "linear_fc1": ("gating", "hidden")}


class PanguQuantConfig(GoldenStickConfig):
    """MindFormers' Golden Stick contract, looked up exactly instead of by the first key that contains the prefix.

    full_config maps "model.layers.0.self_attn.q_proj.weight" -> "W8A8" | "W8A8_DYNAMIC" | "W4A8_DYNAMIC" | "FLOAT", plus
    "weight_mapping", "quantization" and "group_size"; "quant_method" is HADAMARD_METHOD where down_proj's input is rotated.
    linear_methods may have one for "FLOAT", in place of MindFormers' own.
    """

    def __init__(self, full_config: Mapping[str, object], linear_methods: Mapping[str, type]) -> None:
        super().__init__(dict(full_config))
        self._methods = linear_methods

    def get_quant_method(self, layer, prefix: str):
        """Raises CheckpointError if the parts of a fused layer disagree, BackendError for a kind it cannot compute."""
        if not isinstance(layer, LinearBase):
            return None
        stem, _, name = prefix.rpartition(".")
        parts = [f"{stem}.{part}.weight" for part in _PARTS.get(name, (name,))]
        kinds = {part: self.full_config.get(part) for part in parts}
        if len(set(kinds.values())) != 1:
            raise CheckpointError(
                f"quantization_description.json: {kinds}: these layers are computed as one and need the same quantization"
            )
        method = self._method(parts[0], kinds[parts[0]])
        if name == "linear_fc2" and self.full_config.get("quant_method") == HADAMARD_METHOD:
            return RotatedInput(method, layer.input_size, layer.params_dtype)
        return method

    def _method(self, part: str, kind: object):
        if kind == "FLOAT" and kind not in self._methods:
            return UnquantizedLinearMethod()
        if kind not in self._methods:
            raise BackendError(
                f"{part} is {kind}, which this device's backend cannot compute; it has {', '.join(self._methods)}"
            )
        return self._methods[kind](self)
