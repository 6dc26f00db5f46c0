"""A block run by itself during calibration is the served network's; float layers for many tokens are the plain layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor

from ms_pangu_quant.backends import current_backend
from ms_pangu_quant.backends.cpu_kernels.library import library
from ms_pangu_quant.calibration import stream
from ms_pangu_quant.calibration.stream import BlockRunner, Hidden
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.formats.linear import QuantizedLinear
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.network.block import BlockKind, block_kind
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from tests.conftest import MINI, golden, rounded_as_told

if library() is None:
    pytest.skip("no C++ compiler, or kernels switched off", allow_module_level=True)

RECIPES = {
    "w8a8": "scheme: w8a8",
    "w8a8_static": "scheme: w8a8_static",
    "w4a8": "scheme: w4a8",
    "w4a8_g128": "scheme: w4a8_g128",
    "int8 cache": "scheme: w8a8\nkv_cache: int8",
    "o_proj float": 'scheme: w4a8_g128\nlayers: {"*.o_proj": float}',
}
LENGTHS = [70, 1, 33]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """name in RECIPES -> the embedded checkpoint quantized so."""
    return rounded_as_told(tmp_path_factory.mktemp("served"), lambda name: f"why: A test.\n{RECIPES[name]}\n", 4)


def begun(reader):
    ids = np.concatenate([golden("mini")["ids_0"][:length] for length in LENGTHS]).astype(np.int32)
    return ids, Hidden(embedding_rows(reader.files, ids), LENGTHS)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "o_proj float"])
def test_the_streamed_blocks_have_the_bits_of_the_served_network(name, stored):
    reader, model = QuantizedReader(stored(name)), load(stored(name), kv_cache_tokens=256)
    ids, hidden = begun(reader)
    runner = BlockRunner(reader.config, LENGTHS)
    for index in range(reader.config.num_hidden_layers):
        block, linears = reader.block(index)
        hidden = runner.advance(block, linears, hidden, cache=reader.cache(index))
        again = reader.block(index)[1]
        for site, linear in linears.items():  # the kernels pack in place, and what is packed must not be these
            assert np.array_equal(linear.weight.codes, again[site].weight.codes)
            assert np.array_equal(linear.weight.scale, again[site].weight.scale)
    pieces = np.split(ids, np.cumsum(LENGTHS)[:-1])
    tables = [[0, 1, 2, 3, 4], [5], [6, 7, 8]]
    wanted = model.forward([piece.tolist() for piece in pieces], [0, 0, 0], tables, phase="logits")
    served = model.network.model
    streamed = served.output_layer(served.decoder.final_layernorm(Tensor(hidden.states))).asnumpy()
    assert np.array_equal(streamed.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("name", RECIPES)
def test_integers_and_floats_agree_up_to_rounding(name, stored, monkeypatch):
    reader = QuantizedReader(stored(name))
    _, hidden = begun(reader)
    (block, linears), cache = reader.block(0), reader.cache(0)
    integers = BlockRunner(reader.config, LENGTHS).advance(block, linears, hidden, cache=cache).states
    monkeypatch.setattr(stream, "current_backend", lambda: replace(current_backend(), integer_kernels=False))
    runner = BlockRunner(reader.config, LENGTHS)
    floats = runner.advance(block, linears, hidden, cache=cache).states
    assert not runner._served
    # A code moves now and then where a float sum in another order crosses the middle of two.
    difference = np.abs(integers - floats)
    assert np.median(difference) < 1e-5 * np.abs(floats).max()
    assert difference.max() < 1e-2 * np.abs(floats).max()


def test_a_block_whose_weights_made_room_for_others_is_computed_again(stored, monkeypatch):
    monkeypatch.setattr(stream, "_SERVED_BLOCKS", 1)
    readers = [QuantizedReader(stored(name)) for name in ("w8a8", "w4a8")]
    _, hidden = begun(readers[0])
    runner = BlockRunner(readers[0].config, LENGTHS)
    first, second = (
        [runner.advance(*reader.block(0), hidden).states for reader in readers for _ in range(2)] for _ in range(2)
    )
    assert len(runner._served) == 1
    assert np.array_equal(first, second)
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def linear(kind, inputs, groups=1):
    return QuantizedLinear(kind, QuantizedWeight(np.zeros((2, inputs), np.int8), np.ones((2, groups), np.float32)))


def test_what_no_network_computes_has_no_kind():
    qkv = {f"self_attn.{name}_proj": linear("W8A8_DYNAMIC", 256) for name in "qkv"}
    down = {"mlp.down_proj": linear("W4A8_DYNAMIC", 768, 6)}
    floats = ("FLOAT",) * 4
    assert block_kind({}, int8_cache=True) is None
    assert block_kind({"self_attn.q_proj": qkv["self_attn.q_proj"]}, int8_cache=False) is None
    assert block_kind({**qkv, "self_attn.k_proj": linear("W8A8", 256)}, int8_cache=False) is None
    assert block_kind(qkv, int8_cache=True) == BlockKind(("W8A8_DYNAMIC",) * 3 + floats, 0, int8_cache=True)
    mixed = BlockKind(("W8A8_DYNAMIC",) * 3 + floats[1:] + ("W4A8_DYNAMIC",), 128, int8_cache=False)
    assert block_kind({**qkv, **down}, int8_cache=False) == mixed
    whole, halves, other = (linear("W4A8_DYNAMIC", 256, groups) for groups in (1, 2, 4))
    assert block_kind({**down, "self_attn.o_proj": halves}, int8_cache=False).group_size == 128
    assert block_kind({**down, "self_attn.o_proj": whole}, int8_cache=False) is None
    assert block_kind({**down, "self_attn.o_proj": other}, int8_cache=False) is None


def test_plain_operators_run_a_block_in_floats(stored, monkeypatch):
    reader = QuantizedReader(stored("w8a8"))
    _, hidden = begun(reader)
    kernels = BlockRunner(reader.config, LENGTHS).advance(*reader.block(0), hidden).states
    monkeypatch.setenv("MS_PANGU_QUANT_KERNELS", "off")
    runner = BlockRunner(reader.config, LENGTHS)
    plain = runner.advance(*reader.block(0), hidden).states
    assert not runner._served
    assert np.abs(kernels - plain).max() < 1e-2 * np.abs(plain).max()


def test_float_layers_for_many_tokens_are_the_layers(monkeypatch):
    reader = CheckpointReader(MINI)
    _, hidden = begun(reader)
    block = reader.block(0)
    before = {name: value.copy() for name, value in block.tensors.items()}
    packed = BlockRunner(reader.config, LENGTHS)
    ours, seen = packed.advance(block, {}, hidden).states, packed.observe(block, hidden, gram=False, rows=0, where="test")
    assert np.array_equal(seen[1], ours)
    assert all(np.array_equal(block.tensors[name], value) for name, value in before.items())  # nothing packed in place
    monkeypatch.setattr(stream, "current_backend", lambda: replace(current_backend(), float_method=None))
    plain = BlockRunner(reader.config, LENGTHS).advance(block, {}, hidden).states
    np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max())
