"""Transforms a block and rounds its layers, for the loop and for measuring sensitivities alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.calibration.stream import BlockStream
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block, QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.job.ranks import Ranks
from ms_pangu_quant.job.share import part_of
from ms_pangu_quant.quantizers.grid import QuantizedWeight, relative_weight_error
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.recipe import Recipe


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
    rows of every weight.
    """
    rounded = RoundedBlock(block)
    for input_name in layout.INPUT_NAMES:
        sites = [site for site, _ in plan.quantized if site.input_name == input_name]
        if sites:
            rounded = _round_layers(rounded, sites, stream.see(input_name, rounded, stats), recipe, plan, stream.ranks)
        if recipe.kv_cache is not None and rounded.cache is None:  # keys and values follow from what the first input feeds
            rounded = replace(rounded, cache=stream.round_cache(recipe.kv_cache, rounded, plan))
    stream.pass_by(rounded)
    return replace(rounded, floats=Block(block.config, rounded.kept))  # frees the float weights of what is rounded


def replay_block(
    reader: CheckpointReader, index: int, rounded: RoundedBlock, recipe: Recipe, plan: BlockPlan, stream: BlockStream
) -> None:
    """Take the stream behind a block that an earlier run has rounded, to the same bits: the float model goes through the
    transformed block there."""
    if stream.follows_float:
        block = reader.block(index)
        block, _ = transform_block(block, stream.observe(block, index, plan), recipe, plan)
        stream.pass_by(RoundedBlock(block))
    stream.advance(rounded)


def _round_layers(
    rounded: RoundedBlock,
    sites: list[layout.LinearSite],
    seen: InputStats | None,
    recipe: Recipe,
    plan: BlockPlan,
    ranks: Ranks,
) -> RoundedBlock:
    """The layers that read one input rounded too; they are computed as one, so they have one scheme."""
    scheme = plan.scheme(sites[0])
    assert scheme is not None
    weights = [rounded.floats.weight(site) for site in sites]
    weight = np.concatenate(weights) if len(weights) > 1 else weights[0]
    part = recipe.quantizer(weight, scheme.weight, seen, part_of(len(weight), ranks.rank, ranks.size))
    del weight
    scale = None
    if seen is not None and not scheme.activation.dynamic:
        scale = recipe.activation_range.factor(seen, scheme.activation)
    parts = ranks.gather(part)
    codes, scales = (np.concatenate([getattr(each, name) for each in parts]) for name in ("codes", "scale"))
    linears, errors, start = dict(rounded.linears), dict(rounded.errors), 0
    for site, floats in zip(sites, weights, strict=True):
        own = slice(start, start + len(floats))
        start = own.stop
        layer = QuantizedWeight(codes[own], scales[own], part.note)
        linears[site.name], errors[site.name] = QuantizedLinear(scheme, layer, scale), relative_weight_error(layer, floats)
    return replace(rounded, linears=linears, errors=errors)
