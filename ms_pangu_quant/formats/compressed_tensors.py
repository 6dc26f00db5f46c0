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
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.formats.linear import (
    FLOATS,
    TensorSpec,
    factor_of,
    family_config,
    narrow,
    refuse_online_hadamard,
)
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import ARITHMETICS, PRESETS, QuantScheme, TensorScheme

NAME = "compressed-tensors"


def encode(block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """Tensors to store, keys without the layer's name."""
    tensors: dict[str, NDArray[Any]] = {"weight": linear.weight.codes, "weight_scale": narrow(linear.weight.scale)}
    if not linear.scheme.activation.dynamic:
        if linear.input_scale is None:
            raise ValueError("a static layer needs the scale of its input")
        tensors["input_scale"] = np.array([1.0 / linear.input_scale]).astype(np.float32)
        if linear.input_offset:
            tensors["input_zero_point"] = np.array([linear.input_offset], np.int8)
    return tensors


def decode(
    block: Block, site: layout.LinearSite, scheme: QuantScheme, tensors: Mapping[str, NDArray[Any]]
) -> QuantizedLinear:
    """Inverse of encode. Raises CheckpointError for what it would have to drop."""
    if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
        raise CheckpointError(f"{site.name}.weight_zero_point: is not zero; only symmetric weights are read here")
    codes = tensors["weight"]
    if scheme.weight.bits == 4 and (codes.min() < -8 or codes.max() > 7):
        raise CheckpointError(f"{site.name}.weight: codes from {codes.min()} to {codes.max()}, wanted -8 to 7")
    weight = QuantizedWeight(codes, tensors["weight_scale"].astype(np.float32))
    if scheme.activation.dynamic:
        return QuantizedLinear(scheme, weight)
    offset = int(tensors["input_zero_point"][0]) if "input_zero_point" in tensors else 0
    return QuantizedLinear(scheme, weight, factor_of(np.float32(tensors["input_scale"][0])), offset)


def specs(config: ModelConfig, site: layout.LinearSite, scheme: QuantScheme) -> dict[str, TensorSpec]:
    """What encode produces, and the zero points that other writers add."""
    outputs, inputs = layout.site_shape(config, site)
    groups = scheme.weight.groups(inputs)
    # int4 scales are float32 values as a rule, int8 ones bfloat16: what is written first decides the size that is told.
    floats = ("float32", *FLOATS) if scheme.weight.bits == 4 else FLOATS
    found = {
        "weight": TensorSpec((outputs, inputs), ("int8",)),
        "weight_scale": TensorSpec((outputs, groups), floats),
        "weight_zero_point": TensorSpec((outputs, groups), ("int8",), optional=True),
    }
    if not scheme.activation.dynamic:
        found["input_scale"] = TensorSpec((1,), ("float32", *FLOATS))
        found["input_zero_point"] = TensorSpec((1,), ("int8",), optional=True)
    return found


def metadata(config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """File name -> JSON value. One scheme for all layers is written as "Linear", several by the layers' names."""
    refuse_online_hadamard(config, NAME)
    if plan.cache is not None:
        raise RequestError(
            f"the {NAME} format: its readers have float8 key/value caches with one scale for a tensor or a head, none of "
            "int8 with one for each channel; use --format mindformers or ascend, or a recipe without kv_cache"
        )
    names: dict[QuantScheme, list[str]] = {}
    for name, _, scheme in plan:
        if scheme is not None:
            names.setdefault(scheme, []).append(name)
    ignored = [name for name, _, scheme in plan if scheme is None]
    used = sorted(names, key=lambda scheme: (ARITHMETICS.index(scheme.arithmetic), scheme.group_size))
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(used) == 1 else names[scheme],
                "weights": _tensor(scheme.weight, group_size=scheme.group_size or None),
                "input_activations": _tensor(scheme.activation),
                "output_activations": None,
            }
            for number, scheme in enumerate(used)
        },
        "ignore": [*ignored, layout.HEAD.removesuffix(".weight")],
        "kv_cache_scheme": None,
    }
    return {"config.json": {**family_config(config), "quantization_config": settings}}


def _tensor(scheme: TensorScheme, **sizes: int | None) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "strategy": scheme.granularity,
        **sizes,
        "symmetric": True,
        "dynamic": scheme.dynamic,
    }


def recognises(directory: Path, config: ModelConfig) -> bool:
    settings = config.raw.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == "compressed-tensors"


def read_plan(directory: Path, config: ModelConfig) -> Plan:
    """The inverse of metadata. Raises CheckpointError for a scheme that is not computed here, and for a quantized cache,
    which would be left out of what is computed."""
    where = f"{directory / 'config.json'}: quantization_config"
    settings = config.raw["quantization_config"]
    if settings.get("format") not in ("int-quantized", "naive-quantized"):
        raise CheckpointError(f"{where}.format is {settings.get('format')!r}, wanted 'int-quantized'")
    if settings.get("kv_cache_scheme") is not None:
        raise CheckpointError(
            f"{where}.kv_cache_scheme is {settings['kv_cache_scheme']!r}; a quantized key/value cache is not read from "
            "this format"
        )
    groups, ignored = settings.get("config_groups"), settings.get("ignore") or []
    if not isinstance(groups, Mapping) or not isinstance(ignored, list):
        raise CheckpointError(f"{where}: wanted an object config_groups and a list ignore")
    known = {name: _scheme(group, f"{where}.config_groups.{name}") for name, group in groups.items()}
    schemes = {}
    for name in layout.layer_names(config):
        found = None if any(_matches(pattern, name) for pattern in ignored) else _group_of(name, groups)
        schemes[name] = None if found is None else known[found]
    plan = Plan.of_layers(schemes, config.num_hidden_layers)
    if len(plan.group_sizes) > 1:
        raise CheckpointError(
            f"{where}: int4 group sizes {sorted(plan.group_sizes)} are mixed; the network has one for all layers"
        )
    return plan


def _group_of(name: str, groups: Mapping[str, Any]) -> str | None:
    """The config group of a layer; a name decides before the class does."""
    targets = {key: group.get("targets") or [] for key, group in groups.items()}
    named = [key for key, patterns in targets.items() if any(_matches(each, name) for each in patterns)]
    of_class = [key for key, patterns in targets.items() if "Linear" in patterns]
    return next(iter(named + of_class), None)


def _matches(pattern: str, name: str) -> bool:
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name


def _scheme(group: Any, where: str) -> QuantScheme:
    """Of a config group."""
    weights, inputs = (
        (group.get(key) or {}) if isinstance(group, Mapping) else {} for key in ("weights", "input_activations")
    )
    size = weights.get("group_size") or 0
    shape = (
        weights.get("num_bits"),
        weights.get("strategy"),
        inputs.get("num_bits"),
        inputs.get("strategy"),
        bool(inputs.get("dynamic")),
    )
    scheme = next((preset for preset in PRESETS.values() if _shape(preset) == shape), None)
    integers = weights.get("type") == inputs.get("type") == "int"
    # A static zero point is read from its tensor; per-token ones are computed here without.
    symmetric = weights.get("symmetric", True) and (inputs.get("symmetric", True) or not inputs.get("dynamic"))
    grouped = weights.get("strategy") == "group"
    sized = isinstance(size, int) and size % 2 == 0 and grouped == (size > 0)
    if scheme is None or not integers or not symmetric or not sized:
        raise CheckpointError(
            f"{where}: weights {dict(weights)}, input_activations {dict(inputs)}: not a scheme that is computed here; "
            "wanted symmetric int8 per channel or int4 per channel or group, inputs int8 per token, or per tensor"
        )
    return scheme.grouped(size) if grouped else scheme


def _shape(scheme: QuantScheme) -> tuple[Any, ...]:
    weight, activation = scheme.weight, scheme.activation
    return weight.bits, weight.granularity, activation.bits, activation.granularity, activation.dynamic
