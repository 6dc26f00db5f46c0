"""An int8 key/value cache in the network: the looking and the serving network agree, kernels and plain operators agree, and
nothing depends on batches or pieces; the Ascend graph holds the documented operators. No NPU kernel is run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ms_pangu_quant.calibration.statistics import NOTHING, Needs
from ms_pangu_quant.checkpoint.block import RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import BackendError, CheckpointError
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.inference.bench import cache_bytes
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.kernels.library import SETTING, library
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.estimate import stored_bytes
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.report import Progress
from ms_pangu_quant.quantizers.kv_cache import CacheGrid, Int8Cache, QuantizedCache, grid_of_range
from ms_pangu_quant.recipe.parse import load_recipe
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import INT8_CACHE
from tests.conftest import MINI, calibration, golden, rounded_as_told, token_data


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """scheme -> the embedded checkpoint, its layers in that scheme and its cache in int8, calibrated on a few chats."""
    return rounded_as_told(tmp_path_factory.mktemp("int8"), lambda scheme: f"scheme: {scheme}\nkv_cache: int8\n", 16)


@pytest.fixture(scope="module")
def served(stored):
    return load(stored("w8a8"), kv_cache_tokens=256)


def caches_of(model):
    parameters = model.network.model.parameters_and_names()
    return [each for name, each in parameters if name.endswith(("key_cache", "value_cache"))]


def log_softmax(x):
    x = x.astype(np.float64) - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_the_distributions_are_kept_and_the_streamed_comparison_is_the_served_models(stored):
    sequences = token_data("validation", 2).sequences
    runtime.start("cpu", "graph")
    found = compare(MINI, stored("float"), sequences)
    assert 0 < found.kl_mean < 1e-4
    models = [load(path, kv_cache_tokens=512) for path in (MINI, stored("float"))]
    kl = []
    for sequence in sequences:
        a, b = (log_softmax(model.logits(sequence[:-1].tolist())) for model in models)
        kl.append((np.exp(a) * (a - b)).sum(1))
    # A key between two codes may fall on either side, and so few texts have so little KL.
    assert found.kl_mean == pytest.approx(np.concatenate(kl).mean(), rel=0.2)


@pytest.mark.slow
def test_the_shipped_recipe_keeps_what_w8a8_keeps(quantized):
    sequences = token_data("validation", 120).sequences
    runtime.start("cpu", "graph")
    assert (
        compare(MINI, quantized("w8a8_kv8"), sequences).kl_mean < 1.3 * compare(MINI, quantized("w8a8"), sequences).kl_mean
    )


@pytest.mark.parametrize("mode", [pytest.param("graph", marks=pytest.mark.slow), "pynative"])
def test_the_kernel_gives_the_logits_of_the_plain_operators(mode, stored, monkeypatch):
    """On a float network, so that no other rounding hides a difference."""
    directory, ids = stored("float"), golden("mini")["ids_0"].tolist()[:40]
    logits = {}
    for setting in ("auto", "off"):
        monkeypatch.setenv(SETTING, setting)
        model = load(directory, "cpu", mode, kv_cache_tokens=64)
        assert {str(each.dtype) for each in caches_of(model)} == {"Int8"}
        prefill = model.logits(ids[:-2])
        steps = [model.forward([[token]], [38 + step], [[0, 1, 2]], phase="decode") for step, token in enumerate(ids[-2:])]
        logits[setting] = np.concatenate([prefill, *steps])
    monkeypatch.undo()
    library()
    # A key that lies between two codes may fall on either side when norm and rope round differently.
    difference = np.abs(logits["auto"] - logits["off"])
    assert difference.max() < 2e-2 * np.abs(logits["off"]).max()
    assert np.median(difference) < 1e-4 * np.abs(logits["off"]).max()


def test_what_lies_behind_the_cache_is_calibrated_behind_its_rounding():
    """Values on a grid so coarse that all of them are 0 make a mean that is 0, and o_proj's input with it."""
    runtime.start("cpu", "graph")
    from ms_pangu_quant.calibration.runner import BlockRunner, Hidden, Way

    reader = CheckpointReader(MINI)
    config, block, lengths = reader.config, reader.block(0), [9, 5]
    states = np.random.default_rng(0).normal(size=(14, config.hidden_size)).astype(np.float32)
    hidden, runner, floats = Hidden(states, lengths), BlockRunner(config, lengths), BlockRunner(config, lengths)
    keys, values = runner.observe_cache(RoundedBlock(block), hidden, NOTHING, "test")
    heads, shape = config.num_key_value_heads, (config.num_key_value_heads, config.head_dim)
    coarse = CacheGrid(np.full(shape, 1e30, np.float32), np.zeros(shape, np.int8))
    fine = Int8Cache().cache(keys, values, heads)

    def seen(cache):
        rounded, needs = RoundedBlock(block, cache=cache), Needs(data=True, gram=True, drift=True)
        ways = Way(runner, hidden, BlockPlan()), Way(floats, hidden)
        return runner.observe_input("attention_output", rounded, ways, needs, "test").absmax

    assert (seen(QuantizedCache(fine.key, coarse)) == 0).all()
    assert 0 < np.abs(seen(fine) - seen(None)).max() < 0.05 * seen(None).max()
    rounded, exact = (runner.advance(RoundedBlock(block, cache=cache), hidden).states for cache in (fine, None))
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_a_decoded_token_sees_what_a_prefilled_one_sees(served):
    model, ids = served, golden("mini")["ids_0"].tolist()[:70]
    whole = model.logits(ids)
    tables = [[4, 2, 9, 0, 7]]
    pieces = [
        model.forward([ids[:33]], [0], tables, phase="logits"),
        model.forward([ids[33:69]], [33], tables, phase="logits"),
    ]
    last = model.forward([ids[69:]], [69], tables, phase="decode")
    assert np.array_equal(np.concatenate([*pieces, last]), whole)


@pytest.mark.skipif(library() is None, reason="no C++ compiler, or kernels switched off")
def test_a_block_as_one_operator_has_the_bits_of_its_cells(served, stored):
    whole, parts = served, load(stored("w8a8"), kv_cache_tokens=256)
    for layer in parts.network.model.decoder.layers:
        assert layer.whole
        layer.whole = False
    prompts, tables = [list(range(3, 20)), [7], list(range(40, 80))], [[0, 1], [2], [3, 4, 5]]
    for pieces, contexts, phase in ((prompts, [0, 0, 0], "logits"), ([[9], [10], [11]], [17, 1, 40], "decode")):
        ours, theirs = (model.forward(pieces, contexts, tables, phase=phase) for model in (whole, parts))
        assert np.array_equal(ours, theirs)
    prompts = [list(range(3, 3 + length)) for length in (1, 17, 40)]
    together = whole.generate(prompts, 6)
    assert [whole.generate([prompt], 6)[0].token_ids for prompt in prompts] == [each.token_ids for each in together]


def test_the_cache_takes_a_quarter_of_float32s_bytes_and_commands_say_so(served, stored, capsys):
    sizes = [sum(each.nbytes for each in caches_of(model)) for model in (load(MINI, kv_cache_tokens=256), served)]
    assert sizes[0] == 4 * sizes[1]
    assert sizes[1] == cache_bytes(served)
    config = CheckpointReader(MINI).config
    assert main(["inspect", str(stored("w8a8")), "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["cache"]
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert cache == {
        "dtype": "int8",
        "bytes_per_token": token,
        "bytes_per_token_bfloat16": 2 * token,
        "zero_points": False,
        "scales_per_head": cache["scales_per_head"],
    }
    assert cache["scales_per_head"] > 1
    assert main(["inspect", str(stored("w8a8"))]) == 0
    assert f"keys and values cached in int8, {token:,} bytes a token" in " ".join(capsys.readouterr().out.split())


def test_what_is_stored_is_sound_and_has_the_predicted_size(stored):
    reader, chosen = CheckpointReader(MINI), load_recipe(stored("float").with_suffix(".yaml"))
    assert verify(stored("float"), reader).faults == ()
    assert stored_bytes(reader, chosen, chosen.plan(reader.config)) == QuantizedReader(stored("float")).files.nbytes


def test_a_directory_whose_layers_all_stay_float_is_a_quantized_one_all_the_same(stored, capsys):
    assert main(["bench", str(MINI), "--against", str(stored("float"))]) == 2
    assert "is quantized; wanted the float checkpoint" in capsys.readouterr().err.replace("\n", " ")
    if library() is not None:
        model = load(stored("float"), kv_cache_tokens=64, head="int8")
        assert str(model.network.model.output_layer.weight.dtype) == "Int8"


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_bytes(stored, tmp_path):
    class Stopped(Exception):
        pass

    def stop(report):
        if report.index == 1:
            raise Stopped

    reader, chosen = CheckpointReader(MINI), load_recipe(stored("float").with_suffix(".yaml"))
    with pytest.raises(Stopped):
        quantize(reader, chosen, tmp_path / "out", data=calibration(16), progress=Progress(on_block=stop))
    assert quantize(reader, chosen, tmp_path / "out", data=calibration(16), resume=True).resumed_at == 2
    for file in stored("float").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_network_with_a_float_cache_passes_over_the_scales_and_one_with_an_int8_cache_insists_on_them(stored):
    """The first is what vLLM-MindSpore builds, which allocates its caches itself."""
    runtime.start("cpu", "graph")
    from ms_pangu_quant.network.pangu import build_network
    from ms_pangu_quant.network.weights import served_tensors

    reader = QuantizedReader(stored("w8a8"))
    in_floats = Plan(tuple(replace(block, cache=None) for block in reader.plan.blocks))
    build_network(reader.config, in_floats, num_blocks=1).load_weights(str(reader.directory))
    network = build_network(reader.config, reader.plan, num_blocks=1)
    with pytest.raises(CheckpointError, match=r"core_attention\.cache_grid"):
        network.load_tensors(served_tensors(reader, network.backend))


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (4, 4), (2, 8), (3, 1)])
def test_each_rank_loads_the_grids_of_its_own_heads(heads, ranks):
    """More ranks than key heads hold copies: rank r of 8 has head r // 4 of 2, as MindFormers gives out their weights."""
    from mindspore import Parameter, Tensor

    from ms_pangu_quant.backends.cut import _cache_loader
    from ms_pangu_quant.formats.parameters import ArraySlice

    dim, grid = 5, np.arange(4 * heads * 5, dtype=np.float32).reshape(4, heads * 5)
    for rank in range(ranks):
        parameter = Parameter(Tensor(np.zeros((4, max(1, heads // ranks) * dim), np.float32)))
        _cache_loader(type("Group", (), {"rank": rank, "size": ranks}), dim)(parameter, ArraySlice(grid))
        mine = [head for head in range(heads) if rank in range(head * ranks // heads, max(1, (head + 1) * ranks // heads))]
        mine = mine if ranks >= heads else list(range(rank * heads // ranks, (rank + 1) * heads // ranks))
        assert np.array_equal(parameter.asnumpy(), grid.reshape(4, heads, dim)[:, mine].reshape(4, -1))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_ascend_graph_rounds_on_the_way_in_and_hands_the_scales_to_paged_attention(phase):
    runtime.start("cpu", "graph")
    from ms_pangu_quant.backends.ascend import BACKEND
    from ms_pangu_quant.network.graph import exported_operators
    from tests.network.test_ascend_graph import config_of

    config = config_of("1b")
    operators = exported_operators(config, Plan((BlockPlan(cache=INT8_CACHE),)), BACKEND, phase=phase)
    channels = config.num_key_value_heads * config.head_dim

    def of(kind):
        return [[str(each) for each in found.inputs] for found in operators if found.kind == kind]

    codes = f"int8[?, {channels}]"
    assert [inputs[:3] for inputs in of("QuantV2")] == [
        [f"bfloat16[?, {channels}]", f"bfloat16[{channels}]", f"int8[{channels}]"]
    ] * 2
    (written,) = of("ReshapeAndCache")
    assert written[:4] == [codes, codes, "int8[?, ?, ?, ?]", "int8[?, ?, ?, ?]"]
    if phase == "prefill":
        (attended,) = of("FlashAttentionScore")
        assert attended[1:3] == [f"bfloat16[?, {channels}]"] * 2
    else:
        (attended,) = of("PagedAttention")
        assert attended[1:3] == ["int8[?, ?, ?, ?]"] * 2
        assert [each for each in attended if each == f"float16[2, {channels}]"] == [f"float16[2, {channels}]"] * 2


def test_what_ascends_operators_are_given_is_the_grid_and_scales_they_cannot_hold_are_refused():
    runtime.start("cpu", "graph")
    from mindspore import Tensor

    from ms_pangu_quant.backends.ascend import Int8CacheAttention

    ends = np.random.default_rng(0).uniform(0.5, 9, (4, 2, 16)).astype(np.float32)
    cache = QuantizedCache(*(grid_of_range(-ends[i], ends[i + 1], symmetric=False) for i in (0, 2)))
    cell = Int8CacheAttention(head_num=4, head_dim=16, kv_head_num=2, pa_kv_head_num=2)
    cell.cache_grid.set_data(Tensor(cache.rows()))
    cell.process_grid_after_loading()
    x = np.random.default_rng(1).normal(size=(9, 2, 16)).astype(np.float32) * 3
    for place, (grid, factor, offset) in enumerate(
        ((cache.key, cell.key_factor, cell.key_offset), (cache.value, cell.value_factor, cell.value_offset))
    ):
        flat = x.reshape(9, -1)
        codes = np.clip(np.rint(flat * factor.float().asnumpy()) + offset.asnumpy(), -128, 127)
        assert np.abs(codes - grid.codes(x).reshape(9, -1)).max() <= 1  # the factor is a bfloat16 number there
        scale, shift = (each.asnumpy()[place].astype(np.float32) for each in (cell.antiquant_scale, cell.antiquant_offset))
        exact = grid.codes(x)
        assert np.array_equal((exact.reshape(9, -1) + shift) * scale, grid.values(exact).reshape(9, -1))
    rows = cache.rows()
    rows[0, 3] = 2.0**-30
    cell.cache_grid.set_data(Tensor(rows))
    with pytest.raises(BackendError, match=r"not float16 values.*serve this model with a float cache"):
        cell.process_grid_after_loading()
