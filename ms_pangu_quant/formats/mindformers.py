"""The on-disk contract of MindFormers' Golden Stick quantization.

A directory has quantization_description.json (parameter name -> "W8A8" | "W8A8_DYNAMIC" | "W4A8_DYNAMIC" | "FLOAT"),
safetensors with Hugging Face names, and config.json whose quantization_config holds quant_method and group_size. Per layer:

  W8A8_DYNAMIC   weight int8 [out, in], weight_scale [out]
  W8A8           weight int8 [out, in], deq_scale float32 [out] (= weight scale / input_scale), input_scale [in] (the
                 factor activations are multiplied by, the same in every channel), input_offset int8 [in], quant_bias
                 int32 [out] (= -input_offset * sum of the codes); the layer's own bias is added besides
  W4A8_DYNAMIC   weight int8 [in, out/2] (two int4 a byte, see packing.pack_along_out), weight_scale float32 [groups, out].
                 MindFormers has this kind for experts only; for dense layers it is this project's linear method.

With an int8 key/value cache, quantization_config says so, and k_proj and v_proj have its scales (kv_cache.py). MindFormers
has no such cache and passes over them; this project's network uses them.

A checkpoint with an online Hadamard has another quant_method, so that no program that does not know of it computes a wrong
result from it: only this project's network does.

weight_scale and input_scale are bfloat16 tensors when every value is one: MindFormers' parameters have the network's dtype,
and its loaders widen but never narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.config import HADAMARD_METHOD, QUANTIZATION_FILE, ModelConfig, read_json
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats import kv_cache, packing
from ms_pangu_quant.formats.linear import (
    FLOATS,
    TensorSpec,
    describe,
    narrow,
    origin,
    pangu_config,
    read_description,
    read_group_size,
)
from ms_pangu_quant.formats.words import INT8_CACHE_WORD
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import QuantScheme

NAME = "mindformers"
_METHODS = {False: "golden-stick", True: HADAMARD_METHOD}


def encode(block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """Tensors to store, keys without the layer's name ("weight", "weight_scale", ...)."""
    codes, scale = linear.weight.codes, linear.weight.scale
    if linear.scheme.weight.bits == 4:
        return {"weight": packing.pack_along_out(codes), "weight_scale": np.ascontiguousarray(scale.T)}
    if linear.scheme.activation.dynamic:
        return {"weight": codes, "weight_scale": narrow(scale[:, 0])}
    if linear.input_scale is None:
        raise ValueError("a static layer needs the scale of its input")
    inputs = codes.shape[1]
    factor = np.float32(linear.input_scale)
    return {
        "weight": codes,
        "deq_scale": scale[:, 0] / factor,
        "input_scale": narrow(np.full(inputs, factor, np.float32)),
        "input_offset": np.full(inputs, linear.input_offset, np.int8),
        "quant_bias": -linear.offset_correction,
    }


def decode(
    block: Block, site: layout.LinearSite, scheme: QuantScheme, tensors: Mapping[str, NDArray[Any]]
) -> QuantizedLinear:
    """Inverse of encode. Raises CheckpointError for what it would have to drop."""
    if scheme.weight.bits == 4:
        scale = np.ascontiguousarray(tensors["weight_scale"].T, dtype=np.float32)
        return QuantizedLinear(scheme, QuantizedWeight(packing.unpack_along_out(tensors["weight"]), scale))
    if scheme.activation.dynamic:
        scale = tensors["weight_scale"].astype(np.float32)[:, None]
        return QuantizedLinear(scheme, QuantizedWeight(tensors["weight"], scale))
    for key in ("input_scale", "input_offset"):
        if not (tensors[key] == tensors[key][0]).all():
            raise CheckpointError(f"{site.name}.{key}: differs between channels; wanted one value for the whole input")
    deq_scale = tensors["deq_scale"].astype(np.float32)
    factor = np.float32(tensors["input_scale"][0])
    scale = origin(deq_scale, deq_scale * factor, lambda weight_scale: weight_scale / factor)
    weight = QuantizedWeight(tensors["weight"], scale[:, None])
    linear = QuantizedLinear(scheme, weight, float(factor), int(tensors["input_offset"][0]))
    if not np.array_equal(tensors["quant_bias"], -linear.offset_correction):
        raise CheckpointError(
            f"{site.name}.quant_bias: is not -input_offset * sum(weight); a bias inside it is not read here, "
            "MindFormers adds the layer's own bias besides"
        )
    return linear


def specs(config: ModelConfig, site: layout.LinearSite, scheme: QuantScheme) -> dict[str, TensorSpec]:
    """What encode produces."""
    outputs, inputs = layout.site_shape(config, site)
    if scheme.weight.bits == 4:
        groups = scheme.weight.groups(inputs)
        return {
            "weight": TensorSpec((inputs, outputs // 2), ("int8",)),
            "weight_scale": TensorSpec((groups, outputs), ("float32", *FLOATS)),
        }
    if scheme.activation.dynamic:
        return {"weight": TensorSpec((outputs, inputs), ("int8",)), "weight_scale": TensorSpec((outputs,), FLOATS)}
    return {
        "weight": TensorSpec((outputs, inputs), ("int8",)),
        "deq_scale": TensorSpec((outputs,), ("float32", *FLOATS)),
        "input_scale": TensorSpec((inputs,), FLOATS),
        "input_offset": TensorSpec((inputs,), ("int8",)),
        "quant_bias": TensorSpec((outputs,), ("int32",)),
    }


def metadata(config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """File name -> JSON value. config.json always has openPangu's names, since that is the network it is for."""
    settings: dict[str, Any] = {"quant_method": _METHODS[config.online_hadamard], "group_size": plan.group_size}
    description = describe(config, plan, specs)
    if plan.cache is not None:
        settings[kv_cache.TYPE_KEY] = INT8_CACHE_WORD
        description.update(dict.fromkeys(kv_cache.specs(config), INT8_CACHE_WORD))
    return {QUANTIZATION_FILE: description, "config.json": {**pangu_config(config), "quantization_config": settings}}


def recognises(directory: Path, config: ModelConfig) -> bool:
    settings = config.raw.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") in _METHODS.values()


def read_plan(directory: Path, config: ModelConfig) -> Plan:
    """The inverse of metadata. Raises CheckpointError."""
    settings, where = config.raw["quantization_config"], directory / "config.json"
    cache = kv_cache.read_scheme(settings.get(kv_cache.TYPE_KEY), f"{where}: quantization_config.{kv_cache.TYPE_KEY}")
    group_size = read_group_size(settings, f"{where}: quantization_config.group_size")
    return read_description(
        config, read_json(directory / QUANTIZATION_FILE), group_size, cache, directory / QUANTIZATION_FILE
    )
