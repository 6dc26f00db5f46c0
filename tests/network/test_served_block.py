"""A block run by itself during calibration is the served network's; float layers for many tokens are the plain layers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor

from ms_pangu_quant.backends import current_backend
from ms_pangu_quant.calibration import runner as running
from ms_pangu_quant.calibration.runner import BlockRunner, Hidden
from ms_pangu_quant.calibration.statistics import NOTHING
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.network.block import is_served
from ms_pangu_quant.quantizers.grid import QuantizedWeight
from ms_pangu_quant.quantizers.kv_cache import CacheGrid, QuantizedCache
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.scheme import INT8_CACHE, PRESETS
from tests.conftest import MINI, golden, rounded_as_told

if library() is None:
    pytest.skip("no C++ compiler, or kernels switched off", allow_module_level=True)

RECIPES = {
    "w8a8": "scheme: w8a8",
    "w8a8_static": "scheme: w8a8_static",
    "w4a8": "scheme: w4a8",
    "w4a8_g128": "scheme: w4a8_g128",
    "int8 cache": "scheme: w8a8\nkv_cache: int8",
    "online": "scheme: w8a8\ntransforms: [{rotate: {online: true}}]",
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
        rounded = reader.rounded_block(index)
        hidden = runner.advance(rounded, hidden)
        again = reader.rounded_block(index).linears
        for site, linear in rounded.linears.items():  # the kernels pack in place, and what is packed must not be these
            assert np.array_equal(linear.weight.codes, again[site].weight.codes)
            assert np.array_equal(linear.weight.scale, again[site].weight.scale)
    pieces = np.split(ids, np.cumsum(LENGTHS)[:-1])
    tables = [[0, 1, 2, 3, 4], [5], [6, 7, 8]]
    wanted = model.forward([piece.tolist() for piece in pieces], [0, 0, 0], tables, phase="logits")
    served = model.network.model
    streamed = served.output_layer(served.decoder.final_layernorm(Tensor(hidden.states))).asnumpy()
    assert np.array_equal(streamed.reshape(wanted.shape), wanted)


def test_starting_the_frameworks_keeps_no_variable_of_whoever_did():
    program = """
import weakref
from ms_pangu_quant.network import runtime

class Large: pass

def first():
    held = Large()
    runtime.ensure_started()
    return weakref.ref(held)

assert first()() is None
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_runner_gives_back_what_its_networks_hold(stored):
    reader = QuantizedReader(stored("w8a8"))
    _, hidden = begun(reader)
    with BlockRunner(reader.config, LENGTHS) as runner:
        behind = runner.advance(reader.rounded_block(0), hidden)
        runner.advance(RoundedBlock(CheckpointReader(MINI).block(0)), hidden)
        networks = [*runner._floats.values(), *(block.network for block in runner._served.values())]
        assert len(networks) == 2
    assert all(each.size == 1 for network in networks for each in network.get_parameters())
    with BlockRunner(reader.config, LENGTHS) as runner:  # and another one in the same process is as good
        assert np.array_equal(runner.advance(reader.rounded_block(0), hidden).states, behind.states)


@pytest.mark.parametrize("name", RECIPES)
def test_integers_and_floats_agree_up_to_rounding(name, stored, monkeypatch):
    reader = QuantizedReader(stored(name))
    _, hidden = begun(reader)
    rounded = reader.rounded_block(0)
    integers = BlockRunner(reader.config, LENGTHS).advance(rounded, hidden).states
    monkeypatch.setattr(running, "current_backend", lambda: replace(current_backend(), integer_kernels=False))
    runner = BlockRunner(reader.config, LENGTHS)
    floats = runner.advance(rounded, hidden).states
    assert not runner._served
    # A code moves now and then where a float sum in another order crosses the middle of two.
    difference = np.abs(integers - floats)
    assert np.median(difference) < 1e-5 * np.abs(floats).max()
    assert difference.max() < 1e-2 * np.abs(floats).max()


def test_a_block_whose_weights_made_room_for_others_is_computed_again(stored, monkeypatch):
    monkeypatch.setattr(running, "_SERVED_BLOCKS", 1)
    readers = [QuantizedReader(stored(name)) for name in ("w8a8", "w4a8")]
    _, hidden = begun(readers[0])
    runner = BlockRunner(readers[0].config, LENGTHS)
    first, second = (
        [runner.advance(reader.rounded_block(0), hidden).states for reader in readers for _ in range(2)] for _ in range(2)
    )
    assert len(runner._served) == 1
    assert np.array_equal(first, second)
    assert np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def linear(scheme, inputs, groups=1):
    return QuantizedLinear(scheme, QuantizedWeight(np.zeros((2, inputs), np.int8), np.ones((2, groups), np.float32)))


def plan_of(linears, *, int8_cache):
    grid = CacheGrid(np.ones((1, 2), np.float32), np.zeros((1, 2), np.int8))
    cache = QuantizedCache(grid, grid) if int8_cache else None
    return RoundedBlock(CheckpointReader(MINI).block(0), linears, cache).plan


def test_what_no_network_computes_is_not_served():
    w8a8, static, w4a8 = PRESETS["w8a8"], PRESETS["w8a8_static"], PRESETS["w4a8"]
    qkv = {site.name: linear(w8a8, 256) for site in layout.fused(layout.QKV)}
    down = {"mlp.down_proj": linear(w4a8.grouped(128), 768, 6)}
    floats = (None,) * 4
    assert not is_served(plan_of({}, int8_cache=True))
    assert not is_served(plan_of({"self_attn.q_proj": qkv["self_attn.q_proj"]}, int8_cache=False))
    assert not is_served(plan_of({**qkv, "self_attn.k_proj": linear(static, 256)}, int8_cache=False))
    whole = plan_of(qkv, int8_cache=True)
    assert whole == BlockPlan((w8a8,) * 3 + floats, INT8_CACHE)
    assert is_served(whole)
    assert whole.group_sizes == set()
    mixed = plan_of({**qkv, **down}, int8_cache=False)
    assert mixed == BlockPlan((w8a8,) * 3 + floats[1:] + (w4a8.grouped(128),))
    assert is_served(mixed)
    whole, halves, other = (linear(w4a8.grouped(size), 256, groups) for size, groups in ((0, 1), (128, 2), (64, 4)))
    same = plan_of({**down, "self_attn.o_proj": halves}, int8_cache=False)
    assert is_served(same)
    assert same.group_sizes == {128}
    assert not is_served(plan_of({**down, "self_attn.o_proj": whole}, int8_cache=False))
    assert not is_served(plan_of({**down, "self_attn.o_proj": other}, int8_cache=False))


def test_plain_operators_run_a_block_in_floats(stored, monkeypatch):
    reader = QuantizedReader(stored("w8a8"))
    _, hidden = begun(reader)
    kernels = BlockRunner(reader.config, LENGTHS).advance(reader.rounded_block(0), hidden).states
    monkeypatch.setenv("MS_PANGU_QUANT_KERNELS", "off")
    runner = BlockRunner(reader.config, LENGTHS)
    plain = runner.advance(reader.rounded_block(0), hidden).states
    assert not runner._served
    assert np.abs(kernels - plain).max() < 1e-2 * np.abs(plain).max()


def test_float_layers_for_many_tokens_are_the_layers(monkeypatch):
    reader = CheckpointReader(MINI)
    _, hidden = begun(reader)
    block = reader.block(0)
    before = {name: value.copy() for name, value in block.tensors.items()}
    packed = BlockRunner(reader.config, LENGTHS)
    ours, seen = packed.advance(RoundedBlock(block), hidden).states, packed.observe(block, hidden, NOTHING, "test")
    assert np.array_equal(seen[1].states, ours)
    assert all(np.array_equal(block.tensors[name], value) for name, value in before.items())  # nothing packed in place
    monkeypatch.setattr(running, "current_backend", lambda: replace(current_backend(), float_method=None))
    plain = BlockRunner(reader.config, LENGTHS).advance(RoundedBlock(block), hidden).states
    np.testing.assert_allclose(ours, plain, atol=1e-5 * np.abs(plain).max())


def test_float_layers_in_bfloat16_are_near_and_stand_for_no_quantized_layer(stored, monkeypatch):
    reader = CheckpointReader(MINI)
    _, hidden = begun(reader)
    block, other = reader.block(0), reader.block(1)
    exact, rough = (BlockRunner(reader.config, LENGTHS, bfloat16=each) for each in (False, True))
    outputs = [each.advance(RoundedBlock(block), hidden).states for each in (exact, rough)]
    added = np.abs(outputs[0] - hidden.states).max()
    assert np.abs(outputs[1] - outputs[0]).max() < 1e-2 * added
    assert np.array_equal(outputs[0], outputs[1]) != library().bfloat16
    # What is in the network is not loaded again, and another block is.
    assert not np.array_equal(rough.advance(RoundedBlock(other), hidden).states, outputs[1])
    for _ in range(2):
        assert np.array_equal(rough.advance(RoundedBlock(block), hidden).states, outputs[1])
    monkeypatch.setattr(running, "current_backend", lambda: replace(current_backend(), integer_kernels=False))
    rounded = QuantizedReader(stored("w8a8")).rounded_block(0)
    for _ in range(2):
        assert np.array_equal(*(each.advance(rounded, hidden).states for each in (exact, rough)))
