"""Transforms a block and rounds its layers, for the loop and for measuring sensitivities alike."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.calibration.stream import BlockStream
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear, RoundedBlock
from ms_pangu_quant.job.share import owners
from ms_pangu_quant.quantizers.grid import relative_weight_error
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.recipe import Recipe
from ms_pangu_quant.recipe.scheme import QuantScheme


def transform_block(
    block: Block, stats: dict[str, InputStats], recipe: Recipe, plan: BlockPlan
) -> tuple[Block, dict[str, InputStats]]:
    """The block rewritten by the recipe's transforms, and the statistics of its inputs then."""
    for transform in recipe.transforms:
        block, stats = transform(block, stats, plan.by_name)
    return block, stats


def round_block(
    block: Block, stats: dict[str, InputStats], recipe: Recipe, plan: BlockPlan, stream: BlockStream
) -> RoundedBlock:
    """The planned layers rounded, input after input, and then the cache; without the float weights of what is rounded.

    stats of the block's inputs; the stream has newer ones where it sees them one by one. Of several ranks each rounds some
    of the layers that can be rounded at the same time.
    """
    rounded = RoundedBlock(block)
    for input_names in [(name,) for name in layout.INPUT_NAMES] if stream.one_by_one else [tuple(layout.INPUT_NAMES)]:
        rounded = _round_layers(rounded, input_names, stats, recipe, plan, stream)
        if recipe.kv_cache is not None and rounded.cache is None:  # keys and values follow from what the first input feeds
            rounded = replace(rounded, cache=stream.round_cache(recipe.kv_cache, rounded))
    return replace(rounded, floats=Block(block.config, rounded.kept))  # frees the float weights of what is rounded


def _round_layers(
    rounded: RoundedBlock,
    input_names: tuple[str, ...],
    stats: dict[str, InputStats],
    recipe: Recipe,
    plan: BlockPlan,
    stream: BlockStream,
) -> RoundedBlock:
    """The layers that read one of these inputs rounded too."""
    sites = [(site, scheme) for site, scheme in plan.quantized if site.input_name in input_names]
    weights = {site.name: rounded.floats.weight(site) for site, _ in sites}
    costs = {name: recipe.quantizer.operations(*weight.shape) for name, weight in weights.items()}
    owner = owners(costs, stream.ranks.size)
    done: dict[str, tuple[QuantizedLinear, float]] = {}
    for site, scheme, seen in _with_statistics(sites, rounded, stats, stream):
        if owner[site.name] == stream.ranks.rank:
            weight = recipe.quantizer(weights[site.name], scheme.weight, seen)
            scale = None
            if seen is not None and not scheme.activation.dynamic:
                scale = recipe.activation_range.factor(seen, scheme.activation)
            error = relative_weight_error(weight, weights[site.name])
            done[site.name] = QuantizedLinear(scheme, weight, scale), error
    done = stream.ranks.fold(done, operator.or_)
    linears = {site.name: done[site.name][0] for site, _ in sites}
    errors = {site.name: done[site.name][1] for site, _ in sites}
    return replace(rounded, linears={**rounded.linears, **linears}, errors={**rounded.errors, **errors})


def _with_statistics(
    sites: list[tuple[layout.LinearSite, QuantScheme]],
    rounded: RoundedBlock,
    stats: dict[str, InputStats],
    stream: BlockStream,
) -> Iterator[tuple[layout.LinearSite, QuantScheme, InputStats | None]]:
    """Each layer with what is known of its input; those that read the same one share it, and then it is let go."""
    for input_name in layout.INPUT_NAMES:
        mine = [(site, scheme) for site, scheme in sites if site.input_name == input_name]
        seen = stream.see(input_name, rounded, stats) if mine else None  # on every rank: it may take all of them
        for site, scheme in mine:
            yield site, scheme, seen
