"""The output directory as the loop sees it: blocks are added to it in turn, and read back when a run goes on.

Rank 0 writes and reads for all; the other ranks make the same calls and get what it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.calibration.stream import BlockError
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import RoundedBlock
from ms_pangu_quant.checkpoint.files import TensorFiles, write_safetensors
from ms_pangu_quant.checkpoint.writer import REPORT_FILE, QuantizedWriter
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats.finished import finished_report, stored_bytes
from ms_pangu_quant.formats.reader import read_block
from ms_pangu_quant.formats.stored import block_tensors
from ms_pangu_quant.pipeline.prepare import Run
from ms_pangu_quant.pipeline.report import BlockReport, QuantizeResult

_DIGEST = "sha256"


def finished(run: Run, output: Path) -> QuantizeResult | None:
    """The result of the run that has written all of this directory; None where there is something to do."""
    found = run.ranks.from_first(lambda: finished_report(output, run.fingerprint, run.stored_as))
    if found is None:
        return None
    blocks = tuple(BlockReport(**block) for block in found["blocks"])
    return QuantizeResult(output, blocks, found["bytes_before"], stored_bytes(output), len(blocks), was_complete=True)


def _digest(states: Mapping[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(states):
        digest.update(f"{name}{states[name].shape}".encode())
        digest.update(np.ascontiguousarray(states[name]).data)
    return np.frombuffer(digest.digest(), np.uint8)


def _read_states(file: Path) -> dict[str, NDArray[np.float32]] | None:
    """None for what is not there or not whole."""
    if not file.is_file():
        return None
    with suppress(CheckpointError, OSError):
        found = {name: entry.read() for name, entry in TensorFiles(file.parent, only=file).entries.items()}
        digest = found.pop(_DIGEST, None)
        return found if digest is not None and np.array_equal(digest, _digest(found)) else None
    return None


class Output(ExitStack):
    """Use as a context manager: it holds the directory's lock. reports are those of the blocks written so far."""

    def __init__(self, run: Run, directory: Path, resume: bool) -> None:
        """Raises OutputError if the directory is not empty, in use, not writable, or belongs to another run."""
        super().__init__()
        self.run, self.directory = run, directory
        self._writer: QuantizedWriter | None = None  # of another rank than the first
        if run.ranks.is_first:
            begun_with = {**run.fingerprint, "format": run.stored_as.NAME}  # an export makes the same report in another
            writer = QuantizedWriter(directory, begun_with, blocks=len(run.plan.blocks), resume=resume)
            self._writer = self.enter_context(writer)
        records = run.ranks.from_first(lambda: self._first.reports)
        self.reports = [BlockReport(**record) for record in records]
        self._begun_with = len(self.reports)

    @property
    def _first(self) -> QuantizedWriter:
        assert self._writer is not None
        return self._writer

    def read(self, index: int) -> RoundedBlock:
        """A block that was written."""

        def stored() -> RoundedBlock:
            files = TensorFiles(self.directory, only=self._first.block_file(index))
            return read_block(self.run.stored_as, files, self.run.reader.config, self.run.plan.blocks[index], index)

        return self.run.ranks.from_first(stored)

    def kept(self) -> Mapping[str, NDArray[np.float32]] | None:
        """This rank's hidden states behind the last block written; None where they, or another rank's, are not whole."""
        found = _read_states(self._states_file(len(self.reports) - 1))
        return found if all(self.run.ranks.gather(found is not None)) else None

    def _states_file(self, index: int) -> Path:
        ranks = self.run.ranks
        return self.directory / f".states-{index:05d}-{ranks.rank}of{ranks.size}.safetensors"

    def add(self, rounded: RoundedBlock, error: BlockError, states: Mapping[str, NDArray[np.float32]]) -> BlockReport:
        """Write the next block; when this returns, a resumed run will not do it again.

        states  this rank's hidden states behind it: kept until the next block is written, so that nothing is replayed.
        """
        index = len(self.reports)
        if states:
            write_safetensors(self._states_file(index), {**states, _DIGEST: _digest(states)})
        self.reports.append(BlockReport(index, error.fitted, error.held_out, rounded.errors, rounded.notes))
        if self._writer:
            tensors = block_tensors(self.run.reader, self.run.stored_as, index, rounded)
            self._writer.write_block(tensors, asdict(self.reports[-1]))
        self._states_file(index - 1).unlink(missing_ok=True)
        return self.reports[-1]

    def finish(self) -> QuantizeResult:
        """Write what is outside the blocks, and the files without which no loader accepts the directory."""
        run = self.run

        def write() -> int:
            blocks = [asdict(report) for report in self.reports]
            said = {**run.report, "blocks": blocks, "files": self._first.hashes()}
            outer = {name: run.reader.files.entries[name] for name in layout.outer_shapes(run.reader.config)}
            return self._first.finish(outer, run.reader.directory, {**run.files, REPORT_FILE: said})

        after = run.ranks.from_first(write)
        return QuantizeResult(self.directory, tuple(self.reports), run.reader.bytes, after, self._begun_with)
