"""compressed-tensors, the layout llm-compressor writes and vLLM, vllm-ascend and transformers read ("int-quantized").

config.json holds everything: quantization_config with config_groups (a scheme and the layers it is for) and a list of
layers to ignore. Per layer, with scales as divisors:

  W8A8_DYNAMIC   weight int8 [out, in], weight_scale [out, 1]
  W8A8           the same and input_scale [1]; input_zero_point int8 [1] if it is not zero. The bias stays a float tensor.
  W4A8_DYNAMIC   weight int8 [out, in], one int4 in each byte, weight_scale [out, groups]. This is how the library stores
                 int4 weights with int8 activations (its packed format is for float activations only), and the only form
                 vLLM's W4A8 loader takes; such a checkpoint is as large as W8A8.

Scales are bfloat16 tensors when every value is one, else float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import Block
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats.linear import (
    FLOAT,
    FLOATS,
    KINDS,
    QuantizedLinear,
    TensorSpec,
    factor_of,
    family_config,
    groups_of,
    narrow,
    refuse_online_hadamard,
)
from ms_pangu_quant.quantizers.grid import QuantizedWeight

NAME = "compressed-tensors"


def encode(block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """Tensors to store, keys without the layer's name."""
    tensors: dict[str, NDArray[Any]] = {"weight": linear.weight.codes, "weight_scale": narrow(linear.weight.scale)}
    if linear.kind == "W8A8":
        if linear.input_scale is None:
            raise ValueError("a static layer needs the scale of its input")
        tensors["input_scale"] = np.array([1.0 / linear.input_scale]).astype(np.float32)
        if linear.input_offset:
            tensors["input_zero_point"] = np.array([linear.input_offset], np.int8)
    return tensors


def decode(block: Block, site: layout.LinearSite, kind: str, tensors: Mapping[str, NDArray[Any]]) -> QuantizedLinear:
    """Inverse of encode. Raises CheckpointError for what it would have to drop."""
    if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
        raise CheckpointError(f"{site.name}.weight_zero_point: is not zero; only symmetric weights are read here")
    codes = tensors["weight"]
    if kind == "W4A8_DYNAMIC" and (codes.min() < -8 or codes.max() > 7):
        raise CheckpointError(f"{site.name}.weight: codes from {codes.min()} to {codes.max()}, wanted -8 to 7")
    weight = QuantizedWeight(codes, tensors["weight_scale"].astype(np.float32))
    if kind != "W8A8":
        return QuantizedLinear(kind, weight)
    offset = int(tensors["input_zero_point"][0]) if "input_zero_point" in tensors else 0
    return QuantizedLinear(kind, weight, factor_of(np.float32(tensors["input_scale"][0])), offset)


def specs(config: ModelConfig, site: layout.LinearSite, kind: str, group_size: int) -> dict[str, TensorSpec]:
    """What encode produces, and the zero points that other writers add."""
    outputs, inputs = layout.site_shape(config, site)
    groups = groups_of(config, site, group_size) if kind == "W4A8_DYNAMIC" else 1
    # int4 scales are float32 values as a rule, int8 ones bfloat16: what is written first decides the size that is told.
    floats = ("float32", *FLOATS) if kind == "W4A8_DYNAMIC" else FLOATS
    found = {
        "weight": TensorSpec((outputs, inputs), ("int8",)),
        "weight_scale": TensorSpec((outputs, groups), floats),
        "weight_zero_point": TensorSpec((outputs, groups), ("int8",), optional=True),
    }
    if kind == "W8A8":
        found["input_scale"] = TensorSpec((1,), ("float32", *FLOATS))
        found["input_zero_point"] = TensorSpec((1,), ("int8",), optional=True)
    return found


def metadata(config: ModelConfig, kinds: Mapping[str, str], group_size: int, int8_cache: bool = False) -> dict[str, Any]:
    """File name -> JSON value. One scheme for all layers is written as "Linear", several by the layers' names."""
    refuse_online_hadamard(config, NAME)
    if int8_cache:
        raise RequestError(
            f"the {NAME} format: its readers have float8 key/value caches with one scale for a tensor or a head, none of "
            "int8 with one for each channel; use --format mindformers or ascend, or a recipe without kv_cache"
        )
    names = {kind: [name.removesuffix(".weight") for name, found in kinds.items() if found == kind] for kind in KINDS}
    used = [kind for kind in KINDS if names[kind]]
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(used) == 1 else names[kind],
            "weights": _weights(kind, group_size),
            "input_activations": _activations(kind),
            "output_activations": None,
        }
        for number, kind in enumerate(used)
    }
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(name.removesuffix(".weight") for name, kind in kinds.items() if kind == FLOAT), "lm_head"],
        "kv_cache_scheme": None,
    }
    return {"config.json": {**family_config(config), "quantization_config": settings}}


def _weights(kind: str, group_size: int) -> dict[str, Any]:
    bits, grouped = (4, bool(group_size)) if kind == "W4A8_DYNAMIC" else (8, False)
    return {
        "num_bits": bits,
        "type": "int",
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "symmetric": True,
        "dynamic": False,
    }


def _activations(kind: str) -> dict[str, Any]:
    dynamic = kind != "W8A8"
    return {
        "num_bits": 8,
        "type": "int",
        "strategy": "token" if dynamic else "tensor",
        "symmetric": True,
        "dynamic": dynamic,
    }


def recognises(directory: Path, config: ModelConfig) -> bool:
    settings = config.raw.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "compressed-tensors"


def read_int8_cache(directory: Path, config: ModelConfig) -> bool:
    """False. Raises CheckpointError for a quantized cache, which would be left out of what is computed."""
    scheme = config.raw["quantization_config"].get("kv_cache_scheme")
    if scheme is not None:
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config.kv_cache_scheme is {scheme!r}; a quantized key/value cache "
            "is not read from this format"
        )
    return False


def read_metadata(directory: Path, config: ModelConfig) -> tuple[dict[str, Any], int]:
    """(layer's weight name -> kind, group size). Raises CheckpointError for a scheme that is not computed here."""
    where = f"{directory / 'config.json'}: quantization_config"
    settings = config.raw["quantization_config"]
    if settings.get("format") not in ("int-quantized", "naive-quantized"):
        raise CheckpointError(f"{where}.format is {settings.get('format')!r}, wanted 'int-quantized'")
    groups, ignored = settings.get("config_groups"), settings.get("ignore") or []
    if not isinstance(groups, Mapping) or not isinstance(ignored, list):
        raise CheckpointError(f"{where}: wanted an object config_groups and a list ignore")
    schemes = {name: _scheme(group, f"{where}.config_groups.{name}") for name, group in groups.items()}
    kinds, sizes = {}, set()
    for weight_name in layout.linear_names(config):
        name = weight_name.removesuffix(".weight")
        kinds[weight_name] = FLOAT
        if any(_matches(pattern, name) for pattern in ignored):
            continue
        for exact in (True, False):  # a name decides before the class does
            found = next((key for key in groups if _targets(groups[key], name, exact=exact)), None)
            if found:
                kinds[weight_name], size = schemes[found]
                sizes |= {size} if kinds[weight_name] == "W4A8_DYNAMIC" else set()
                break
    if len(sizes) > 1:
        raise CheckpointError(f"{where}: int4 group sizes {sorted(sizes)} are mixed; the network has one for all layers")
    return kinds, sizes.pop() if sizes else 0


def _targets(group: Mapping[str, Any], name: str, *, exact: bool) -> bool:
    targets = group.get("targets") or []
    return any(_matches(target, name) for target in targets) if exact else "Linear" in targets


def _matches(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _scheme(group: Any, where: str) -> tuple[str, int]:
    """(kind, group size) of a config group."""
    weights, inputs = (
        (group.get(key) or {}) if isinstance(group, Mapping) else {} for key in ("weights", "input_activations")
    )
    size = weights.get("group_size") or 0
    shape = (weights.get("num_bits"), weights.get("strategy"), inputs.get("strategy"), bool(inputs.get("dynamic")))
    kinds: dict[tuple[Any, ...], str] = {
        (8, "channel", "token", True): "W8A8_DYNAMIC",
        (8, "channel", "tensor", False): "W8A8",
        (4, "channel", "token", True): "W4A8_DYNAMIC",
        (4, "group", "token", True): "W4A8_DYNAMIC",
    }
    kind = kinds.get(shape)
    integers = weights.get("type") == inputs.get("type") == "int" and inputs.get("num_bits") == 8
    # A static zero point is read from its tensor; per-token ones are computed here without.
    symmetric = weights.get("symmetric", True) and (kind == "W8A8" or inputs.get("symmetric", True))
    if kind is None or not integers or not symmetric or (weights.get("strategy") == "group") != (size > 0):
        raise CheckpointError(
            f"{where}: weights {dict(weights)}, input_activations {dict(inputs)}: not a scheme that is computed here; "
            "wanted symmetric int8 per channel or int4 per channel or group, inputs int8 per token, or per tensor"
        )
    return kind, size if weights.get("strategy") == "group" else 0
