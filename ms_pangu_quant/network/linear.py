"""Which linear method each layer of a quantized network gets, and how stored tensors become its parameters."""

from __future__ import annotations

from collections.abc import Mapping

from mindformers.parallel_core.inference.quantization.golden_stick.config import GoldenStickConfig
from mindformers.parallel_core.inference.tensor_parallel.layers import LinearBase, UnquantizedLinearMethod

from ms_pangu_quant.backends import Backend
from ms_pangu_quant.backends.hadamard import RotatedInput
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import HADAMARD_METHOD, QUANTIZATION_FILE
from ms_pangu_quant.errors import BackendError, CheckpointError
from ms_pangu_quant.formats.words import WORDS, scheme_of

# A layer MindFormers computes as one -> the layers its parts come from.
_PARTS = {layout.QKV: ("linear_q", "linear_k", "linear_v"), layout.FC1: ("gating", "hidden")}


class PanguQuantConfig(GoldenStickConfig):
    """MindFormers' Golden Stick contract, looked up exactly instead of by the first key that contains the prefix.

    full_config maps each linear layer's weight to the word for its scheme (formats/words.py), and has "weight_mapping",
    "quantization" and "group_size"; "quant_method" is HADAMARD_METHOD where the input of linear_fc2 is rotated.
    The backend may have a linear method for None, a float layer, in place of MindFormers' own.
    """

    def __init__(self, full_config: Mapping[str, object], backend: Backend) -> None:
        super().__init__(dict(full_config))
        self._methods, self._hadamard = backend.linear_methods, backend.hadamard
        self.group_size = int(full_config.get("group_size") or 0)

    def get_quant_method(self, layer, prefix: str):
        """Raises CheckpointError if the parts of a fused layer disagree, BackendError for a kind it cannot compute."""
        if not isinstance(layer, LinearBase):
            return None
        stem, _, name = prefix.rpartition(".")
        parts = [f"{stem}.{part}.weight" for part in _PARTS.get(name, (name,))]
        words = {part: self.full_config.get(part) for part in parts}
        if len(set(words.values())) != 1:
            raise CheckpointError(
                f"{QUANTIZATION_FILE}: {words}: these layers are computed as one and need the same quantization"
            )
        method = self._method(parts[0], words[parts[0]])
        if name == layout.FC2 and self.full_config.get("quant_method") == HADAMARD_METHOD:
            return RotatedInput(method, self._hadamard(layer.input_size, layer.params_dtype))
        return method

    def _method(self, part: str, word: object):
        scheme = scheme_of(word, self.group_size, f"{QUANTIZATION_FILE}: {part}")
        arithmetic = None if scheme is None else scheme.arithmetic
        if arithmetic is None and arithmetic not in self._methods:
            return UnquantizedLinearMethod()
        if arithmetic not in self._methods:
            known = ", ".join(WORDS[each] for each in self._methods if each is not None)
            raise BackendError(f"{part} is {word}, which this device's backend cannot compute; it has {known}")
        return self._methods[arithmetic](self)
