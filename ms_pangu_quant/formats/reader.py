"""One reader for every format of a quantized directory; which one it is, its files say and never its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import Block, CheckpointReader, is_quantized
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats import ascend, compressed_tensors, kv_cache, mindformers
from ms_pangu_quant.formats.linear import FLOAT, KINDS, QuantizedLinear, TensorSpec
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache


class Format(Protocol):
    """An on-disk layout: a module of this folder. To add one: the module, a line in FORMATS, goldens, rows in serving."""

    NAME: str

    def encode(self, block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
        """The tensors of one layer; block holds its bias and the config."""

    def decode(
        self, block: Block, site: layout.LinearSite, kind: str, tensors: Mapping[str, NDArray[Any]]
    ) -> QuantizedLinear:
        """Inverse of encode."""

    def specs(self, config: ModelConfig, site: layout.LinearSite, kind: str, group_size: int) -> dict[str, TensorSpec]:
        """Shapes and dtypes of what encode produces."""

    def metadata(
        self, config: ModelConfig, kinds: Mapping[str, str], group_size: int, int8_cache: bool = False
    ) -> dict[str, Any]:
        """JSON files of the directory, config.json among them; kinds: weight name -> kind or FLOAT.

        Raises RequestError for what the format cannot say.
        """

    def recognises(self, directory: Path, config: ModelConfig) -> bool: ...

    def read_metadata(self, directory: Path, config: ModelConfig) -> tuple[dict[str, Any], int]:
        """(weight name -> kind, group size), the inverse of metadata."""

    def read_int8_cache(self, directory: Path, config: ModelConfig) -> bool:
        """Whether the directory has the scales of an int8 key/value cache."""


FORMATS: dict[str, Format] = {each.NAME: each for each in (mindformers, ascend, compressed_tensors)}


def find_format(directory: Path, config: ModelConfig) -> Format:
    """Raises CheckpointError if no format knows the directory."""
    for each in FORMATS.values():
        if each.recognises(directory, config):
            return each
    settings = config.raw.get("quantization_config")
    raise CheckpointError(
        f"{directory / 'config.json'}: quantization_config is {settings!r}, wanted quant_method 'golden-stick' or "
        "'compressed-tensors', or none beside a quant_model_description.json; other quantized formats are not read here"
    )


class QuantizedReader:
    """A quantized directory whose every tensor has been found, with the shape and dtype its description implies.

    kinds       "model.layers.0.self_attn.q_proj.weight" -> "W8A8" | "W8A8_DYNAMIC" | "W4A8_DYNAMIC" | "FLOAT"
    int8_cache  its keys and values are cached in int8.
    """

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError naming file, tensor, what was found and what was wanted."""
        self.directory = directory
        self.config = ModelConfig.from_file(directory / "config.json")
        self.format = find_format(directory, self.config)
        kinds, self.group_size = self.format.read_metadata(directory, self.config)
        for name, kind in kinds.items():
            if kind not in (*KINDS, FLOAT):
                raise CheckpointError(
                    f"{directory}: the description: {name} is {kind!r}, wanted one of {', '.join((*KINDS, FLOAT))}"
                )
        self.kinds: dict[str, str] = kinds
        self.int8_cache = self.format.read_int8_cache(directory, self.config)
        self.files = TensorFiles(directory)
        floats = float_shapes(self.config, self.kinds)
        quantized = quantized_specs(self.format, self.config, self.kinds, self.group_size)
        if self.int8_cache:
            quantized.update(kv_cache.specs(self.config))
        optional = [layout.HEAD] if self.config.tie_word_embeddings else []
        self.files.check(floats, optional=[*optional, *quantized])
        for name, spec in quantized.items():
            fault = self.spec_fault(name, spec)
            if fault:
                raise CheckpointError(f"{directory}: {fault}")

    def spec_fault(self, name: str, spec: TensorSpec) -> str | None:
        """What is wrong with a stored tensor's shape or dtype, or None."""
        entry = self.files.entries.get(name)
        if entry is None:
            return None if spec.optional else f"{name}: got nothing, its description implies {_words(spec)}"
        if entry.shape != spec.shape or entry.dtype.name not in spec.dtypes:
            return f"{name}: got {entry.dtype} {list(entry.shape)}, its description implies {_words(spec)}"
        return None

    def block(self, index: int) -> tuple[Block, dict[str, QuantizedLinear]]:
        return read_block(self.format, self.files, self.config, self.kinds, self.group_size, index)

    def cache(self, index: int) -> QuantizedCache | None:
        """The grids of a block's int8 cache, None for a float one."""
        return kv_cache.read_cache(self.files, self.config, index) if self.int8_cache else None


def _words(spec: TensorSpec) -> str:
    return f"{' or '.join(dict.fromkeys(spec.dtypes))} {list(spec.shape)}"


def float_shapes(config: ModelConfig, kinds: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Full names and shapes of the tensors that stay float."""
    shapes = layout.outer_shapes(config)
    for index in range(config.num_hidden_layers):
        for name, shape in layout.block_shapes(config).items():
            full = layout.block_prefix(index) + name
            if kinds.get(full, FLOAT) == FLOAT:
                shapes[full] = shape
    return shapes


def quantized_specs(
    chosen: Format, config: ModelConfig, kinds: Mapping[str, str], group_size: int
) -> dict[str, TensorSpec]:
    """Full names and specs of the quantized layers' tensors."""
    found = {}
    for index in range(config.num_hidden_layers):
        for site in layout.SITES:
            name = f"{layout.block_prefix(index)}{site.name}"
            kind = kinds[f"{name}.weight"]
            if kind == FLOAT:
                continue
            if kind == "W4A8_DYNAMIC" and group_size and layout.site_shape(config, site)[1] % group_size:
                inputs = layout.site_shape(config, site)[1]
                raise CheckpointError(f"{name}: group_size {group_size} does not divide the {inputs} inputs of the layer")
            for key, spec in chosen.specs(config, site, kind, group_size).items():
                found[f"{name}.{key}"] = spec
    return found


def read_block(
    chosen: Format, files: TensorFiles, config: ModelConfig, kinds: Mapping[str, str], group_size: int, index: int
) -> tuple[Block, dict[str, QuantizedLinear]]:
    """The float tensors of a stored block, and its quantized layers by site name."""
    prefix = layout.block_prefix(index)
    names = [name for name in layout.block_shapes(config) if kinds.get(prefix + name, FLOAT) == FLOAT]
    block = Block(config, {name: files.read_float32(prefix + name) for name in names})
    quantized = [site for site in layout.SITES if kinds[f"{prefix}{site.name}.weight"] != FLOAT]
    linears = {site.name: read_linear(chosen, files, block, prefix, site, kinds, group_size) for site in quantized}
    check_fused_inputs(prefix, linears)
    return block, linears


def read_linear(
    chosen: Format,
    files: TensorFiles,
    block: Block,
    prefix: str,
    site: layout.LinearSite,
    kinds: Mapping[str, str],
    group_size: int,
) -> QuantizedLinear:
    """One quantized layer of the block with this prefix."""
    name = f"{prefix}{site.name}"
    kind = kinds[f"{name}.weight"]
    keys = chosen.specs(block.config, site, kind, group_size)
    found = {key: files.entries[f"{name}.{key}"].read() for key in keys if f"{name}.{key}" in files.entries}
    try:
        return chosen.decode(block, site, kind, found)
    except CheckpointError as error:
        raise CheckpointError(f"{prefix}{error}") from None


def check_fused_inputs(prefix: str, linears: Mapping[str, QuantizedLinear]) -> None:
    """Layers that read the same input round it once, so they need the same scale and offset."""
    for input_name in layout.INPUT_NAMES:
        scales = {
            prefix + site.name: (linears[site.name].input_scale, linears[site.name].input_offset)
            for site in layout.sites_reading(input_name)
            if site.name in linears
        }
        if len(set(scales.values())) > 1:
            listed = ", ".join(f"{name}.input_scale: {scale} offset {offset}" for name, (scale, offset) in scales.items())
            raise CheckpointError(f"{listed}; these layers read the same input and need the same scale")


def open_checkpoint(path: Path) -> CheckpointReader | QuantizedReader:
    """The reader of a directory; whether it is quantized, and how, is told by its files, never by its name."""
    if (
        path.is_dir()
        and (path / "config.json").exists()
        and is_quantized(path, ModelConfig.from_file(path / "config.json"))
    ):
        return QuantizedReader(path)
    return CheckpointReader(path)
