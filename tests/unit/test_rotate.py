"""transforms/hadamard.py and rotate.py: exact matrices, and rotations that leave a model's function alone."""

import functools

import numpy as np
import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.files import chunks
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.transforms.hadamard import hadamard_core, hadamard_factors, multiply
from ms_pangu_quant.transforms.rotate import Rotate, Rotation, rotate_block

MODEL_SIZES = {64: (64,), 128: (64, 2), 256: (64, 4), 768: (12, 64), 1536: (12, 64, 2), 4096: (64, 64)}
WIDE_SIZES = {6144: (12, 64, 8), 12800: (100, 64, 2)}


def hadamard_matrix(size):
    """[size, size], the product of the factors spelled out."""
    return functools.reduce(np.kron, hadamard_factors(size), np.ones((1, 1), np.int8))


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 52, 60, 68, 76, 84, 100, 256, 768, 1536])
def test_a_hadamard_matrix_times_its_transpose_is_n_times_the_identity_in_integers(order):
    matrix = hadamard_matrix(order).astype(np.int64)
    assert matrix.shape == (order, order)
    assert (np.abs(matrix) == 1).all()
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize(("size", "orders"), {**MODEL_SIZES, **WIDE_SIZES}.items())
def test_the_sizes_of_the_models_are_products_of_hadamard_orders(size, orders):
    """A Kronecker product of Hadamard matrices is one: (A x B)(A x B)^T = AA^T x BB^T."""
    factors = hadamard_factors(size)
    assert tuple(map(len, factors)) == orders
    for factor in factors:
        wide = factor.astype(np.int64)
        assert (np.abs(wide) == 1).all()
        assert np.array_equal(wide @ wide.T, len(wide) * np.eye(len(wide), dtype=np.int64))


@pytest.mark.parametrize("size", [4, 8, 128, 12, 24, 40, 768])
def test_the_matrix_is_its_core_beside_that_of_a_power_of_two(size):
    core = hadamard_core(size)
    assert len(core) % 4 == 0
    assert np.array_equal(np.kron(core, hadamard_matrix(size // len(core))), hadamard_matrix(size))


def test_a_matrix_too_small_to_have_a_core_is_refused():
    for size in (1, 2):
        with pytest.raises(RecipeError, match=f"order {size}, wanted 4 or more"):
            hadamard_core(size)


@pytest.mark.parametrize("size", [3, 6, 92, 2 * 97])
def test_a_size_without_a_known_matrix_is_refused(size):
    with pytest.raises(RecipeError, match=f"no Hadamard matrix of order {size} is known"):
        hadamard_factors(size)


@pytest.mark.parametrize("size", [2, 12, 256, 1536])
def test_multiplying_by_factors_is_multiplying_by_the_matrix(size):
    rows = np.random.default_rng(size).normal(size=(3, size))
    matrix = hadamard_matrix(size) / np.sqrt(size)
    np.testing.assert_allclose(multiply(rows, hadamard_factors(size)), rows @ matrix, atol=1e-12)


@pytest.mark.parametrize("size", [64, 256, 1536])
def test_a_rotation_is_orthogonal_and_spreads_an_outlier_evenly(size):
    rotation = Rotation(size, seed=1)
    matrix = rotation.forward(np.eye(size))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(size), atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 92, 256])
def test_a_random_rotation_is_orthogonal_whatever_the_size(size):
    matrix = Rotation(size, seed=1, kind="orthogonal").forward(np.eye(size))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


def test_a_random_rotation_favours_no_direction():
    """Uniform: entries are symmetric about 0, those of the diagonal too (QR alone gives one sign there, as LAPACK does)."""
    drawn = np.stack([Rotation(8, seed, "orthogonal").matrix for seed in range(400)])
    assert np.abs(drawn.mean(axis=0)).max() < 5 / np.sqrt(8 * 400)
    np.testing.assert_allclose((drawn**2).mean(axis=0), 1 / 8, atol=0.04)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_seed_decides_the_rotation(kind):
    one, same, other = (Rotation(64, seed, kind).forward(np.eye(64)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_rotated_block_turns_rotated_states_into_rotated_states(random_block, forward, kv_heads, bias, heads, kind):
    block = random_block(num_key_value_heads=kv_heads, bias=bias)
    hidden = np.random.default_rng(0).normal(size=(7, 24))
    stream, head = Rotation(24, 5, kind), Rotation(8, 5, kind) if heads else None
    wanted, inputs = forward(block, hidden)
    got, rotated_inputs = forward(rotate_block(block, stream, head), stream.forward(hidden))
    wanted = stream.forward(wanted)
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.allclose(rotated_inputs["mlp_hidden"], inputs["mlp_hidden"], rtol=1e-4, atol=1e-4)
    assert np.allclose(rotated_inputs["attention_output"], inputs["attention_output"], atol=1e-3) != heads


def test_norms_that_are_not_folded_would_not_pass_this_suite(random_block, forward):
    """The classic mistake: rotating around a norm whose weights stay where they are changes the function."""
    block, stream = random_block(), Rotation(24, 5)
    unfolded = block.replace({f"{norm}.weight": np.ones(24, np.float32) for norm in layout.NORMS})
    rotated = rotate_block(unfolded, stream, None)
    mistaken = rotated.replace({f"{norm}.weight": block[f"{norm}.weight"] for norm in layout.NORMS})
    hidden = np.random.default_rng(0).normal(size=(7, 24))
    wanted = stream.forward(forward(block, hidden)[0])
    assert np.abs(forward(mistaken, stream.forward(hidden))[0] - wanted).max() > 0.1 * np.abs(wanted).max()


def test_an_outlier_channel_of_a_norm_is_gone_after_the_rotation(random_block, forward):
    norm = np.ones(24, np.float32)
    norm[3] = 500
    block = random_block().replace({"input_layernorm.weight": norm})
    hidden = np.random.default_rng(0).normal(size=(50, 24))
    before = forward(block, hidden)[1]["attention_input"]
    stream = Rotation(24, 5)
    after = forward(rotate_block(block, stream, None), stream.forward(hidden))[1]["attention_input"]
    assert np.abs(before).max(axis=0).max() > 100 * np.median(np.abs(before).max(axis=0))
    assert np.abs(after).max(axis=0).max() < 3 * np.median(np.abs(after).max(axis=0))


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def logits(reader, forward, ids):
    """[tokens, vocab] of a float checkpoint, in float64 and by the tests' own block."""
    config, files = reader.config, reader.files
    hidden = np.concatenate([files.read_float32(layout.EMBEDDING, i, i + 1) for i in ids]).astype(np.float64)
    for block in map(reader.block, range(reader.config.num_hidden_layers)):
        hidden = forward(block, hidden)[0]
    hidden /= np.sqrt((hidden**2).mean(axis=1, keepdims=True) + config.rms_norm_eps)
    head = layout.EMBEDDING if config.tie_word_embeddings else layout.HEAD
    return (hidden * files.read_float32(layout.FINAL_NORM)) @ files.read_float32(head).astype(np.float64).T


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [True, False])
def test_a_rotated_checkpoint_has_the_logits_of_the_original(make_checkpoint, forward, tied, heads, kind):
    reader = CheckpointReader(make_checkpoint(dtype="float32", tie_word_embeddings=tied))
    rotated = Rotate(seed=3, heads=heads, kind=kind)(reader)
    ids = [1, 5, 7, 80, 41, 2]
    wanted, got = logits(reader, forward, ids), logits(rotated, forward, ids)
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert not rotated.config.tie_word_embeddings
    assert reader.config.tie_word_embeddings == tied
    assert set(rotated.plan.float_shapes(rotated.config)) == set(reader.plan.float_shapes(reader.config)) | {layout.HEAD}


def test_rotated_tensors_are_the_same_however_they_are_read(make_checkpoint):
    rotated = Rotate()(CheckpointReader(make_checkpoint(dtype="bfloat16", tie_word_embeddings=False)))
    for name in (layout.EMBEDDING, layout.HEAD, layout.FINAL_NORM):
        entry = rotated.files.entries[name]
        whole = entry.read()
        assert whole.dtype == entry.dtype
        assert whole.shape == entry.shape
        assert b"".join(bytes(chunk) for chunk in chunks(entry)) == whole.tobytes()
        assert np.array_equal(np.concatenate([entry.read(i, i + 1) for i in range(entry.shape[0])]), whole)
    assert (rotated.files.read_float32(layout.FINAL_NORM) == 1).all()


def test_what_the_rotation_says_it_leaves_alone_is_left_alone(make_checkpoint):
    reader = CheckpointReader(make_checkpoint())
    for heads in (True, False):
        rotate = Rotate(heads=heads)
        one, other = reader.block(0), rotate(reader).block(0)
        changed = {name for name in one.tensors if not np.array_equal(one[name], other[name])}
        assert changed == {name for name in one.tensors if rotate.changes(name)}


def test_a_model_whose_size_has_no_hadamard_matrix_is_refused(make_checkpoint):
    reader = CheckpointReader(make_checkpoint(hidden_size=92, num_attention_heads=23, num_key_value_heads=23))
    with pytest.raises(RecipeError, match="no Hadamard matrix of order 92"):
        Rotate()(reader)


@pytest.mark.parametrize(("settings", "said"), [({"seed": -1}, "rotate.seed"), ({"heads": 1}, "rotate.heads: got 1")])
def test_senseless_settings_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        Rotate(**settings)


@pytest.mark.parametrize("bias", [True, False])
def test_a_block_with_a_matrix_in_front_of_down_proj_is_the_same_function(random_block, forward, bias):
    """What down_proj reads, times H and a power of two, is what the rotated weight is for."""
    block = random_block(bias=bias)
    hidden = np.random.default_rng(0).normal(size=(7, 24))
    stream, inner = Rotation(24, 5), Rotation(40, 5)
    plain, online = rotate_block(block, stream, None), rotate_block(block, stream, None, inner)
    read = forward(plain, stream.forward(hidden))[1]["mlp_hidden"]
    signed = forward(online, stream.forward(hidden))[1]["mlp_hidden"]
    np.testing.assert_allclose(signed, read * inner.signs, rtol=1e-6, atol=1e-6)
    wanted = read @ plain["mlp.down_proj.weight"].astype(np.float64).T
    read_online = signed @ hadamard_matrix(40).astype(np.float64) / 8  # 8 is the power of two next to the root of 40
    got = read_online @ online["mlp.down_proj.weight"].astype(np.float64).T
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()
