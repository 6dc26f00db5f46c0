"""The calibration data on its way through the model, in front of the block whose turn it is.

Stream holds what the quantized blocks so far make of it, so that each block is looked at with the hidden states it will
meet when it is served. Where the rounding aims at the float model (Needs.drift), it also holds what that model makes of it,
one block beside the other. NoStream stands in its place where there is no data: nothing is seen and nothing is measured.

Of a job's ranks each has a share of the data; what they see is merged, so all of them know the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.calibration.ranges import RangeStats
from ms_pangu_quant.calibration.statistics import SAMPLE_TOKENS, InputStats, Needs
from ms_pangu_quant.checkpoint.block import Block, RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.job.ranks import ALONE, Ranks
from ms_pangu_quant.job.share import Share, share_of
from ms_pangu_quant.network import runtime
from ms_pangu_quant.quantizers.kv_cache import Int8Cache, QuantizedCache
from ms_pangu_quant.quantizers.threads import pieces
from ms_pangu_quant.recipe.plan import BlockPlan

if TYPE_CHECKING:
    from ms_pangu_quant.calibration.runner import Hidden, Way

_PIECE_ROWS = 256


@dataclass(frozen=True)
class BlockError:
    """||quantized - float|| / ||float|| of a block's output, over the texts that its statistics are of, and over those that
    are held out; None where there are none. How far the second is above the first is how far rounding fitted what is the
    first's alone."""

    fitted: float | None = None
    held_out: float | None = None


class NoStream:
    """As Stream, of no data. Statistics that were made elsewhere are handed on."""

    follows_float = False

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def observe(self, block: Block, index: int, plan: BlockPlan) -> dict[str, InputStats]:
        return {}

    def see(self, input_name: str, block: RoundedBlock, stats: dict[str, InputStats]) -> InputStats | None:
        return stats.get(input_name)

    def pass_by(self, block: RoundedBlock) -> None:
        return None

    def round_cache(self, settings: Int8Cache, block: RoundedBlock, plan: BlockPlan) -> QuantizedCache | None:
        return None

    def advance(self, block: RoundedBlock) -> BlockError:
        return BlockError()

    @property
    def states(self) -> dict[str, NDArray[np.float32]]:
        return {}

    def restore(self, states: Mapping[str, NDArray[np.float32]]) -> None:
        return None


@dataclass(frozen=True)
class Sample:
    """Every n-th of all calibration sequences, those of them that are a rank's: SAMPLE_TOKENS together or a few more.

    rows   of the rank's hidden states.   lengths  tokens of each sequence.
    first_row  place of the first of them in the whole sample.
    """

    rows: NDArray[np.intp]
    lengths: list[int]
    first_row: int

    @classmethod
    def draw(cls, lengths: Sequence[int], share: Share, ranks: int) -> Sample:
        """lengths  tokens of each sequence of all ranks. Of few sequences so many are drawn that each rank has one."""
        step = max(1, min(sum(lengths) // SAMPLE_TOKENS, len(lengths) // ranks))
        first = -(-share.begin // step) * step
        chosen, edges = range(first, share.end, step), np.cumsum([0, *lengths]) - share.first_row
        rows = [np.arange(edges[index], edges[index + 1]) for index in chosen]
        return cls(np.concatenate(rows), [lengths[index] for index in chosen], sum(lengths[:first:step]))

    def of(self, hidden: Hidden) -> Hidden:
        return replace(
            hidden, states=hidden.states[self.rows], lengths=self.lengths, held_out=0, first_rows=(self.first_row, 0)
        )


class Stream:
    """observed  what is wanted of the inputs of the float block. Where something is `seen` it is of a sample of the data:
              what transforms ask, how large inputs are, a few thousand tokens tell.

    seen      what is wanted of each again, as the layers rounded before it make it; None where nothing is. The float model
              runs beside then.
    """

    def __init__(
        self, reader: CheckpointReader, data: TokenData, observed: Needs, seen: Needs | None = None, ranks: Ranks = ALONE
    ) -> None:
        runtime.ensure_started()
        from ms_pangu_quant.calibration.runner import BlockRunner, Hidden, Way

        self._way = Way
        self.ranks, self._observed, self._seen, self._index = ranks, observed, seen, 0
        lengths = [len(sequence) for sequence in data.sequences]
        cut = len(lengths) - data.held_out
        share, held = (
            share_of(lengths[:cut], ranks.rank, ranks.size),
            share_of(lengths[cut:], ranks.rank, ranks.size, least=0),
        )
        sequences = data.sequences[share.begin : share.end] + data.sequences[cut + held.begin : cut + held.end]
        own, rows = [len(sequence) for sequence in sequences], (share.first_row, sum(lengths[:cut]) + held.first_row)
        held_out = held.end - held.begin
        self._hidden = Hidden(embedding_rows(reader.files, np.concatenate(sequences)), own, held_out, rows)
        bfloat16 = (observed if seen is None else observed | seen).bfloat16
        self._sample = Sample.draw(lengths[:cut], share, ranks.size)
        self._runner = BlockRunner(reader.config, own, held_out=held_out, bfloat16=bfloat16)
        also = [self._sample.lengths]
        self._floats = BlockRunner(reader.config, own, held_out=held_out, also=also, bfloat16=bfloat16) if seen else None
        self._measured = data.held_out > 0
        self._target = self._hidden  # in front of the block, and from observe or advance on behind it
        self._ways: tuple[Way, Way] | None = None  # the quantized model's and the float one's through the block

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        for runner in (self._runner, self._floats):
            if runner is not None:
                runner.__exit__()

    @property
    def _where(self) -> str:
        return f"block {self._index}"

    def observe(self, block: Block, index: int, plan: BlockPlan) -> dict[str, InputStats]:
        """What enters the linear layers of a float block, by input name. plan: of the block when it is rounded."""
        self._index = index
        if self._floats is None:
            stats, output = self._runner.observe(block, self._hidden, self._observed, self._where)
            assert output is not None
            self._target = output
        else:
            self._ways = self._way(self._runner, self._hidden, plan), self._way(self._floats, self._target)
            if not self._observed.data:
                return {}
            sample = self._sample.of(self._hidden)
            stats, _ = self._floats.observe(block, sample, self._observed, self._where, output=False)
        return {name: self.ranks.fold(stats.pop(name), InputStats.merge) for name in list(stats)}

    def see(self, input_name: str, block: RoundedBlock, stats: dict[str, InputStats]) -> InputStats | None:
        """What is known of one input when its layers' turn comes. stats are those of observe, as transforms left them;
        each is handed out once and not kept, for a gram may be 1.3 GB."""
        if self._ways is None or self._seen is None:
            return stats.pop(input_name)
        stats.pop(input_name, None)
        seen = self._runner.observe_input(input_name, block, self._ways, self._seen, self._where)
        return self.ranks.fold(seen, InputStats.merge)

    @property
    def follows_float(self) -> bool:
        """Whether the float model runs beside the quantized one."""
        return self._floats is not None

    def pass_by(self, block: RoundedBlock) -> None:
        """To be called while the block still has its float weights: the float model goes behind it."""
        if self._ways is not None:
            self._target = self._ways[1].behind(RoundedBlock(block.floats))

    def round_cache(self, settings: Int8Cache, block: RoundedBlock, plan: BlockPlan) -> QuantizedCache | None:
        """The grids of an int8 cache, from the keys and values that the layers, as they are rounded, make."""
        seen = self._runner.observe_cache(block, self._hidden, settings.needs, self._where, plan)
        keys, values = (self.ranks.fold(each, RangeStats.merge) for each in seen)
        return settings.cache(keys, values, block.config.num_key_value_heads)

    def advance(self, block: RoundedBlock) -> BlockError:
        """Go behind the block as it will be served; its output error.

        It is measured against what the float block makes of the quantized block's input; where the rounding aims at the
        float model, against that model's hidden states: then the error is that of all blocks so far.
        """
        self._ways = None
        self._hidden = self._runner.advance(block, self._hidden, self._hidden.states)  # in place
        cut = self._hidden.fitted
        fitted, held_out = (
            relative_error(self._hidden.states[rows], self._target.states[rows], self.ranks)
            for rows in (slice(cut), slice(cut, None))
        )
        return BlockError(fitted, held_out if self._measured else None)

    @property
    def states(self) -> dict[str, NDArray[np.float32]]:
        """All that `restore` needs to go on from here, [tokens, hidden] each."""
        found = {"quantized": self._hidden.states}
        return found if self._floats is None else {**found, "float": self._target.states}

    def restore(self, states: Mapping[str, NDArray[np.float32]]) -> None:
        """Go where another run was when these were its states."""
        self._hidden = replace(self._hidden, states=states["quantized"])
        if self._floats is not None:
            self._target = replace(self._target, states=states["float"])


BlockStream = Stream | NoStream  # what the loop asks of the calibration data, block after block


def relative_error(value: NDArray[np.float32], reference: NDArray[np.float32], ranks: Ranks = ALONE) -> float:
    """||value - reference|| / ||reference||, Frobenius, over the rows of all ranks; 0 for two zero tensors."""
    norm = difference = 0.0
    for rows in pieces(0, len(value), _PIECE_ROWS):
        norm += float(np.square(reference[rows], dtype=np.float64).sum())
        difference += float(np.square(value[rows] - reference[rows], dtype=np.float64).sum())
    norm, difference = (math.sqrt(math.fsum(ranks.gather(each))) for each in (norm, difference))
    return difference / norm if norm else difference
