"""AscendV1, the layout msModelSlim writes and vllm-ascend and MindIE read: quant_model_description.json beside safetensors.

Everything about scales is the other way round than in the mindformers format. Per layer:

  W8A8_DYNAMIC   weight int8 [out, in], weight_scale float32 [out, 1], weight_offset float32 [out, 1] of zeros
  W8A8           weight int8 [out, in]; input_scale float32 [1], a DIVISOR; input_offset float32 [1]; deq_scale [out] =
                 input_scale * weight scale, float32 for a bfloat16 model, else the float32's bits widened to int64;
                 quant_bias int32 [out] = round(bias / deq_scale - input_offset * sum of the codes). The bias is in
                 quant_bias; the bias tensor is stored besides and vllm-ascend does not add it again.
  W4A8_DYNAMIC   weight int8 [out/2, in] (packing.pack_along_out, transposed back), weight_scale and weight_offset float32
                 [out, 1], scale_bias float32 [out, 1] = 8 * sum over the inputs of the dequantized weight (the kernel
                 reads a nibble as code + 8); [out, 16] for o_proj and down_proj, one column for each sixteenth of the
                 inputs, so that a tensor-parallel rank finds its own part. With groups the scale of a group is
                 weight_scale * weight_scale_second [out, groups]; here weight_scale is a power of two, so that the
                 product is exact.

The scales of an int8 key/value cache ("C8") are in kv_cache.py.

The stored layout is the public contract of msModelSlim 26.1 (format "ascendv1", version "1.0.0").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, ModelConfig, read_json
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats import kv_cache, packing
from ms_pangu_quant.formats.linear import (
    TensorSpec,
    describe,
    factor_of,
    family_config,
    origin,
    read_description,
    read_group_size,
    refuse_online_hadamard,
)
from ms_pangu_quant.formats.words import FLOAT, INT8_CACHE_WORD, WORDS
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import QuantScheme

NAME = "ascend"
ROW_COLUMNS = 16  # the largest tensor parallelism a checkpoint is made for
_F32 = ("float32", "bfloat16", "float16")


def encode(block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """Tensors to store, keys without the layer's name."""
    codes, scale = linear.weight.codes, linear.weight.scale
    if linear.scheme.weight.bits == 4:
        return _encode_int4(site, linear)
    if linear.scheme.activation.dynamic:
        return {"weight": codes, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}
    if linear.input_scale is None:
        raise ValueError("a static layer needs the scale of its input")
    input_scale = np.float32(1.0 / linear.input_scale)
    deq_scale = scale[:, 0] * input_scale
    return {
        "weight": codes,
        "quant_bias": _quant_bias(linear, deq_scale, block.bias(site)),
        "input_scale": np.array([input_scale], np.float32),
        "input_offset": np.array([linear.input_offset], np.float32),
        "deq_scale": deq_scale if block.config.torch_dtype == "bfloat16" else deq_bits(deq_scale),
    }


def decode(
    block: Block, site: layout.LinearSite, scheme: QuantScheme, tensors: Mapping[str, NDArray[Any]]
) -> QuantizedLinear:
    """Inverse of encode. Raises CheckpointError for what it would have to drop."""
    for key in ("weight_offset", "weight_offset_second"):
        if key in tensors and tensors[key].any():
            raise CheckpointError(f"{site.name}.{key}: is not zero; only symmetric weights are read here")
    if scheme.weight.bits == 4:
        return QuantizedLinear(scheme, _decode_int4(site, tensors))
    if scheme.activation.dynamic:
        return QuantizedLinear(scheme, QuantizedWeight(tensors["weight"], tensors["weight_scale"].astype(np.float32)))
    deq_scale = deq_values(site, tensors["deq_scale"])
    input_scale = np.float32(tensors["input_scale"][0])
    offset = float(tensors["input_offset"][0])
    if offset != round(offset) or abs(offset) > 128:
        raise CheckpointError(f"{site.name}.input_offset: is {offset}, wanted a whole number from -128 to 128")
    scale = origin(deq_scale, deq_scale / input_scale, lambda weight_scale: weight_scale * input_scale)
    weight = QuantizedWeight(tensors["weight"], scale[:, None])
    linear = QuantizedLinear(scheme, weight, factor_of(input_scale), int(offset))
    if not np.array_equal(tensors["quant_bias"], _quant_bias(linear, deq_scale, block.bias(site))):
        raise CheckpointError(
            f"{site.name}.quant_bias: is not round(bias / deq_scale - input_offset * sum(weight)); "
            "a correction of another kind is not read here"
        )
    return linear


def _quant_bias(
    linear: QuantizedLinear, deq_scale: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> NDArray[np.int32]:
    """In float32 throughout, as msModelSlim computes it: the same integers come out."""
    codes = linear.weight.codes
    correction = codes.sum(axis=1, dtype=np.int64).astype(np.float32) * np.float32(linear.input_offset)
    folded = np.zeros(len(codes), np.float32) if bias is None else bias / deq_scale
    rounded = np.rint(folded - correction)
    if np.abs(rounded).max(initial=0) >= 2**31:
        raise CheckpointError("quant_bias: a bias is more than 2^31 quantization steps; keep this layer dynamic")
    return np.asarray(rounded, np.int32)


def deq_bits(deq_scale: NDArray[np.float32]) -> NDArray[np.int64]:
    """A float32's bits as an integer, widened: what the kernel of a float16 network takes for a scale."""
    return deq_scale.view(np.int32).astype(np.int64)


def deq_values(site: layout.LinearSite, stored: NDArray[Any]) -> NDArray[np.float32]:
    if stored.dtype != np.int64:
        return stored.astype(np.float32)
    if (stored >> 32).any():
        raise CheckpointError(f"{site.name}.deq_scale: has bits above the lowest 32; wanted float32 bits in an int64")
    return stored.astype(np.int32).view(np.float32)


def _encode_int4(site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    weight = linear.weight
    packed = np.ascontiguousarray(packing.pack_along_out(weight.codes).T)
    tensors: dict[str, NDArray[Any]] = {"weight": packed, "weight_scale": weight.scale}
    if linear.scheme.group_size:  # one group as well: readers go by the description's group_size
        tensors["weight_scale"], second = _split(weight.scale)
        tensors["weight_scale_second"] = second
        tensors["weight_offset_second"] = np.zeros(second.shape, np.int64)
    tensors["weight_offset"] = np.zeros_like(tensors["weight_scale"])
    tensors["scale_bias"] = scale_bias(site, weight)
    return tensors


def _decode_int4(site: layout.LinearSite, tensors: Mapping[str, NDArray[Any]]) -> QuantizedWeight:
    codes = packing.unpack_along_out(np.ascontiguousarray(tensors["weight"].T))
    scale = tensors["weight_scale"].astype(np.float32)
    if "weight_scale_second" in tensors:
        scale = scale * tensors["weight_scale_second"].astype(np.float32)
    weight = QuantizedWeight(codes, scale)
    if "scale_bias" in tensors:
        wanted = scale_bias(site, weight)
        # Others add in float32 and in another order: allow its rounding, relative to the sum of absolute values.
        slack = 8 * np.abs(weight.dequantize()).sum(axis=1, keepdims=True) * 2.0**-17
        if not (np.abs(tensors["scale_bias"] - wanted) <= slack).all():
            raise CheckpointError(f"{site.name}.scale_bias: is not 8 * sum(weight * scale); the codes or scales are others")
    return weight


def scale_bias(site: layout.LinearSite, weight: QuantizedWeight) -> NDArray[np.float32]:
    """8 * sum of the dequantized weight over each column's inputs, [out, 1] or [out, 16]; summed in float64."""
    outputs, inputs = weight.codes.shape
    columns = ROW_COLUMNS if site.writes_stream else 1
    if inputs % columns:
        raise RequestError(
            f"{site.name}: has {inputs} inputs; int4 in the ascend format sums them in {columns} equal parts: use "
            "another --format, or keep this layer in w8a8"
        )
    groups = weight.scale.shape[1]
    total = np.empty((outputs, columns), np.float64)
    for start in range(0, outputs, 512):  # a few MiB at a time
        rows = slice(start, start + 512)
        grouped = weight.codes[rows].reshape(-1, groups, inputs // groups) * weight.scale[rows, :, None].astype(np.float64)
        total[rows] = grouped.reshape(-1, columns, inputs // columns).sum(axis=2)
    return (8 * total).astype(np.float32)


def _split(scale: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """scale [out, groups] -> ([out, 1], [out, groups]) whose product is exactly it."""
    _, exponent = np.frexp(scale.max(axis=1, keepdims=True))
    power = np.ldexp(np.float32(1), exponent).astype(np.float32)
    return power, scale / power


def specs(config: ModelConfig, site: layout.LinearSite, scheme: QuantScheme) -> dict[str, TensorSpec]:
    """What encode produces. weight_scale of a W8A8 layer is msModelSlim's older writer's; it is not needed."""
    outputs, inputs = layout.site_shape(config, site)
    per_channel = TensorSpec((outputs, 1), _F32)
    if scheme.weight.bits == 4:
        found = {
            "weight": TensorSpec((outputs // 2, inputs), ("int8",)),
            "weight_scale": per_channel,
            "weight_offset": per_channel,
        }
        if scheme.group_size:
            groups = scheme.weight.groups(inputs)
            found["weight_scale_second"] = TensorSpec((outputs, groups), _F32)
            found["weight_offset_second"] = TensorSpec((outputs, groups), ("int64", *_F32))
        columns = ROW_COLUMNS if site.writes_stream else 1
        return {**found, "scale_bias": TensorSpec((outputs, columns), ("float32",))}
    if scheme.activation.dynamic:
        weight = TensorSpec((outputs, inputs), ("int8",))
        return {"weight": weight, "weight_scale": per_channel, "weight_offset": per_channel}
    deq = ("float32", "int64") if config.torch_dtype == "bfloat16" else ("int64", "float32")
    return {
        "weight": TensorSpec((outputs, inputs), ("int8",)),
        "quant_bias": TensorSpec((outputs,), ("int32",)),
        "input_scale": TensorSpec((1,), _F32),
        "input_offset": TensorSpec((1,), (*_F32, "int8")),
        "deq_scale": TensorSpec((outputs,), deq),
    }


def metadata(config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """File name -> JSON value. config.json names no quantization: the loaders find it by the description."""
    refuse_online_hadamard(config, NAME)
    used = {scheme.arithmetic for _, _, scheme in plan if scheme is not None}
    description: dict[str, Any] = {
        "version": "1.0.0",
        "model_quant_type": WORDS[min(used)] if used else FLOAT,  # the one of the fewest bits
        "group_size": plan.group_size,
        "metadata": {},
        "optional": {},
    }
    description.update(describe(config, plan, specs))
    if plan.cache is not None:
        description[kv_cache.TYPE_KEY] = INT8_CACHE_WORD
        description.update(dict.fromkeys(kv_cache.specs(config), INT8_CACHE_WORD))
    description[layout.HEAD] = FLOAT  # a tied head too: vllm-ascend looks it up, and msModelSlim writes it
    return {ASCEND_FILE: description, "config.json": family_config(config)}


def recognises(directory: Path, config: ModelConfig) -> bool:
    return (directory / ASCEND_FILE).exists() and not config.raw.get("quantization_config")


def read_plan(directory: Path, config: ModelConfig) -> Plan:
    """The inverse of metadata. Raises CheckpointError."""
    path = directory / ASCEND_FILE
    description = read_json(path)
    cache = kv_cache.read_scheme(description.get(kv_cache.TYPE_KEY), f"{path}: {kv_cache.TYPE_KEY}")
    group_size = read_group_size(description, f"{path}: group_size")
    plan = read_description(config, description, group_size, cache, path)
    if plan.group_sizes and description.get("version") != "1.0.0":
        raise CheckpointError(
            f"{path}: version is {description.get('version')!r}; only '1.0.0' packs two int4 into a byte, "
            "the older layout is not read here"
        )
    return plan
