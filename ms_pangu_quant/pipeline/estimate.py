"""What a run will take, before it starts: schemes per layer, exact size on disk, and memory and time to within a factor."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.calibration.statistics import SAMPLE_TOKENS, sums_output_drift
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.formats import kv_cache, mindformers
from ms_pangu_quant.formats.reader import Format, layer_bytes
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.mixed.sensitivity import DRAWS, split
from ms_pangu_quant.quantizers.threads import one_thread
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.recipe import Recipe
from ms_pangu_quant.recipe.scheme import TensorScheme

_LIBRARIES = 0.85 * 2**30  # resident after MindSpore and MindFormers are imported and a block graph is compiled
_SLOWER = 1.1  # than the sample's matmul: smaller products and what is between them; measured at the 7B's shape
_FASTER = 1.6  # products of bfloat16 than of float32, where the CPU has them
_PYTHON = 0.15 * 2**30  # resident without them
# On which transforms are tried: statistics are of so many tokens, and errors of so many held-out ones at most.
TRIED_BLOCKS, TRIED_TOKENS = 3, 8192


@dataclass(frozen=True)
class Estimate:
    """groups: (layers, blocks, scheme, bits per weight) rows; sizes in bytes.

    cache        scheme of keys and values, None for floats.
    calibration  what of the data is used, as the report has it.
    tried        names of the transforms that are tried first; the figures are those of the last.
    """

    groups: tuple[tuple[str, str, str, float], ...]
    cache: TensorScheme | None
    calibration: Mapping[str, Any] | None
    bytes_before: int
    bytes_after: int
    peak_bytes: float
    seconds: float
    tried: tuple[str, ...] = ()


def estimate(reader: CheckpointReader, recipe: Recipe, data: TokenData | None, stored_as: Format = mindformers) -> Estimate:
    """Of a recipe that leaves its transforms to be decided: with the last choice, which takes the most, and the trial.

    Raises RecipeError if the recipe does not fit the checkpoint.
    """
    tried = tuple(choice.name for choice in recipe.choices)
    recipe = recipe.decided(tried[-1], "") if tried else recipe
    reader = recipe.rewritten(reader)
    plan = recipe.plan(reader.config)
    weights = layout.weight_count(reader.config)
    tokens = data.tokens if data else 0
    streams = 2 * 4 * tokens * reader.config.hidden_size  # hidden states, and the float yardstick
    # In memory at once: the block, its transformed copy as it is rounded, codes, and one layer's temporaries.
    peak = (_LIBRARIES + 4 * weights * 2.2 + streams) if data else (_PYTHON + 4 * weights * 1.6)
    peak += _gram_bytes(reader.config, recipe, tokens)
    blocks = reader.config.num_hidden_layers
    # Float, and rounded in a quarter of the time where there are integer kernels. With drift rounded up to the last input
    # too, and what transforms want to know of the inputs takes three quarters of a float one on a sample of the tokens.
    sampled = min(1, SAMPLE_TOKENS / max(tokens, 1)) if recipe.observed.data else 0
    passes = (1 + 0.75 * sampled) / _faster(recipe) + 0.5 if recipe.seen else 1 / _faster(recipe) + 0.3
    products = 2 * passes * tokens * weights * blocks + blocks * _gram_products(reader.config, recipe, tokens)
    if tried:  # one pass, and on each block tried two more for each choice, and what rounding takes
        some, each = min(tokens, TRIED_TOKENS), len(tried) * min(TRIED_BLOCKS, blocks)
        products += 2 * (blocks + 2 * each) * some * weights + each * _gram_products(reader.config, recipe, some)
    seconds = 5 + reader.bytes / 0.8e9 + blocks * weights / 0.12e9 + _SLOWER * products / _operations_per_second()
    after = stored_bytes(reader, recipe, plan, stored_as)
    used = None if data is None else calibration_facts(recipe, data)
    return Estimate(_groups(plan, reader.config), plan.cache, used, reader.bytes, after, peak, seconds, tried)


def calibration_facts(recipe: Recipe, data: TokenData) -> dict[str, Any]:
    """What of the data a run uses."""
    return {
        "sequences": len(data.sequences),
        "held_out": data.held_out,
        "tokens": data.tokens,
        "truncated": data.truncated,
        "sha256": data.sha256,
        "seed": recipe.calibration.seed,
        "max_length": recipe.calibration.max_length,
        "wanted": recipe.calibration.texts,
        "shortfall": shortfall(recipe, data),
        **({} if data.origin is None else {"own_answers": dict(data.origin)}),
    }


def amount(data: TokenData) -> str:
    rows, tokens = len(data.sequences), data.tokens
    return f"{rows} row{'s' * (rows != 1)}, {tokens} tokens, {data.held_out} held out"


def shortfall(recipe: Recipe, data: TokenData) -> str | None:
    """Where the data has fewer rows than the recipe wants, how many there are. None where it has as many, or where the
    recipe's limit of tokens is reached before."""
    if data.left or len(data.sequences) >= recipe.calibration.texts:
        return None
    return f"{amount(data)}; the recipe wants {recipe.calibration.said}"


def _gram_bytes(config: ModelConfig, recipe: Recipe, tokens: int) -> float:
    """What grams take: those of all four inputs and their like behind transforms, or gram and drift of one; two factors, of
    which half is used; GPTQ's pieces of rows."""
    sizes = [layout.site_shape(config, layout.sites_reading(name)[0])[1] for name in layout.INPUT_NAMES]
    widest = 4 * max(sizes) ** 2
    total = 0.0
    if recipe.observed.gram:
        total += 2 * 4 * sum(size**2 for size in sizes)
    if recipe.quantizer.needs.gram:
        total += widest + 3 * 2**27
    if recipe.seen:  # and a stream for the float model, and what is kept of either's way
        total += 2 * widest + 2 * 4 * tokens * config.hidden_size
    return total


def _gram_products(config: ModelConfig, recipe: Recipe, tokens: int) -> float:
    """Operations a block's grams and its rounding take."""
    total = 0.0
    for name in layout.INPUT_NAMES:
        shapes = [layout.site_shape(config, site) for site in layout.sites_reading(name)]
        inputs = shapes[0][1]
        outputs = sum(each for each, _ in shapes)
        drift = 4 * outputs * inputs if sums_output_drift(len(shapes), outputs, inputs) else 2 * inputs**2
        if recipe.quantizer.needs.gram:
            total += tokens * (inputs**2 + (drift if recipe.seen else 0)) / _faster(recipe)
        total += recipe.quantizer.operations(outputs, inputs)
    return total


def _faster(recipe: Recipe) -> float:
    kernels = library() if recipe.quantizer.needs.bfloat16 else None
    return _FASTER if kernels is not None and kernels.bfloat16 else 1.0


@dataclass(frozen=True)
class SensitivityCost:
    """statistics, measured: tokens; disk in bytes, beside the output."""

    statistics: int
    measured: int
    seconds: float
    disk: int


def measuring_cost(config: ModelConfig, recipe: Recipe, data: TokenData, tokens: int) -> SensitivityCost:
    """What mixed.measure takes on this machine. Raises DataError where the data is too little."""
    statistics, measured = (
        sum(map(len, texts)) for texts in split(data, tokens, 1 + bool(recipe.quantizer.needs.held_out))
    )
    blocks = config.num_hidden_layers
    weights = layout.weight_count(config)
    # Each group alone in both schemes, the float model, all together in integers; and back.
    passes = 2 * 4 + 1 + 0.5 + (4 + DRAWS)
    products: float = 2 * weights * blocks * (passes * measured + statistics)
    products += 2 * (3 * 1.1 + 3) * measured * config.vocab_size * config.hidden_size
    products += 2 * blocks * _gram_products(config, recipe, statistics)
    seconds = 5 + blocks * 3 * weights / 0.12e9 + _SLOWER * products / _operations_per_second()
    disk = 4 * config.hidden_size * ((5 * blocks + 2 * DRAWS) * measured + 2 * statistics)
    return SensitivityCost(statistics, measured, seconds, disk)


def stored_bytes(reader: CheckpointReader, recipe: Recipe, plan: Plan, stored_as: Format = mindformers) -> int:
    """Size of the tensors that quantize() will write; `reader` rewritten as the recipe says."""
    config = reader.config
    total = sum(reader.files.entries[name].nbytes for name in layout.outer_shapes(config))
    for index, block in enumerate(plan.blocks):
        for name in block.float_shapes(config):
            entry = reader.files.entries[layout.block_prefix(index) + name]
            width = 4 if recipe.changes(name, block.by_name) else entry.dtype.itemsize
            total += entry.nbytes // entry.dtype.itemsize * width
        total += sum(layer_bytes(stored_as, config, site, scheme) for site, scheme in block.quantized)
    if plan.cache is not None:
        total += sum(spec.nbytes(bfloat16_values=True) for spec in kv_cache.specs(config).values())
    return total


def _groups(plan: Plan, config: ModelConfig) -> tuple[tuple[str, str, str, float], ...]:
    """Layers with the same scheme together: one row for each set of blocks that are planned alike."""
    rows: dict[tuple[str, str, float], list[int]] = {}
    for index, block in enumerate(plan.blocks):
        for fused in layout.FUSED:
            sites = layout.fused(fused)
            scheme = block.scheme(sites[0])
            bits = scheme.bits_per_weight(layout.site_shape(config, sites[0])[1]) if scheme else 16.0
            names = "/".join(site.short for site in sites)
            rows.setdefault((names, word_of(scheme), bits), []).append(index)
    return tuple((names, _ranges(indices), word, bits) for (names, word, bits), indices in rows.items())


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _operations_per_second() -> float:
    """Floating-point operations a second of float32 products on all cores that the process may use, from a short sample; by
    CPU time, since the machine may be at other work."""
    matrix = np.ones((1024, 1024), np.float32)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with one_thread():
        matrix @ matrix
        started = time.process_time()
        for _ in range(3):
            matrix @ matrix
        return cores * 3 * 2 * 1024**3 / (time.process_time() - started)
