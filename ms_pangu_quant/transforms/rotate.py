"""Rotates the residual stream by a random orthogonal matrix, so that no channel of it is an outlier (QuaRot, SpinQuant).

How it works. With Q orthogonal, x Q has the norm of x, so a norm without weights commutes with Q. The norms' weights are
therefore folded into the layers that read them first, then everything that writes the stream is multiplied by Q from the
left (embedding, o_proj and down_proj with their biases) and everything that reads it (q/k/v, gate/up, head) by Q^T from the
right. Value heads are rotated too: an attention head is a weighted mean of value rows, which Q commutes with, so v_proj
writes rotated heads and o_proj reads them. All of it is done to the checkpoint as it is read, nothing when it is served.

The matrix is a Hadamard matrix with random signs, which spreads a single channel evenly over all, or one drawn uniformly
from all orthogonal matrices, which exists for every size and takes n multiplications for each element instead of some 130.

A tied head becomes a tensor of its own: the embedding must not have the final norm folded in, the head must.

What down_proj reads is a product of gate and up, made element by element, so a rotation there cannot be done beforehand.
With `online` it is computed when the model is run: x D H 2^-k, the signs D in the rows of up_proj, the rest in
backends/hadamard.py, with a power of two 2^k near sqrt(n) in the place of the root, so that bfloat16 holds it exactly.
down_proj's weight is multiplied by D H 2^k / n.

Source: Ashkboos et al. 2024, arXiv:2404.00456; Liu et al. 2024, arXiv:2405.16406.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.files import ComputedEntry
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.quantizers.grid import row_pieces
from ms_pangu_quant.quantizers.threads import in_parallel
from ms_pangu_quant.recipe.settings import check_types
from ms_pangu_quant.transforms.hadamard import hadamard_factors, multiply, online_scale

RotationKind = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q of n = size, drawn from (seed, size).

    kind  "hadamard": diag(signs) H / sqrt(n).  "orthogonal": uniform (Haar), the Q of a normal matrix's QR decomposition
          with R's diagonal made positive (Mezzadri 2007, arXiv:math-ph/0609050).
    """

    size: int
    seed: int
    kind: RotationKind = "hadamard"

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """Q of kind "orthogonal"."""
        q, r = np.linalg.qr(np.random.default_rng([self.seed, self.size]).standard_normal((self.size, self.size)))
        return np.asarray(q * np.copysign(1.0, np.diag(r)), np.float64)

    @cached_property
    def signs(self) -> NDArray[np.float64]:
        return np.random.default_rng([self.seed, self.size]).choice([-1.0, 1.0], self.size)

    def forward(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """rows [count, n] times Q."""
        if self.kind == "orthogonal":
            return rows @ self.matrix
        return multiply(rows * self.signs, hadamard_factors(self.size))

    def of_rows(self, matrix: NDArray[np.float32], scale: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """matrix [out, n], its columns times scale [n] first, times Q; computed in float64."""
        result = np.empty(matrix.shape, np.float32)

        def turn(rows: slice) -> None:
            wide = matrix[rows].astype(np.float64)
            result[rows] = self.forward(wide if scale is None else wide * scale)

        in_parallel(turn, row_pieces(matrix))
        return result


@dataclass(frozen=True)
class Rotate:
    """A rewrite of the checkpoint.

    seed of the matrices; heads: rotate value heads too; kind as in Rotation, of what is rotated beforehand; online: a
    Hadamard matrix in front of down_proj, computed when the model is run, on one device.
    """

    seed: int = 0
    heads: bool = True
    kind: RotationKind = "hadamard"
    online: bool = False

    def __post_init__(self) -> None:
        check_types(self, "rotate")
        if self.seed < 0:
            raise RecipeError(f"rotate.seed: got {self.seed}, wanted a whole number of at least 0")

    def changes(self, name: str) -> bool:
        """Whether it rewrites this tensor of a block."""
        untouched = (layout.Q_PROJ, layout.K_PROJ, *(() if self.heads else (layout.V_PROJ,)))
        return name not in [f"{site.name}.bias" for site in untouched]

    def states(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hidden states [tokens, hidden] of the model as those of the rotated one."""
        return Rotation(rows.shape[1], self.seed, self.kind).of_rows(rows)

    def __call__(self, reader: CheckpointReader) -> CheckpointReader:
        """The same model, rotated. Raises RecipeError if there is no Hadamard matrix of its sizes."""
        config = reader.config
        stream = Rotation(config.hidden_size, self.seed, self.kind)
        head = Rotation(config.head_dim, self.seed, self.kind) if self.heads else None
        inner = Rotation(config.intermediate_size, self.seed) if self.online else None
        for each in (stream, head, inner):
            if each is not None and each.kind == "hadamard":
                hadamard_factors(each.size)  # fails before anything is written
        return rotated(reader, stream, head, inner)


def rotated(
    reader: CheckpointReader, stream: Rotation, head: Rotation | None = None, inner: Rotation | None = None
) -> CheckpointReader:
    """The same model with its residual stream, and what else is given, rotated; read so, nothing is written."""
    config = reader.config
    norm = reader.files.read_float32(layout.FINAL_NORM)
    embedding = reader.files.entries[layout.EMBEDDING]
    head_source = embedding if config.tie_word_embeddings else reader.files.entries[layout.HEAD]
    return reader.rewritten(
        dataclasses.replace(config, tie_word_embeddings=False, online_hadamard=inner is not None),
        {
            layout.EMBEDDING: ComputedEntry.of(embedding, stream.of_rows),
            layout.HEAD: ComputedEntry.of(head_source, lambda rows: stream.of_rows(rows, norm)),
            layout.FINAL_NORM: ComputedEntry.of(reader.files.entries[layout.FINAL_NORM], np.ones_like),
        },
        lambda block: rotate_block(block, stream, head, inner),
    )


def rotate_block(block: Block, stream: Rotation, head: Rotation | None, inner: Rotation | None = None) -> Block:
    """The block between rotated residual streams: from x Q it computes y Q where `block` computes y from x.

    With inner, what down_proj reads must be multiplied by inner's H and online_scale before it does.
    """
    changed: dict[str, NDArray[np.float32]] = {}
    for site in layout.SITES:
        weight, bias = block.weight(site), block.bias(site)
        if site.producer in layout.NORMS:
            weight = stream.of_rows(weight, block[f"{site.producer}.weight"])
        if head is not None and site == layout.V_PROJ:
            weight = _of_heads(weight.T, head).T
            bias = None if bias is None else _of_heads(bias[None], head)[0]
        if inner is not None and site == layout.UP_PROJ:
            weight = (weight * inner.signs[:, None]).astype(np.float32)
            bias = None if bias is None else (bias * inner.signs).astype(np.float32)
        if inner is not None and site == layout.DOWN_PROJ:
            weight = inner.of_rows(weight) / np.float32(sqrt(inner.size) * online_scale(inner.size))
        if site.writes_stream:
            if head is not None and site == layout.O_PROJ:
                weight = _of_heads(weight, head)
            weight = stream.of_rows(weight.T).T
            bias = None if bias is None else stream.of_rows(bias[None])[0]
        changed[f"{site.name}.weight"] = np.ascontiguousarray(weight)
        if bias is not None:
            changed[f"{site.name}.bias"] = bias
    changed.update({f"{norm}.weight": np.ones_like(block[f"{norm}.weight"]) for norm in layout.NORMS})
    return block.replace(changed)


def _of_heads(matrix: NDArray[np.float32], head: Rotation) -> NDArray[np.float32]:
    """matrix [rows, heads * head_dim], every head of a row times Q."""
    return head.of_rows(np.ascontiguousarray(matrix).reshape(-1, head.size)).reshape(matrix.shape)


# Of a checkpoint, by the name that a recipe has for them; each follows from its settings alone.
REWRITES = {"rotate": Rotate}
