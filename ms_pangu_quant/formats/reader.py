"""One reader for every format of a quantized directory; which one it is, its files say and never its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, QUANTIZED_KEYS, ModelConfig
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.names import without_buffers, without_prefixes
from ms_pangu_quant.checkpoint.reader import CheckpointReader, is_quantized, optional_head, tell
from ms_pangu_quant.errors import CheckpointError, located
from ms_pangu_quant.formats import ascend, compressed_tensors, kv_cache, mindformers
from ms_pangu_quant.formats.linear import TensorSpec
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import QuantScheme


class Format(Protocol):
    """An on-disk layout: a module of this folder. To add one: docs/extend.md."""

    NAME: str

    def encode(self, block: Block, site: layout.LinearSite, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
        """The tensors of one layer; block holds its bias and the config."""

    def decode(
        self, block: Block, site: layout.LinearSite, scheme: QuantScheme, tensors: Mapping[str, NDArray[Any]]
    ) -> QuantizedLinear:
        """Inverse of encode."""

    def specs(self, config: ModelConfig, site: layout.LinearSite, scheme: QuantScheme) -> dict[str, TensorSpec]:
        """Shapes and dtypes of what encode produces."""

    def metadata(self, config: ModelConfig, plan: Plan) -> dict[str, Any]:
        """JSON files of the directory, config.json among them. Raises RequestError for what the format cannot say."""

    def recognises(self, directory: Path, config: ModelConfig) -> bool: ...

    def read_plan(self, directory: Path, config: ModelConfig) -> Plan:
        """Inverse of metadata."""


FORMATS: dict[str, Format] = {each.NAME: each for each in (mindformers, ascend, compressed_tensors)}


def find_format(directory: Path, config: ModelConfig) -> Format:
    """Raises CheckpointError if no format knows the directory."""
    for each in FORMATS.values():
        if each.recognises(directory, config):
            return each
    others = sorted(path.name for path in directory.glob(f"{Path(ASCEND_FILE).stem}?*.json"))
    if others:
        raise CheckpointError(f"{directory / others[0]}: of an older msModelSlim, which is not read; wanted {ASCEND_FILE}")
    key = next((key for key in QUANTIZED_KEYS if config.raw.get(key)), QUANTIZED_KEYS[0])
    raise CheckpointError(
        f"{directory / 'config.json'}: {key} is {config.raw.get(key)!r}, wanted quant_method 'golden-stick' or "
        "'compressed-tensors' in quantization_config, or none beside a quant_model_description.json; other quantized "
        "formats are not read here"
    )


class QuantizedReader:
    """A quantized directory whose every tensor has been found, with the shape and dtype its description implies."""

    def __init__(self, directory: Path, *, checked: bool = True) -> None:
        """Raises CheckpointError naming file, tensor, what was found and what was wanted.

        checked  False leaves it to verify() to look at the tensors.
        """
        self.directory = directory
        self.config = ModelConfig.from_file(directory / "config.json")
        self.format = find_format(directory, self.config)
        self.plan, self.rows = self.format.read_plan(directory, self.config), None
        self.files = without_buffers(without_prefixes(TensorFiles(directory)), self.config)
        if checked:
            with self.files.explained():
                self._check()
        tell(self.files)

    def _check(self) -> None:
        quantized = quantized_specs(self.format, self.config, self.plan)
        optional = optional_head(self.files, self.config)
        self.files.check(self.plan.float_shapes(self.config), optional=[*optional, *quantized])
        for name, spec in quantized.items():
            entry = self.files.entries.get(name)
            if not spec.fits(entry):
                got = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing"
                raise CheckpointError(f"{self.directory}: {name}: got {got}, its description implies {spec}")

    def rounded_block(self, index: int) -> RoundedBlock:
        return read_block(self.format, self.files, self.config, self.plan.blocks[index], index)


Reader = CheckpointReader | QuantizedReader  # their plan says what is quantized


def quantized_specs(chosen: Format, config: ModelConfig, plan: Plan) -> dict[str, TensorSpec]:
    """Full names and specs of the tensors of quantized layers and of an int8 cache. Raises CheckpointError."""
    found = {}
    for name, site, scheme in plan:
        if scheme is not None:
            with located(f"{name}: ", CheckpointError):
                specs = chosen.specs(config, site, scheme)
            found.update({f"{name}.{key}": spec for key, spec in specs.items()})
    return {**found, **kv_cache.specs(config)} if plan.cache is not None else found


def layer_bytes(stored_as: Format, config: ModelConfig, site: layout.LinearSite, scheme: QuantScheme) -> int:
    """Size of one quantized layer's tensors, without its bias."""
    specs = stored_as.specs(config, site, scheme).values()
    narrow = scheme.weight.bfloat16_scale
    return sum(spec.nbytes(bfloat16_values=narrow) for spec in specs if not spec.optional)


def read_block(chosen: Format, files: TensorFiles, config: ModelConfig, plan: BlockPlan, index: int) -> RoundedBlock:
    """A stored block. Raises CheckpointError naming a tensor whose values no such layer has."""
    prefix = layout.block_prefix(index)
    block = Block(config, {name: files.read_float32(prefix + name) for name in plan.float_shapes(config)})
    linears = {
        site.name: read_linear(chosen, files, block, f"{prefix}{site.name}", site, scheme)
        for site, scheme in plan.quantized
    }
    check_fused_inputs(prefix, linears)
    cache = kv_cache.read_cache(files, config, index) if plan.cache is not None else None
    return RoundedBlock(block, linears, cache)


def read_linear(
    chosen: Format, files: TensorFiles, block: Block, name: str, site: layout.LinearSite, scheme: QuantScheme
) -> QuantizedLinear:
    """One quantized layer, stored under this full name."""
    keys = chosen.specs(block.config, site, scheme)
    found = {key: files.entries[f"{name}.{key}"].read() for key in keys if f"{name}.{key}" in files.entries}
    with located(name.removesuffix(site.name)):
        return chosen.decode(block, site, scheme, found)


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


def open_checkpoint(path: Path) -> Reader:
    """The reader of a directory; whether it is quantized, and how, is told by its files, never by its name."""
    if (
        path.is_dir()
        and (path / "config.json").exists()
        and is_quantized(path, ModelConfig.from_file(path / "config.json"))
    ):
        return QuantizedReader(path)
    return CheckpointReader(path)
