"""tools/real/learn_rotation.py: an orthogonal matrix that makes the largest numbers smaller, and the same function."""

import json

import numpy as np
import pytest

from ms_pangu_quant import api
from tools.dev import make_checkpoint
from tools.real.learn_rotation import POWER, cost, gradient, learned, main

SIZE = 32


@pytest.fixture(scope="module")
def rows():
    """Of a few directions that most of each row lies in, as a residual stream has them."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=(3, SIZE))
    x = rng.normal(size=(2000, 3)) @ common * 2 + rng.normal(size=(2000, SIZE))
    return (x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))).astype(np.float32)


def orthogonal(seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0]


def test_the_gradient_is_that_of_the_power_norm(rows):
    q, direction = orthogonal(1), np.random.default_rng(2).normal(size=(SIZE, SIZE))

    def value(matrix):
        y = np.abs(rows[:64].astype(np.float64) @ matrix)
        return np.mean(np.sum(y**POWER, axis=1) ** (2 / POWER))

    step = 1e-5
    slope = (value(q + step * direction) - value(q - step * direction)) / (2 * step)
    assert np.vdot(gradient(rows[:64], q), direction) == pytest.approx(slope, rel=1e-4)


def test_what_is_learned_is_orthogonal_and_better_than_where_it_began_on_other_rows_too(rows):
    start = orthogonal(3)
    q = learned(rows[:1000], start, 100)
    np.testing.assert_allclose(q @ q.T, np.eye(SIZE), atol=1e-12)
    assert cost(rows[:1000], q) < 0.9 * cost(rows[:1000], start)
    assert cost(rows[1000:], q) < 0.9 * cost(rows[1000:], start)


def test_the_checkpoint_that_is_written_computes_the_same(tmp_path, capsys):
    config = make_checkpoint.make_config("tiny")
    make_checkpoint.write_checkpoint(tmp_path / "float", config, seed=1, dtype="float32")
    draw = np.random.default_rng(0)
    ids = draw.integers(3, config["vocab_size"], (4, 40)).tolist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in ids))
    command = [str(tmp_path / "float"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*command, "--steps", "20"]) == 0
    said = json.loads(capsys.readouterr().out)["mean of max^2"]
    assert said["learned"] < said["random"]
    found = api.compare(tmp_path / "float", tmp_path / "out", tmp_path / "rows.jsonl")
    assert found.kl_mean < 1e-8
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
