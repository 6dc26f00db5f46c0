"""quantize(): a float checkpoint goes in, a quantized one comes out, one decoder block in memory at a time.

The loop in quantize() is the whole method. Each block is looked at with the hidden states that the blocks before it,
already quantized, produce; so every block's statistics are those it will meet when it is served, and its error is measured
against what the float block would have made of the same input.

Started by msrun, every rank runs this loop, on its share of the calibration sequences. What the ranks know of a block's
inputs is merged, so that all transform it alike; each rounds some layers and hands them to the others; rank 0 writes.
Different blocks cannot be rounded at the same time: the statistics of one come from those before it, rounded. In a process
that is alone, each of these steps is nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.calibration.ranges import RangeStats
from ms_pangu_quant.calibration.share import owners, rounding_cost, share_of
from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.files import TensorFiles
from ms_pangu_quant.checkpoint.reader import Block, CheckpointReader, embedding_rows
from ms_pangu_quant.checkpoint.writer import REPORT_FILE, QuantizedWriter
from ms_pangu_quant.errors import DataError, RecipeError
from ms_pangu_quant.formats import kv_cache, mindformers
from ms_pangu_quant.formats.finished import finished_report, stored_bytes
from ms_pangu_quant.formats.linear import FLOAT, QuantizedLinear
from ms_pangu_quant.formats.reader import Format, read_block
from ms_pangu_quant.formats.stored import block_tensors
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.ranks import ALONE, Ranks
from ms_pangu_quant.quantizers.grid import relative_weight_error
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache
from ms_pangu_quant.recipe import Plan, Recipe
from ms_pangu_quant.scheme import QuantScheme

if TYPE_CHECKING:
    from ms_pangu_quant.calibration.stream import BlockRunner, Hidden


@dataclass(frozen=True)
class BlockReport:
    """What rounding one block cost.

    output_error  ||quantized - float|| / ||float|| of the block's output on calibration data; None without data. float is
                  what the float block makes of the quantized block's input, or, where the quantizer aims at the float
                  model (needs_drift), the float model's own hidden states, so that the error is that of all blocks so far.
    weight_error  the same of each layer's weight, by site name.
    notes         what a quantizer had to do that was not asked for (damping raised), by site name.
    """

    index: int
    output_error: float | None
    weight_error: Mapping[str, float]
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantizeResult:
    output: Path
    blocks: tuple[BlockReport, ...]
    bytes_before: int
    bytes_after: int
    resumed_at: int
    was_complete: bool = False  # an earlier run had written all of it


def quantize(
    reader: CheckpointReader,
    recipe: Recipe,
    output: Path,
    *,
    data: TokenData | None = None,
    resume: bool = False,
    stored_as: Format = mindformers,
    on_block: Callable[[BlockReport], None] = lambda report: None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> QuantizeResult:
    """Quantize the checkpoint of `reader` as `recipe` says into the directory `output`.

    data      calibration tokens; required if transforms, rounding or static activations need it, else only measured on.
    stored_as the on-disk layout, one of formats.reader.FORMATS.
    resume    go on with an unfinished run in `output`, or leave a finished one; byte-identical to an undisturbed run's.
    on_block  called after each block is safely on disk; on_bytes with bytes read while the checkpoint is hashed.
    Raises    PanguQuantError for anything wrong with checkpoint, recipe, data or output directory.
    """
    check_data(reader.config, recipe, data)
    reader = recipe.rewritten(reader)
    config, plan, ranks = reader.config, recipe.plan(reader.config), runtime.job()
    described = stored_as.metadata(config, planned_kinds(plan), plan.group_size, recipe.kv_cache is not None)
    fingerprint = {
        "checkpoint": checkpoint_hash(reader, on_bytes),
        "recipe": recipe.digest,
        "calibration data": data.sha256 if data else "none",
        "version of ms_pangu_quant": version("ms_pangu_quant"),
        **({"number of ranks": str(ranks.size)} if ranks.size > 1 else {}),  # on which the order of sums depends
    }
    if recipe.assignment and recipe.assignment.checkpoint != fingerprint["checkpoint"]:
        raise RecipeError(
            f"{recipe.where}: the sensitivities are of another checkpoint; measure those of {reader.directory}"
        )
    for what, value in fingerprint.items():
        ranks.agree(what, value)
    complete = ranks.from_first(lambda: finished_report(output, fingerprint, stored_as) if resume else None)
    if complete is not None:
        return _as_it_is(output, complete)
    begun_with = {**fingerprint, "format": stored_as.NAME}  # not in the report: an export makes the same one
    opened = QuantizedWriter(output, begun_with, blocks=config.num_hidden_layers, resume=resume) if ranks.is_first else None
    with opened or nullcontext() as writer:  # None where another rank writes
        runner, hidden = _begin_stream(reader, data, ranks)
        floats = _FloatModel(reader, data, ranks) if data and recipe.quantizer.needs_drift else None
        reports = ranks.from_first(lambda: [BlockReport(**record) for record in writer.reports])
        start = len(reports)
        for index in range(start):
            on_block(reports[index])
            hidden = _replay(writer, stored_as, plan, recipe, config, index, runner, hidden, ranks)
            if floats:
                floats.advance(reader.block(index))
        for index in range(start, config.num_hidden_layers):
            block = reader.block(index)
            stats, target = _observe(runner, block, hidden, recipe, index, ranks)
            for transform in recipe.transforms:
                block, stats = transform(block, stats, plan.of_block(index))
            see = _served_input(runner, hidden, floats, recipe, index, ranks) if floats else _taken_from(stats)
            block, linears, weight_error = _round_block(block, plan, recipe, see, index, ranks)
            cache = _round_cache(runner, block, linears, hidden, recipe, index, ranks)
            if floats:
                target = floats.advance(reader.block(index))
            hidden, output_error = _advance(runner, block, linears, cache, hidden, target, ranks)
            notes = {site: linear.weight.note for site, linear in linears.items() if linear.weight.note}
            reports.append(BlockReport(index, output_error, weight_error, notes))
            if writer:
                writer.write_block(block_tensors(reader, stored_as, index, block, linears, cache), asdict(reports[-1]))
            on_block(reports[-1])

        def finish() -> int:
            files = {
                **described,
                REPORT_FILE: _report(reader, fingerprint, recipe, plan, data, tuple(reports), writer.hashes()),
            }
            outer = {name: reader.files.entries[name] for name in layout.outer_shapes(config)}
            return writer.finish(outer, reader.directory, files)

        after = ranks.from_first(finish)
    return QuantizeResult(output, tuple(reports), reader.bytes, after, start)


def _as_it_is(output: Path, report: Mapping[str, Any]) -> QuantizeResult:
    """The result of the run that has written this directory."""
    blocks = tuple(BlockReport(**block) for block in report["blocks"])
    return QuantizeResult(output, blocks, report["bytes_before"], stored_bytes(output), len(blocks), was_complete=True)


def check_data(config: ModelConfig, recipe: Recipe, data: TokenData | None) -> None:
    if data is None and recipe.needs_calibration:
        raise RecipeError(
            f"{recipe.where}: needs calibration data for its transforms, rounding or static activations; pass "
            "--calibration FILE, or take a recipe that rounds without data (w8a8_rtn, w4a8_rtn)"
        )
    longest = max((len(sequence) for sequence in data.sequences), default=0) if data else 0
    if longest > config.max_position_embeddings:
        raise DataError(
            f"calibration sequences of {longest} tokens are longer than the model's "
            f"max_position_embeddings {config.max_position_embeddings}; lower calibration.max_length"
        )


def _begin_stream(
    reader: CheckpointReader, data: TokenData | None, ranks: Ranks
) -> tuple[BlockRunner | None, Hidden | None]:
    """The block runner and the embeddings of this rank's calibration tokens; nothing without data."""
    if data is None:
        return None, None
    runtime.ensure_started()
    from ms_pangu_quant.calibration.stream import BlockRunner, Hidden

    share = share_of([len(sequence) for sequence in data.sequences], ranks.rank, ranks.size)
    sequences = data.sequences[share.begin : share.end]
    lengths = [len(sequence) for sequence in sequences]
    states = embedding_rows(reader.files, np.concatenate(sequences))
    return BlockRunner(reader.config, lengths, share.first_row), Hidden(states, lengths)


def _observe(
    runner: BlockRunner | None, block: Block, hidden: Hidden | None, recipe: Recipe, index: int, ranks: Ranks
) -> tuple[dict[str, InputStats], NDArray[np.float32] | None]:
    """Statistics of what all ranks saw, and the float outputs of what this one did."""
    if runner is None or hidden is None:
        return {}, None
    seen, target = runner.observe(block, hidden, gram=recipe.needs_gram, rows=recipe.needs_rows, where=f"block {index}")
    return {name: ranks.fold(seen.pop(name), InputStats.merge) for name in layout.INPUT_NAMES}, target


class _FloatModel:
    """The float model on the calibration data, one block behind another, beside the quantized stream."""

    def __init__(self, reader: CheckpointReader, data: TokenData, ranks: Ranks) -> None:
        self.runner, self.hidden = _begin_stream(reader, data, ranks)

    def advance(self, block: Block) -> NDArray[np.float32]:
        """Hidden states after the block [tokens, hidden]."""
        self.hidden = self.runner.advance(block, {}, self.hidden)
        return self.hidden.states


# What is known of an input when its layers' turn comes: (name, block, layers of the block rounded so far) -> statistics.
_SeeInput = Callable[[str, Block, Mapping[str, QuantizedLinear]], InputStats | None]


def _taken_from(stats: dict[str, InputStats]) -> _SeeInput:
    """Statistics observed beforehand; each is handed out once and not kept, for a gram may be 1.3 GB."""
    return lambda name, block, linears: stats.pop(name, None)


def _served_input(
    runner: BlockRunner, hidden: Hidden, floats: _FloatModel, recipe: Recipe, index: int, ranks: Ranks
) -> _SeeInput:
    """Statistics of the input as the layers rounded so far make it, beside the float model's."""

    def see(name: str, block: Block, linears: Mapping[str, QuantizedLinear]) -> InputStats:
        rows, where = recipe.activation_range.needs_rows, f"block {index}"
        before = name == layout.INPUT_NAMES[0]  # of the keys and values
        cache = None if before else _round_cache(runner, block, linears, hidden, recipe, index, ranks)
        seen = runner.observe_input(
            name, block, linears, hidden, floats.runner, floats.hidden, rows=rows, where=where, cache=cache
        )
        return ranks.fold(seen, InputStats.merge)

    return see


def _round_block(
    block: Block, plan: Plan, recipe: Recipe, see: _SeeInput, index: int, ranks: Ranks
) -> tuple[Block, dict[str, QuantizedLinear], dict[str, float]]:
    """Round the planned layers, input after input; the returned block no longer holds their float weights."""
    linears: dict[str, QuantizedLinear] = {}
    error = {}
    for input_names in _together(recipe):
        done: dict[str, tuple[QuantizedLinear, float]] = {}
        for site, scheme, seen in _mine(input_names, block, plan, recipe, see, index, linears, ranks):
            quantized = recipe.quantizer(block.weight(site), scheme.weight, seen)
            linear = QuantizedLinear(scheme.kind, quantized, _input_scale(scheme, seen, recipe))
            done[site.name] = linear, relative_weight_error(quantized, block.weight(site))
        done = ranks.fold(done, operator.or_)
        for site in (site for name in input_names for site in layout.sites_reading(name) if site.name in done):
            linears[site.name], error[site.name] = done[site.name]
    rounded = {f"{name}.weight" for name in linears}
    return (
        Block(block.config, {name: value for name, value in block.tensors.items() if name not in rounded}),
        linears,
        error,
    )


def _together(recipe: Recipe) -> list[tuple[str, ...]]:
    """The inputs whose layers ranks may round at the same time: all, or one by one where an input is looked at as the
    rounded layers before it make it."""
    return [(name,) for name in layout.INPUT_NAMES] if recipe.quantizer.needs_drift else [tuple(layout.INPUT_NAMES)]


def _mine(
    input_names: tuple[str, ...],
    block: Block,
    plan: Plan,
    recipe: Recipe,
    see: _SeeInput,
    index: int,
    linears: Mapping[str, QuantizedLinear],
    ranks: Ranks,
) -> Iterator[tuple[layout.LinearSite, QuantScheme, InputStats | None]]:
    """The layers this rank rounds, with the statistics of their input."""
    planned = {name: [site for site in layout.sites_reading(name) if plan.scheme(index, site)] for name in input_names}
    gram = recipe.quantizer.needs_gram
    owner = owners(
        {site.name: rounding_cost(*block.weight(site).shape, gram=gram) for sites in planned.values() for site in sites},
        ranks.size,
    )
    for name, sites in planned.items():
        seen = see(name, block, linears) if sites else None  # on every rank: it may take all of them
        yield from ((site, plan.scheme(index, site), seen) for site in sites if owner[site.name] == ranks.rank)


def _round_cache(
    runner: BlockRunner | None,
    block: Block,
    linears: Mapping[str, QuantizedLinear],
    hidden: Hidden | None,
    recipe: Recipe,
    index: int,
    ranks: Ranks,
) -> QuantizedCache | None:
    """The grids of the cache, from the keys and values that the rounded layers make; None where it stays float."""
    if recipe.kv_cache is None or runner is None or hidden is None:
        return None
    rows, where = recipe.kv_cache.needs_rows, f"block {index}"
    seen = runner.observe_cache(block, linears, hidden, rows=rows, where=where)
    keys, values = (ranks.fold(each, RangeStats.merge) for each in seen)
    return recipe.kv_cache.cache(keys, values, block.config.num_key_value_heads)


def _input_scale(scheme: QuantScheme, stats: InputStats | None, recipe: Recipe) -> float | None:
    if scheme.activation.dynamic or stats is None:
        return None
    return recipe.activation_range.factor(stats, scheme.activation)


def _advance(
    runner: BlockRunner | None,
    block: Block,
    linears: Mapping[str, QuantizedLinear],
    cache: QuantizedCache | None,
    hidden: Hidden | None,
    target: NDArray[np.float32] | None,
    ranks: Ranks,
) -> tuple[Hidden | None, float | None]:
    if runner is None or hidden is None or target is None:
        return None, None
    hidden = runner.advance(block, linears, hidden, cache=cache)
    return hidden, relative_error(hidden.states, target, ranks)


def _replay(
    writer: QuantizedWriter | None,
    stored_as: Format,
    plan: Plan,
    recipe: Recipe,
    config: ModelConfig,
    index: int,
    runner: BlockRunner | None,
    hidden: Hidden | None,
    ranks: Ranks,
) -> Hidden | None:
    """Hidden states after a block that an earlier run wrote."""
    if runner is None or hidden is None:
        return None

    def read() -> tuple[Block, dict[str, QuantizedLinear], QuantizedCache | None]:
        files = TensorFiles(writer.output, only=writer.block_file(index))
        cache = kv_cache.read_cache(files, config, index) if recipe.kv_cache else None
        return *read_block(stored_as, files, config, planned_kinds(plan), plan.group_size, index), cache

    block, linears, cache = ranks.from_first(read)
    return runner.advance(block, linears, hidden, cache=cache)


def planned_kinds(plan: Plan) -> dict[str, str]:
    """Weight name -> kind, for every linear layer."""
    return {
        f"{layout.block_prefix(index)}{name}.weight": scheme.kind if scheme else FLOAT
        for (index, name), scheme in plan.schemes.items()
    }


def _report(
    reader: CheckpointReader,
    fingerprint: Mapping[str, str],
    recipe: Recipe,
    plan: Plan,
    data: TokenData | None,
    blocks: tuple[BlockReport, ...],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """What produced the checkpoint and what it cost; holds no times, so that the same run gives the same bytes."""
    return {
        "fingerprint": dict(fingerprint),
        "recipe": {"why": recipe.why, "text": recipe.as_text},
        **({"budget": recipe.assignment.summary()} if recipe.assignment else {}),
        "calibration": None
        if data is None
        else {
            "sequences": len(data.sequences),
            "tokens": data.tokens,
            "truncated": data.truncated,
            "sha256": data.sha256,
            "seed": recipe.calibration.seed,
            "max_length": recipe.calibration.max_length,
        },
        "bytes_before": reader.bytes,
        "blocks": [asdict(block) for block in blocks],
        "schemes": {
            f"{layout.block_prefix(index)}{name}": scheme.kind if scheme else FLOAT
            for (index, name), scheme in plan.schemes.items()
        },
        "files": dict(hashes),
        "versions": {package: version(package) for package in ("ms_pangu_quant", "mindspore", "mindformers", "numpy")},
    }


def relative_error(value: NDArray[np.float32], reference: NDArray[np.float32], ranks: Ranks = ALONE) -> float:
    """||value - reference|| / ||reference||, Frobenius, over the rows of all ranks; 0 for two zero tensors."""
    norm, difference = (math.hypot(*ranks.gather(float(np.linalg.norm(each)))) for each in (reference, value - reference))
    return difference / norm if norm else difference


def checkpoint_hash(reader: CheckpointReader, on_bytes: Callable[[int], None]) -> str:
    config = json.dumps(dict(reader.config.raw), sort_keys=True)
    return hashlib.sha256((reader.files.sha256(on_bytes) + config).encode()).hexdigest()
