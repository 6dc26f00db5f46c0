"""Reads a float checkpoint one decoder block at a time; the whole of it is never in memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout, names, slices, training
from ms_pangu_quant.checkpoint.block import Block, RoundedBlock
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, QUANTIZATION_FILE, QUANTIZED_KEYS, ModelConfig
from ms_pangu_quant.checkpoint.files import CheckpointNote, TensorEntry, TensorFiles, same
from ms_pangu_quant.errors import CheckpointError, one_line
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
        with self.files.explained():
            self.files = names.without_buffers(names.without_prefixes(self.files), self.config)
            if training.is_trained(self.files):
                self.files, self.config, self.rows = training.as_hugging_face(self.files, self.config)
            self.plan, self.format = Plan.uniform(self.config), None
            self.files.check(self.plan.float_shapes(self.config), optional=optional_head(self.files, self.config))
        self.bytes = self.files.nbytes
        self._rewrite: Callable[[Block], Block] | None = None
        tell(self.files)

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


def optional_head(files: TensorFiles, config: ModelConfig) -> list[str]:
    """The head's name where it is tied, and may be stored all the same. Raises CheckpointError for one that is another.

    Of such a checkpoint, older versions of transformers take the embedding and newer ones the head.
    """
    if not config.tie_word_embeddings:
        return []
    head, embedding = files.entries.get(layout.HEAD), files.entries.get(layout.EMBEDDING)
    if head is not None and embedding is not None and not same(head, embedding):
        raise CheckpointError(
            f"{head.file}: {layout.HEAD} is not the embedding, but {files.directory / 'config.json'} has "
            "tie_word_embeddings true; set it to false if the head was trained, or else remove the head"
        )
    return [layout.HEAD]


def tell(files: TensorFiles) -> None:
    """What a user should know of how a directory was read."""
    for note in files.notes:
        warnings.warn(CheckpointNote(one_line(note)), stacklevel=3)


def is_quantized(directory: Path, config: ModelConfig) -> bool:
    """By any program: msModelSlim's older versions put the scheme's name into the description's."""
    stem = Path(ASCEND_FILE).stem
    described = any(path.exists() for path in (directory / QUANTIZATION_FILE, *directory.glob(f"{stem}*.json")))
    return described or any(config.raw.get(key) for key in QUANTIZED_KEYS)
