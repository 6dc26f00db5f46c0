#!/usr/bin/env python3
"""Write a float checkpoint whose residual stream is rotated by a matrix learned on text: is that better than a random one?

SpinQuant (Liu et al. 2024, arXiv:2405.16406) learns the matrix from the quantized model's loss, which takes gradients
through all of it. Here it is learned from what the rotation is there for, as DartQuant and KurTail do: an activation is
rounded in steps of its token's largest number, so with x [tokens, hidden] what q/k/v and gate/up read, before the norm's
weight, the mean of max |x Q|^2 is made small. Beginning at the random Hadamard matrix of `rotate`, steps along the gradient
of the 12-norm in the place of the maximum, on the orthogonal matrices (Q <- exp(-step A) Q, A skew), with momentum.

The output is an ordinary checkpoint of the same function, norms folded, in float32, with a head of its own; its value heads
are rotated too. Quantize it with a recipe that smooths only (transforms: [smooth_search]), and compare that with the
original. docs/recipes.md has what came out; no recipe rotates so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import expm

from ms_pangu_quant.api import read_data
from ms_pangu_quant.calibration.statistics import Needs
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import write_safetensors
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.checkpoint.writer import carry_over
from ms_pangu_quant.errors import OutputError, PanguQuantError
from ms_pangu_quant.evaluation.samples import write_json
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.network import runtime
from ms_pangu_quant.transforms.rotate import Rotation, rotated

NORMED = ("attention_input", "mlp_input")
ROWS, BATCH = 512, 4096  # kept of each input; taken for a step
POWER, MOMENTUM, FIRST_STEP = 12, 0.9, 0.3  # of the norm; the length of the first step, in Frobenius' norm


class Learned(Rotation):
    """An orthogonal matrix that is given."""

    def __init__(self, matrix: NDArray[np.float64]) -> None:
        super().__init__(len(matrix), 0, "orthogonal")
        self.__dict__["matrix"] = matrix


def seen(reader: CheckpointReader, data: Path, texts: int) -> NDArray[np.float32]:
    """[rows, hidden] of what the norms' readers get, without the norms' weights."""
    runtime.start("cpu", "graph")
    from ms_pangu_quant.calibration.runner import BlockRunner, Hidden

    sequences = read_data(data, reader.directory, reader.config, texts, 512, 0).sequences
    hidden = Hidden(embedding_rows(reader.files, np.concatenate(sequences)), [len(each) for each in sequences])
    runner, kept = BlockRunner(reader.config, hidden.lengths), []
    for index in range(reader.config.num_hidden_layers):
        block = reader.block(index)
        stats, output = runner.observe(block, hidden, Needs(data=True, rows=ROWS), f"block {index}")
        assert output is not None
        hidden = output
        for name in NORMED:
            sample = stats[name].sample
            assert sample is not None
            kept.append(sample.rows / block[f"{layout.sites_reading(name)[0].producer}.weight"])
    return np.concatenate(kept)


def cost(x: NDArray[np.float32], q: NDArray[np.float64]) -> float:
    """Mean over rows of max |x q|^2, x of root mean square 1."""
    return float(np.square(np.abs(x @ q.astype(np.float32)).max(axis=1)).mean())


def gradient(x: NDArray[np.float32], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the mean over rows of ||x q||^2 in the POWER-norm, over q."""
    y = x @ q.astype(np.float32)
    size = np.abs(y)
    largest = size.max(axis=1, keepdims=True)
    shares = size / largest
    total = np.sum(shares**POWER, axis=1, keepdims=True)
    slope = 2 * largest * total ** (2 / POWER - 1) * shares ** (POWER - 1) * np.sign(y) / len(x)
    return np.asarray(x.T @ slope, np.float64)


def learned(x: NDArray[np.float32], start: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """An orthogonal matrix [hidden, hidden]."""
    draw, q, velocity = np.random.default_rng(0), start, np.zeros_like(start)
    for step in range(steps):
        skew = gradient(x[draw.choice(len(x), min(BATCH, len(x)), replace=False)], q) @ q.T
        velocity = MOMENTUM * velocity + (1 - MOMENTUM) * (skew - skew.T)
        q = expm(-velocity * FIRST_STEP * (1 - step / steps) / np.linalg.norm(velocity)) @ q
    left, _, right = np.linalg.svd(q)
    return np.asarray(left @ right)


def write(reader: CheckpointReader, q: NDArray[np.float64], output: Path) -> None:
    """The checkpoint rotated by q, float32, a file for each block and one for the rest."""
    config = reader.config
    turned = rotated(reader, Learned(q), Rotation(config.head_dim, 0))
    output.mkdir(parents=True, exist_ok=True)
    outer = {name: turned.files.read_float32(name) for name in layout.outer_shapes(turned.config)}
    write_safetensors(output / "model-outer.safetensors", outer)
    for index in range(config.num_hidden_layers):
        prefix = layout.block_prefix(index)
        tensors = {f"{prefix}{name}": value for name, value in turned.block(index).tensors.items()}
        write_safetensors(output / f"model-{index:05d}.safetensors", tensors)
    carry_over(reader.directory, output)
    write_json(output / "config.json", {**config.raw, "tie_word_embeddings": False, "torch_dtype": "float32"})


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        description=__doc__,
        example="python tools/real/learn_rotation.py real/smollm2 --data real/calibration.jsonl --output real/learned",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="rows of text, messages or token_ids")
    parser.add_argument("--texts", type=int, default=16, help="of these rows, each cut to 512 tokens (default: 16)")
    parser.add_argument("--steps", type=int, default=300, help="of the descent (default: 300)")
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.output.exists() and any(chosen.output.iterdir()):
            raise OutputError(f"{chosen.output}: is not empty; name another directory")
        reader = CheckpointReader(chosen.checkpoint)
        x = seen(reader, chosen.data, chosen.texts)
        start = Rotation(reader.config.hidden_size, 0).forward(np.eye(reader.config.hidden_size))
        q = learned(x, start, chosen.steps)
        write(reader, q, chosen.output)
    except PanguQuantError as error:
        print(f"real/learn_rotation: {error}", file=sys.stderr)
        return 2
    found = {"random": cost(x, start), "learned": cost(x, q)}
    print(json.dumps({"mean of max^2": {name: round(value, 3) for name, value in found.items()}, "rows": len(x)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
