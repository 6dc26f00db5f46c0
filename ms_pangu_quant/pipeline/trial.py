"""Which transforms a model wants, where its recipe leaves it to be measured: each choice is tried on some of its blocks.

Rotation spreads outliers over all channels, smoothing moves them into the weights, and which leaves less error differs
between models: where outliers stand in a few channels of all tokens smoothing alone is better, where they stand in a few
tokens or the weights need calibration rotating first is. Neither follows from rounding to nearest, which can order two
choices the other way round. So a few blocks are transformed and rounded as the recipe says, from the float model's hidden
states, each choice from the same; the one whose blocks err least is taken.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.data import TokenData, fitting
from ms_pangu_quant.calibration.statistics import NOTHING
from ms_pangu_quant.calibration.stream import NoStream
from ms_pangu_quant.checkpoint.block import RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.checkpoint.writer import begun_with
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.block import round_block, transform_block
from ms_pangu_quant.pipeline.estimate import TRIED_BLOCKS, TRIED_TOKENS
from ms_pangu_quant.pipeline.prepare import check_data
from ms_pangu_quant.pipeline.report import SILENT, Progress
from ms_pangu_quant.recipe.recipe import Recipe


def with_transforms(
    reader: CheckpointReader,
    recipe: Recipe,
    data: TokenData | None,
    progress: Progress = SILENT,
    resumed: Path | None = None,
) -> Recipe:
    """The recipe with the transforms that this model wants, or with those of the run that is in the directory `resumed`.

    A recipe that names its transforms is returned as it is. Raises RecipeError where there is nothing to try on.
    """
    if not recipe.choices:
        return recipe
    check_data(reader.config, recipe, data)
    assert data is not None

    def decision() -> str:
        earlier = begun_with(resumed).get("transforms", "") if resumed else ""
        known = chosen_in(earlier) in [choice.name for choice in recipe.choices]
        return earlier if known else decide(reader, recipe, data, progress.on_tried)

    said = runtime.job().from_first(decision)
    progress.on_decided(said)
    return recipe.decided(chosen_in(said), said)


def decide(
    reader: CheckpointReader,
    recipe: Recipe,
    data: TokenData,
    on_tried: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Which of the recipe's choices this model wants, and why, in one line; chosen_in tells the first from the second.

    With a budget all layers are in its cheaper scheme. on_tried is called with how many of so many blocks are behind it.
    """
    return told(tried(reader, recipe, data, on_tried), reader.config.num_hidden_layers)


def tried(
    reader: CheckpointReader,
    recipe: Recipe,
    data: TokenData,
    on_tried: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Of each of the recipe's choices, by name, the geometric mean of the tried blocks' errors."""
    whole = recipe.uniform(recipe.scheme) if recipe.budget else recipe
    errors = try_choices(reader, [whole.decided(choice.name, "") for choice in recipe.choices], data, on_tried)
    return {choice.name: _geometric_mean(each) for choice, each in zip(recipe.choices, errors, strict=True)}


def told(means: Mapping[str, float], blocks: int) -> str:
    """What decide says of errors of a model with so many blocks."""
    first, *others = sorted(means, key=means.__getitem__)
    behind = "".join(f"; {name} {means[name]:.4f}" for name in others)
    return f"{first}: error {means[first]:.4f}{behind} (of blocks {', '.join(map(str, blocks_tried(blocks)))})"


def chosen_in(decision: str) -> str:
    """The name of the choice that decide took."""
    return decision.split(":")[0]


def blocks_tried(blocks: int) -> list[int]:
    """The last ones of so many equal parts of the model. What the very last errs by no other block takes up."""
    count = min(TRIED_BLOCKS, blocks)
    return [blocks * (part + 1) // count - 1 for part in range(count)]


def try_choices(
    reader: CheckpointReader, choices: Sequence[Recipe], data: TokenData, on_tried: Callable[[int, int], None]
) -> list[list[float]]:
    """The error of the blocks of blocks_tried with each choice; recipes that differ in rewrites and transforms alone.

    It is the root of the mean over held-out tokens (all, if none are) of ||quantized - float||^2 / ||float||^2 of a block's
    output.
    """
    runtime.ensure_started()
    from ms_pangu_quant.calibration.runner import BlockRunner, Hidden

    sequences, held_out = _some_texts(data)
    lengths = [len(sequence) for sequence in sequences]
    hidden = Hidden(embedding_rows(reader.files, np.concatenate(sequences)), lengths, held_out)
    needs = reduce(operator.or_, (each.observed | (each.seen or NOTHING) for each in choices))
    plans = [each.plan(reader.config).blocks for each in choices]
    judged = slice(hidden.fitted if held_out else 0, None)
    errors: list[list[float]] = [[] for _ in choices]
    where = blocks_tried(reader.config.num_hidden_layers)
    with BlockRunner(reader.config, lengths, held_out=held_out, bfloat16=needs.bfloat16) as runner:
        for index in range(where[-1] + 1):
            for place, choice in enumerate(choices) if index in where else ():
                begun = Hidden(
                    reduce(lambda rows, each: each.states(rows), choice.rewrites, hidden.states), lengths, held_out
                )
                block = choice.rewritten(reader).block(index)
                stats, target = runner.observe(block, begun, needs, f"block {index}")
                assert target is not None
                block, stats = transform_block(block, stats, choice, plans[place][index])
                rounded = round_block(block, stats, choice, plans[place][index], NoStream())
                reached = runner.advance(rounded, begun).states
                errors[place].append(_error_of_tokens(reached[judged], target.states[judged]))
            if index < where[-1]:
                hidden = runner.advance(RoundedBlock(reader.block(index)), hidden)
            on_tried(index + 1, where[-1] + 1)
    return errors


def _geometric_mean(errors: Sequence[float]) -> float:
    """Blocks differ in size of error, and each is to have a say."""
    return math.exp(sum(math.log(max(error, 1e-30)) for error in errors) / len(errors))


def _some_texts(data: TokenData) -> tuple[list[NDArray[np.int32]], int]:
    """(texts, how many of the last ones are held out): the first of each kind, of TRIED_TOKENS together or one."""
    cut = len(data.sequences) - data.held_out
    kinds = data.sequences[:cut], data.sequences[cut:]
    fitted, held = ([*kind[: fitting(map(len, kind), TRIED_TOKENS)]] for kind in kinds)
    return fitted + held, len(held)


def _error_of_tokens(value: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Every token counts alike, however large: a few are a thousand times as large as others."""
    square = np.square(reference, dtype=np.float64).sum(axis=1)
    difference = np.square(value - reference, dtype=np.float64).sum(axis=1)
    return float(np.sqrt(np.mean(difference / np.maximum(square, np.finfo(np.float32).tiny))))
