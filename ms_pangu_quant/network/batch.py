"""The index tensors of one forward pass over packed sequences, as MindFormers' network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ms_pangu_quant.backends import Backend, current_backend


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def dynamic_inputs(backend: Backend) -> list[Tensor]:
    """What stands for the tensors of packed_inputs, in their order, where a graph is compiled for every size."""
    vector, table = Tensor(shape=[None], dtype=ms.int32), Tensor(shape=[None, None], dtype=ms.int32)
    shape, dtype = backend.dynamic_mask
    return [vector, vector, vector, vector, table, vector, Tensor(shape=shape, dtype=dtype)]


def packed_inputs(
    lengths: Sequence[int],
    contexts: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size: int,
    backend: Backend | None = None,
) -> dict[str, Tensor]:
    """Inputs for sequences that contribute lengths[b] new tokens after contexts[b] cached ones.

    tables[b] lists the cache blocks of sequence b, enough for contexts[b] + lengths[b] tokens.
    backend is the network's, by default the current one.
    Returns int32 tensors positions and slot_mapping [tokens], batch_valid_length, context_lens_tensor and q_seq_lens
    [batch], block_tables [batch, blocks], and the backend's attention_mask.
    """
    positions = np.concatenate([np.arange(start, start + length) for start, length in zip(contexts, lengths, strict=True)])
    width = max(blocks_for(start + length, block_size) for start, length in zip(contexts, lengths, strict=True))
    padded = np.zeros((len(lengths), width), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: min(len(table), width)] = table[:width]
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    slots = padded[sequence, positions // block_size] * block_size + positions % block_size
    integers = {
        "positions": positions,
        "batch_valid_length": np.add(contexts, lengths),
        "context_lens_tensor": np.asarray(contexts),
        "q_seq_lens": np.asarray(lengths),
        "block_tables": padded,
        "slot_mapping": slots,
    }
    tensors = {name: Tensor(np.ascontiguousarray(value, np.int32)) for name, value in integers.items()}
    backend = backend or current_backend()
    return {**tensors, "attention_mask": backend.attention_mask(lengths, contexts, width * block_size)}
