"""Reads a float checkpoint one decoder block at a time; the whole of it is never in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout, slices, training
from ms_pangu_quant.checkpoint.block import Block, RoundedBlock
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, QUANTIZATION_FILE, ModelConfig
from ms_pangu_quant.checkpoint.files import TensorEntry, TensorFiles
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.suggestion import did_you_mean_path


class CheckpointReader:
    """A float checkpoint whose every tensor has been found and has the shape config.json implies.

    plan  every layer float: the same face as that of a quantized directory's reader.
    rows  how the rows of fused tensors lie, if MindFormers' training saved the checkpoint; else None.
    """

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError naming file, tensor, what was found and what was wanted."""
        self.directory = directory
        if not directory.is_dir():
            close = did_you_mean_path(directory)
            raise CheckpointError(f"{directory}: no such directory{close}; wanted a Hugging Face checkpoint directory")
        training.check_directory(directory)
        self.config = ModelConfig.from_file(directory / "config.json")
        if is_quantized(directory, self.config):
            raise CheckpointError(f"{directory}: is quantized already; wanted the float checkpoint")
        self.files = slices.put_together(directory) or TensorFiles(directory)
        self.rows: training.RowLayout | None = None
        if training.is_trained(self.files):
            self.files, self.config, self.rows = training.as_hugging_face(self.files, self.config)
        self.bytes = self.files.nbytes
        self.plan, self.format = Plan.uniform(self.config), None
        self._rewrite: Callable[[Block], Block] | None = None
        optional = [layout.HEAD] if self.config.tie_word_embeddings else []
        self.files.check(self.plan.float_shapes(self.config), optional=optional)

    def block(self, index: int) -> Block:
        prefix = layout.block_prefix(index)
        block = Block(
            self.config, {name: self.files.read_float32(prefix + name) for name in layout.block_shapes(self.config)}
        )
        return self._rewrite(block) if self._rewrite else block

    def rounded_block(self, index: int) -> RoundedBlock:
        return RoundedBlock(self.block(index))

    def rewritten(
        self, config: ModelConfig, outer: Mapping[str, TensorEntry], rewrite: Callable[[Block], Block]
    ) -> CheckpointReader:
        """A reader of the same checkpoint with other tensors outside the blocks, and every block rewritten as it is read.

        files.entries of a block's tensors remain those on disk.
        """
        reader, earlier = copy.copy(self), self._rewrite
        reader.config, reader.files = config, self.files.overlaid(outer)
        reader._rewrite = (lambda block: rewrite(earlier(block))) if earlier else rewrite
        return reader


def embedding_rows(files: TensorFiles, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Embeddings [tokens, hidden] of token_ids [tokens]; only the rows in use are read."""
    unique, inverse = np.unique(token_ids, return_inverse=True)
    rows = [files.read_float32(layout.EMBEDDING, int(token), int(token) + 1) for token in unique]
    table = np.concatenate(rows)
    return table[inverse]


def is_quantized(directory: Path, config: ModelConfig) -> bool:
    return (
        (directory / QUANTIZATION_FILE).exists()
        or (directory / ASCEND_FILE).exists()
        or bool(config.raw.get("quantization_config"))
    )
