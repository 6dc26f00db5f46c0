"""A plan: the one answer to which scheme has each linear layer of a model, and what its keys and values are cached in.

A recipe makes one for a model, a format describes one on disk and reads it back, and a network is built from one. A float
model has one too, so nobody needs to ask which kind of checkpoint it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.recipe.scheme import QuantScheme, TensorScheme


@dataclass(frozen=True)
class BlockPlan:
    """Of one decoder block.

    schemes  of the linear layers, in the order of layout.SITES; None where a layer stays float.
    cache    of keys and values; None where they are cached as floats.
    """

    schemes: tuple[QuantScheme | None, ...] = (None,) * len(layout.SITES)
    cache: TensorScheme | None = None

    def scheme(self, site: layout.LinearSite) -> QuantScheme | None:
        return self.schemes[layout.SITES.index(site)]

    @property
    def by_name(self) -> dict[str, QuantScheme | None]:
        return {site.name: scheme for site, scheme in zip(layout.SITES, self.schemes, strict=True)}

    @property
    def quantized(self) -> Iterator[tuple[layout.LinearSite, QuantScheme]]:
        """The layers that do not stay float."""
        for site, scheme in zip(layout.SITES, self.schemes, strict=True):
            if scheme is not None:
                yield site, scheme

    def float_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that stay float, names without the block's prefix."""
        quantized = {f"{site.name}.weight" for site, _ in self.quantized}
        return {name: shape for name, shape in layout.block_shapes(config).items() if name not in quantized}

    @property
    def is_float(self) -> bool:
        return not any(self.schemes)

    @property
    def group_sizes(self) -> set[int]:
        """Of the int4 layers; 0 is one scale for each output channel."""
        return {scheme.group_size for _, scheme in self.quantized if scheme.weight.bits == 4}

    @property
    def split_layers(self) -> list[tuple[layout.LinearSite, ...]]:
        """Layers that are computed as one and have different schemes."""
        return [sites for sites in map(layout.fused, layout.FUSED) if len({self.scheme(site) for site in sites}) > 1]


@dataclass(frozen=True)
class Plan:
    """Of all decoder blocks."""

    blocks: tuple[BlockPlan, ...]

    @classmethod
    def of_layers(cls, schemes: Mapping[str, QuantScheme | None], blocks: int, cache: TensorScheme | None = None) -> Plan:
        """schemes: full name -> scheme, for every layer of every block."""
        names = (tuple(f"{layout.block_prefix(index)}{site.name}" for site in layout.SITES) for index in range(blocks))
        return cls(tuple(BlockPlan(tuple(schemes[name] for name in each), cache) for each in names))

    @classmethod
    def uniform(cls, config: ModelConfig, scheme: QuantScheme | None = None, cache: TensorScheme | None = None) -> Plan:
        """One scheme for every layer; None is the float model's plan."""
        return cls((BlockPlan((scheme,) * len(layout.SITES), cache),) * config.num_hidden_layers)

    def __iter__(self) -> Iterator[tuple[str, layout.LinearSite, QuantScheme | None]]:
        """(full name, site, scheme) of every layer, block by block."""
        for index, block in enumerate(self.blocks):
            for site, scheme in zip(layout.SITES, block.schemes, strict=True):
                yield f"{layout.block_prefix(index)}{site.name}", site, scheme

    def float_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Full names and shapes of the tensors that stay float, and of those outside the blocks."""
        shapes = layout.outer_shapes(config)
        for index, block in enumerate(self.blocks):
            shapes |= {layout.block_prefix(index) + name: shape for name, shape in block.float_shapes(config).items()}
        return shapes

    @property
    def is_float(self) -> bool:
        return all(block.is_float for block in self.blocks)

    @property
    def cache(self) -> TensorScheme | None:
        return self.blocks[0].cache

    @property
    def group_sizes(self) -> set[int]:
        """Of the int4 layers; 0 is one scale for each output channel."""
        return set().union(*(block.group_sizes for block in self.blocks))

    @property
    def group_size(self) -> int:
        """MindFormers has one for the whole network; 0 where no layer is int4. Raises RecipeError for several."""
        sizes = sorted(self.group_sizes) or [0]
        if len(sizes) > 1:
            raise RecipeError(
                f"int4 group sizes {sizes} (0 is per channel) are mixed; MindFormers has one group_size for the whole "
                "network"
            )
        return sizes[0]
