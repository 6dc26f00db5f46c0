"""The on-disk contract of MindFormers' Golden Stick quantization, written and read.

A directory has quantization_description.json (parameter name -> "W8A8" | "W8A8_DYNAMIC" | "W4A8_DYNAMIC" | "FLOAT"),
safetensors with Hugging Face names, and config.json whose quantization_config holds quant_method and group_size. Per layer:

  W8A8_DYNAMIC   weight int8 [out, in], weight_scale [out]
  W8A8           weight int8 [out, in], deq_scale float32 [out] (= weight scale * activation scale), input_scale [in] (the
                 factor activations are multiplied by, the same in every channel), input_offset int8 [in], quant_bias
                 int32 [out]; the layer's own bias is added besides, so quant_bias is zero
  W4A8_DYNAMIC   weight int8 [in, out/2] (two int4 a byte, see packing.pack_along_out), weight_scale float32 [groups, out].
                 MindFormers has this kind for experts only; for dense layers it is this project's linear method.

weight_scale and input_scale are bfloat16 tensors when every value is one: MindFormers' parameters have the network's dtype,
and its loaders widen but never narrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import QUANTIZATION_FILE, ModelConfig
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import Block, CheckpointReader, is_quantized
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats import packing
from ms_pangu_quant.quantizers.grid import QuantizedWeight, is_bfloat16

KINDS = ("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
FLOAT = "FLOAT"


@dataclass(frozen=True)
class QuantizedLinear:
    """One quantized layer. input_scale is the factor x is multiplied by before rounding; None means per-token dynamic."""

    kind: str
    weight: QuantizedWeight
    input_scale: float | None = None


def encode(linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """Tensors to store, keys without the layer's name ("weight", "weight_scale", ...)."""
    codes, scale = linear.weight.codes, linear.weight.scale
    if linear.kind == "W4A8_DYNAMIC":
        return {"weight": packing.pack_along_out(codes), "weight_scale": np.ascontiguousarray(scale.T)}
    if linear.kind == "W8A8_DYNAMIC":
        return {"weight": codes, "weight_scale": _narrow(scale[:, 0])}
    if linear.input_scale is None:
        raise ValueError("a static layer needs the scale of its input")
    outputs, inputs = codes.shape
    factor = np.float32(linear.input_scale)
    return {
        "weight": codes,
        "deq_scale": scale[:, 0] / factor,
        "input_scale": _narrow(np.full(inputs, factor, np.float32)),
        "input_offset": np.zeros(inputs, np.int8),
        "quant_bias": np.zeros(outputs, np.int32),
    }


def decode(kind: str, tensors: Mapping[str, NDArray[Any]]) -> QuantizedLinear:
    """Inverse of encode."""
    if kind == "W4A8_DYNAMIC":
        scale = np.ascontiguousarray(tensors["weight_scale"].T, dtype=np.float32)
        return QuantizedLinear(kind, QuantizedWeight(packing.unpack_along_out(tensors["weight"]), scale))
    if kind == "W8A8_DYNAMIC":
        scale = tensors["weight_scale"].astype(np.float32)[:, None]
        return QuantizedLinear(kind, QuantizedWeight(tensors["weight"], scale))
    deq_scale = tensors["deq_scale"].astype(np.float32)
    factor = np.float32(tensors["input_scale"][0])
    scale = deq_scale * factor
    narrow = scale.astype(ml_dtypes.bfloat16).astype(np.float32)  # deq_scale was rounded: find the scale it came from
    scale = np.where(narrow / factor == deq_scale, narrow, scale)[:, None]
    return QuantizedLinear(kind, QuantizedWeight(tensors["weight"], scale), float(factor))


def stored_shapes(kind: str, outputs: int, inputs: int, group_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """What encode produces for a layer [outputs, inputs]: key -> (shape, dtype: "int8", "int32", or "f" for any float)."""
    if kind == "W4A8_DYNAMIC":
        groups = inputs // group_size if group_size else 1
        return {"weight": ((inputs, outputs // 2), "int8"), "weight_scale": ((groups, outputs), "f")}
    if kind == "W8A8_DYNAMIC":
        return {"weight": ((outputs, inputs), "int8"), "weight_scale": ((outputs,), "f")}
    return {
        "weight": ((outputs, inputs), "int8"),
        "deq_scale": ((outputs,), "f"),
        "input_scale": ((inputs,), "f"),
        "input_offset": ((inputs,), "int8"),
        "quant_bias": ((outputs,), "int32"),
    }


def runtime_tensors(linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    """The tensors of one layer as the CPU backend's linear methods hold them, keys without the layer's name."""
    if linear.kind == "W4A8_DYNAMIC":
        return {"weight": packing.pack_offset_along_in(linear.weight.codes), "group_scale": linear.weight.scale}
    stored = encode(linear)
    return {key: value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value for key, value in stored.items()}


def output_config(config: ModelConfig, group_size: int) -> dict[str, Any]:
    """config.json of the quantized directory: always openPangu's names, since that is the network it is for."""
    raw = dict(config.raw)
    for key in ("auto_map", "attention_bias", "mlp_bias"):
        raw.pop(key, None)
    raw.update(
        architectures=["PanguEmbeddedForCausalLM"],
        model_type="PanguEmbedded",
        bias=config.attention_bias,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        num_key_value_heads=config.num_key_value_heads,
        tie_word_embeddings=config.tie_word_embeddings,
        quantization_config={"quant_method": "golden-stick", "group_size": group_size},
    )
    return raw


def _narrow(scale: NDArray[np.float32]) -> NDArray[Any]:
    return scale.astype(ml_dtypes.bfloat16) if is_bfloat16(scale) else scale


class QuantizedReader:
    """A quantized directory whose every tensor has been found, with the shape and dtype its description implies."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError naming file, tensor, what was found and what was wanted."""
        self.directory = directory
        self.config = ModelConfig.from_file(directory / "config.json")
        settings = self.config.raw.get("quantization_config")
        if not isinstance(settings, Mapping) or settings.get("quant_method") != "golden-stick":
            raise CheckpointError(
                f"{directory / 'config.json'}: quantization_config is {settings!r}, wanted "
                "quant_method 'golden-stick'; other quantized formats are not read here"
            )
        group_size = settings.get("group_size", 0)
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 0:
            raise CheckpointError(
                f"{directory / 'config.json'}: quantization_config.group_size is {group_size!r}, wanted a "
                "whole number; 0 is one scale per output channel"
            )
        self.group_size = group_size
        self.description = _read_description(directory / QUANTIZATION_FILE)
        self.files = TensorFiles(directory)
        self.kinds = {
            f"{layout.block_prefix(index)}{site.name}.weight": self._kind(index, site)
            for index in range(self.config.num_hidden_layers)
            for site in layout.SITES
        }
        self._check()

    def _kind(self, index: int, site: layout.LinearSite) -> str:
        name = f"{layout.block_prefix(index)}{site.name}.weight"
        kind = self.description.get(name)
        if kind not in (*KINDS, FLOAT):
            raise CheckpointError(
                f"{self.directory / QUANTIZATION_FILE}: {name} is {kind!r}, wanted one of {', '.join((*KINDS, FLOAT))}"
            )
        return str(kind)

    def _check(self) -> None:
        expected = layout.outer_shapes(self.config)
        integers: dict[str, tuple[tuple[int, ...], str]] = {}
        for index in range(self.config.num_hidden_layers):
            prefix = layout.block_prefix(index)
            for name, shape in layout.block_shapes(self.config).items():
                expected[prefix + name] = shape
            for site in layout.SITES:
                kind = self.kinds[f"{prefix}{site.name}.weight"]
                if kind == FLOAT:
                    continue
                del expected[f"{prefix}{site.name}.weight"]
                outputs, inputs = layout.site_shape(self.config, site)
                for key, (shape, dtype) in stored_shapes(kind, outputs, inputs, self.group_size).items():
                    if dtype == "f":
                        expected[f"{prefix}{site.name}.{key}"] = shape
                    else:
                        integers[f"{prefix}{site.name}.{key}"] = shape, dtype
        optional = [layout.HEAD] if self.config.tie_word_embeddings else []
        self.files.check(expected, optional=[*optional, *integers])
        for name, (shape, dtype) in integers.items():
            entry = self.files.entries.get(name)
            if entry is None or entry.shape != shape or entry.dtype.name != dtype:
                found = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing"
                raise CheckpointError(
                    f"{self.directory}: {name}: got {found}, {QUANTIZATION_FILE} implies {dtype} {list(shape)}"
                )

    def block(self, index: int) -> tuple[Block, dict[str, QuantizedLinear]]:
        return read_block(self.files, self.config, self.kinds, self.group_size, index)


def read_block(
    files: TensorFiles, config: ModelConfig, kinds: Mapping[str, str], group_size: int, index: int
) -> tuple[Block, dict[str, QuantizedLinear]]:
    """The float tensors of a stored block, and its quantized layers by site name; `kinds` as in the description."""
    prefix = layout.block_prefix(index)
    linears = {}
    for site in layout.SITES:
        kind = kinds[f"{prefix}{site.name}.weight"]
        if kind != FLOAT:
            keys = stored_shapes(kind, *layout.site_shape(config, site), group_size)
            tensors = {key: files.entries[f"{prefix}{site.name}.{key}"].read() for key in keys}
            _check_static(prefix + site.name, tensors)
            linears[site.name] = decode(kind, tensors)
    _check_fused_inputs(prefix, linears)
    names = [name for name in layout.block_shapes(config) if name.removesuffix(".weight") not in linears]
    return Block(config, {name: files.read_float32(prefix + name) for name in names}), linears


def open_checkpoint(path: Path) -> CheckpointReader | QuantizedReader:
    """The reader of a directory; whether it is quantized is told by its files, never by its name."""
    if (
        path.is_dir()
        and (path / "config.json").exists()
        and is_quantized(path, ModelConfig.from_file(path / "config.json"))
    ):
        return QuantizedReader(path)
    return CheckpointReader(path)


def _check_static(name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Refuse what decode would drop: zero points, a bias inside quant_bias, a scale for each input channel."""
    for key in ("input_offset", "quant_bias"):
        if key in tensors and tensors[key].any():
            raise CheckpointError(
                f"{name}.{key}: is not zero; only symmetric activations with a separate bias are read here"
            )
    scale = tensors.get("input_scale")
    if scale is not None and not (scale == scale[0]).all():
        raise CheckpointError(f"{name}.input_scale: differs between channels; wanted one scale for the whole input")


def _check_fused_inputs(prefix: str, linears: Mapping[str, QuantizedLinear]) -> None:
    """Layers that read the same input round it once, so they need the same scale."""
    for input_name in layout.INPUT_NAMES:
        scales = {
            prefix + site.name: linears[site.name].input_scale
            for site in layout.sites_reading(input_name)
            if site.name in linears
        }
        if len(set(scales.values())) > 1:
            listed = ", ".join(f"{name}.input_scale: {scale}" for name, scale in scales.items())
            raise CheckpointError(f"{listed}; these layers read the same input and need the same scale")


def network_tensors(prefix: str, block: Block, linears: Mapping[str, QuantizedLinear]) -> Iterator[tuple[str, Any]]:
    """(name, array) pairs of one block for network.load_tensors."""
    for name, value in block.tensors.items():
        if name.removesuffix(".weight") not in linears:
            yield prefix + name, ArraySlice(value)
    for site, linear in linears.items():
        for key, value in runtime_tensors(linear).items():
            yield f"{prefix}{site}.{key}", ArraySlice(value)


def all_tensors(reader: CheckpointReader | QuantizedReader) -> Iterator[tuple[str, ArraySlice]]:
    """Every tensor the network wants, a block in memory at a time."""
    for name in layout.outer_shapes(reader.config):
        yield name, ArraySlice(reader.files.read_float32(name))
    for index in range(reader.config.num_hidden_layers):
        block, linears = reader.block(index) if isinstance(reader, QuantizedReader) else (reader.block(index), {})
        yield from network_tensors(layout.block_prefix(index), block, linears)


class ArraySlice:
    """An array with the interface of safetensors' slices, which MindFormers' weight loaders expect."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.ascontiguousarray(self.array[index])


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(description, dict):
        raise CheckpointError(f"{path}: got a JSON {type(description).__name__}, wanted an object")
    return description
