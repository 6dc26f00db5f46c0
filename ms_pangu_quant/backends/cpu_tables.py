"""Embedding and head of the CPU backend: a table stored in bfloat16 stays in bfloat16, where MindSpore would widen it.

A bfloat16 is widened to float32 without loss when it is used, so logits are those of the float32 table up to the order of
sums, in half the memory and half the memory traffic. A table of another dtype is held in float32 and computed by MindSpore.

A quantized checkpoint's head may be rounded to int8 while it is loaded (load(head="int8")), one scale for each word. It is
then a W8A8 layer like those of a block: half the bytes of a decode step's largest matrix. The embedding keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.parallel_core.inference.tensor_parallel.layers import UnquantizedLinearMethod
from mindformers.parallel_core.inference.weights_utils import set_weight_attrs
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer
from numpy.typing import NDArray

from ms_pangu_quant.backends.cpu import CpuGPTModel
from ms_pangu_quant.backends.cpu_block import join_blocks
from ms_pangu_quant.backends.cpu_operators import operator
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.kernels.library import Library
from ms_pangu_quant.quantizers.grid import round_to_grid, row_pieces, weight_scale
from ms_pangu_quant.recipe.scheme import PRESETS


class WordEmbeddings(nn.Cell):
    def __init__(self, library: Library, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = Parameter(
            initializer("zeros", (vocab_size, hidden_size), ms.float32), name="weight", requires_grad=False
        )
        self.narrow, self.rows, self.vocab_size = False, slice(None), vocab_size
        self.gather, self.kernel = ops.Gather(), operator(library, "PanguEmbedding")

    def construct(self, token_ids):
        return self.kernel(token_ids, self.weight) if self.narrow else self.gather(self.weight, token_ids, 0)


class Embedding(nn.Cell):
    """Parameters under the names of MindFormers' LanguageModelEmbedding, which allocates a float32 table at once."""

    def __init__(self, library: Library, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.word_embeddings = WordEmbeddings(library, vocab_size, hidden_size)

    def construct(self, token_ids):
        return self.word_embeddings(token_ids)


class HeadMethod(UnquantizedLinearMethod):
    """rounded: the weight becomes int8 when it is loaded."""

    def __init__(self, library: Library, rounded: bool) -> None:
        self.library, self.rounded = library, rounded
        self.kernel, self.multiply = operator(library, "PanguHead"), ops.MatMul(transpose_b=True)
        self.integers = operator(library, "PanguW8A8Dynamic")
        self.scale, self.none = None, Tensor(np.zeros(1, np.float32))

    def round(self, values: NDArray[Any]) -> Parameter:
        """values [words, hidden], bfloat16 bits or float32 -> int8, packed for the kernel; a few rows at a time."""
        codes, scale = np.empty(values.shape, np.int8), np.empty((len(values), 1), np.float32)
        scheme = PRESETS["w8a8"].weight
        for rows in row_pieces(values):
            piece = values[rows]
            if piece.dtype == np.uint16:
                piece = (piece.astype(np.uint32) << 16).view(np.float32)
            scale[rows] = weight_scale(piece, scheme)
            codes[rows] = round_to_grid(piece, scale[rows], scheme)
        self.library.functions.pangu_pack_w8(codes.ctypes.data, *codes.shape)
        self.scale = Parameter(Tensor(scale[:, 0]), name="output_layer.w_scale", requires_grad=False)
        return _table("output_layer.weight", codes)

    def apply(self, layer, x, weight=None, bias=None):
        x = x.reshape((-1, layer.input_size))
        if self.rounded:
            return self.integers(x, layer.weight, self.scale, self.none)
        return self.kernel(x, layer.weight) if layer.narrow else self.multiply(x, layer.weight)


class TableGPTModel(CpuGPTModel):
    """GPTModel whose embedding and head take the dtype of the checkpoint when it is loaded, and whose quantized blocks are
    as few operators as possible."""

    def __init__(
        self, library: Library, *arguments, pre_process=True, share_embeddings_and_output_weights=False, **keywords
    ) -> None:
        super().__init__(*arguments, pre_process=False, share_embeddings_and_output_weights=False, **keywords)
        self.pre_process = pre_process
        self.runs = join_blocks(self.decoder.layers)
        if pre_process:
            self.embedding = Embedding(library, self.vocab_size, self.config.hidden_size)
        tables = [self.embedding.word_embeddings] if pre_process else []
        if self.post_process:
            self.output_layer.narrow, self.output_layer.vocab_size = False, self.vocab_size
            rows, rank = self.output_layer.output_size_per_partition, self.tp_rank
            self.output_layer.rows = slice(rank * rows, (rank + 1) * rows)
            quantized = keywords.get("quant_config")
            self.output_layer.quant_method = HeadMethod(
                library, rounded=quantized is not None and quantized.full_config.get("head") == "int8"
            )
            tables.append(self.output_layer)
        if share_embeddings_and_output_weights:
            self.output_layer.weight = self.embedding.word_embeddings.weight
            _set_loader(tables)
        else:
            for table in tables:
                _set_loader([table])

    def load_weights(self, *arguments, **keywords):
        loaded = super().load_weights(*arguments, **keywords)
        for run, blocks in self.runs:
            run.point(blocks)
            loaded.add(run.table.name)
        return loaded


def _set_loader(cells: Sequence[Any]) -> None:
    """Let the parameter that these cells share be loaded in the dtype it is stored in."""
    set_weight_attrs(cells[0].weight, {"output_dim": 0, "weight_loader": lambda old, stored: _load(cells, old, stored)})


def _load(cells: Sequence[Any], old: Parameter, stored: Any) -> None:
    """stored: an array, or a slice of a file, [vocab, hidden]; an array is used as it is, without a copy.

    A cell that computes some rows of it, the head of one rank among several, has a copy of them.
    """
    values = stored[:]
    wanted = (cells[0].vocab_size, old.shape[1])
    if tuple(values.shape) != wanted:
        raise CheckpointError(f"{old.name}: got {list(values.shape)}, the network wants {list(wanted)}")
    narrow = str(values.dtype) == "bfloat16"
    values = values.view(np.uint16) if narrow else np.ascontiguousarray(values, np.float32)
    whole = _table(old.name, values)
    for cell in cells:
        part = values[cell.rows]
        method = getattr(cell, "quant_method", None)
        if method is not None and method.rounded:
            cell.weight = method.round(part)
        else:
            cell.weight = whole if len(part) == len(values) else _table("output_layer.weight", part.copy())
        cell.narrow = narrow
    _set_loader(cells)


def _table(name: str, values: NDArray[Any]) -> Parameter:
    dtype = {np.dtype(np.uint16): ms.uint16, np.dtype(np.int8): ms.int8}.get(values.dtype, ms.float32)
    table = Parameter(initializer("zeros", values.shape, dtype), name=name, requires_grad=False)
    table.set_data(ms.from_numpy(values))
    table.stored = values  # MindSpore points into it
    return table
