"""Gradients through a block are those of the block that calibration runs, and no token has one from before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ms_pangu_quant.calibration.gradients import BlockGradients
from ms_pangu_quant.calibration.runner import BlockRunner, Hidden
from ms_pangu_quant.checkpoint.block import RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.recipe.parse import load_recipe
from tests.conftest import MINI, golden

LENGTHS = [70, 1, 33]


@pytest.fixture(scope="module", params=["[]", "[{rotate: {online: true}}]"], ids=["plain", "online Hadamard"])
def reader(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("gradients") / "recipe.yaml"
    path.write_text(f"scheme: w8a8\ntransforms: {request.param}\n")
    return load_recipe(path).rewritten(CheckpointReader(MINI))


def test_a_gradient_is_the_slope_of_the_block_and_comes_from_no_earlier_token(reader):
    ids = np.concatenate([golden("mini")["ids_0"][:length] for length in LENGTHS]).astype(np.int32)
    hidden, generator = Hidden(embedding_rows(reader.files, ids), LENGTHS), np.random.default_rng(0)
    behind = generator.standard_normal((2, *hidden.states.shape)).astype(np.float32)
    behind[1, :40], behind[1, 41:] = 0, 0
    runner, gradients, before = BlockRunner(reader.config, LENGTHS), BlockGradients(reader.config, 1), np.empty_like(behind)
    for index in (0, 1):  # the weights of one after the other's
        block = reader.block(index)
        gradients.pull_back(block, hidden, behind, before)
        step = generator.standard_normal(hidden.states.shape).astype(np.float32) * 0.01 * np.abs(hidden.states).mean()
        ends = (
            runner.advance(RoundedBlock(block), replace(hidden, states=hidden.states + sign * step)).states.astype(
                np.float64
            )
            for sign in (1, -1)
        )
        change = (next(ends) - next(ends)) / 2
        slopes = np.einsum("dth,th->d", before.astype(np.float64), step)
        size = np.linalg.norm(step) * np.linalg.norm(before, axis=(1, 2)) / np.sqrt(step.size)
        np.testing.assert_array_less(np.abs(slopes - np.einsum("dth,th->d", behind, change)), 0.02 * size)
        assert not before[1, 41:].any()
        assert np.abs(before[1, :41]).max(axis=1).all()
        assert np.abs(before[0]).max(axis=1).all()
