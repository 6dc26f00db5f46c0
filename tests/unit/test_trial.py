"""pipeline/trial.py: which blocks are tried, and that the choice with the least error is taken."""

import numpy as np
import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.pipeline import trial
from ms_pangu_quant.pipeline.trial import blocks_tried, chosen_in, decide
from ms_pangu_quant.recipe.parse import AUTO, parse_recipe
from tests.conftest import MINI, calibration

NAMES = [", ".join(names) for names in AUTO]


@pytest.mark.parametrize("blocks", range(1, 80))
def test_the_blocks_tried_are_different_ones_spread_over_the_model(blocks):
    tried = blocks_tried(blocks)
    assert tried == sorted(set(tried))
    assert {0 <= index < blocks for index in tried} == {True}
    assert max(np.diff([-1, *tried, blocks])) <= blocks // 3 + 1


@pytest.mark.parametrize("least", [0, 1])
def test_the_choice_with_the_least_error_is_taken_and_told(least, monkeypatch):
    undecided = parse_recipe("scheme: w4a8\ntransforms: auto", "recipe")
    errors = [[0.25, 0.01, 0.4], [0.25, 0.01, 0.4]]
    errors[least] = [0.2, 0.011, 0.3]  # less in the geometric mean, not of every block
    monkeypatch.setattr(trial, "try_choices", lambda *arguments: errors)
    said = decide(CheckpointReader(MINI), undecided, calibration(2))
    assert chosen_in(said) == NAMES[least]
    assert f"{np.prod(errors[least]) ** (1 / 3):.4f}" in said
    assert f"{NAMES[1 - least]} 0.1000" in said
