"""The cells with kernels against the cells of plain operators, in graph mode with dynamic shapes and in PyNative."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ms_pangu_quant.errors import BackendError, RequestError
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.kernels.library import SETTING, library
from ms_pangu_quant.network import runtime
from ms_pangu_quant.recipe.scheme import W4A8, W8A8, W8A8_STATIC
from tests.conftest import MINI, golden, rounded_as_told

if library() is None:
    pytest.skip("no C++ compiler, or kernels switched off", allow_module_level=True)

ROWS = (1, 5, 37)
RECIPES = ("w8a8_static", "w4a8_g128", *(pytest.param(name, marks=pytest.mark.slow) for name in ("w8a8", "w4a8")))
# A Hadamard matrix in front of down_proj, for each linear method that may stand behind it.
ONLINE = {
    f"online {scheme}": f"why: A test.\nscheme: {scheme}\ntransforms: [{{rotate: {{online: true}}}}]\n"
    for scheme in ("w8a8", "w8a8_static", "w4a8_g128")
}


@pytest.fixture(scope="module")
def stored(quantized, tmp_path_factory):
    """A shipped recipe's name, or one of ONLINE -> the embedded checkpoint quantized with it."""
    online = rounded_as_told(tmp_path_factory.mktemp("online"), ONLINE.__getitem__, 4)
    return lambda name: online(name) if name in ONLINE else quantized(name)


class Layer:
    """What a linear method needs of a MindFormers layer."""

    def insert_param_to_cell(self, name, parameter):
        setattr(self, name, parameter)


def test_the_kernels_use_every_cpu_although_mindspore_sets_the_variable_that_says_one():
    import ctypes

    runtime.start()
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    assert getenv(b"OMP_NUM_THREADS") == b"1"  # if MindSpore no longer does, library.py need not look elsewhere
    assert library().threads == int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def linear_cell(methods, arithmetic, outputs, inputs, group, parameters):
    from mindspore import Tensor, nn

    method = methods[arithmetic](type("Config", (), {"full_config": {"group_size": group}, "is_modelslim": False})())
    layer = nn.Cell()
    method.create_weights(layer, inputs, [outputs], __import__("mindspore").float32)
    for name, value in parameters.items():
        parameter = getattr(layer, name)
        parameter.init_data()
        parameter.set_data(Tensor(value.copy()))
    method.process_weights_after_loading(layer)
    bias = Tensor(np.linspace(-1, 1, outputs, dtype=np.float32))

    class Cell(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.layer, self.method, self.bias = layer, method, bias

        def construct(self, x):
            return self.method.apply(self.layer, x, self.layer.weight, self.bias)

    return Cell()


def parameters(arithmetic, outputs, inputs, group, rng):
    from ms_pangu_quant.formats import packing

    if arithmetic == W4A8:
        codes = rng.integers(-8, 8, (outputs, inputs)).astype(np.int8)
        groups = inputs // group if group else 1
        scale = rng.uniform(0.1, 1, (outputs, groups)).astype(np.float32)
        return {"weight": packing.pack_offset_along_in(codes), "group_scale": scale}
    weight = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    scale = rng.uniform(0.1, 1, outputs).astype(np.float32)
    if arithmetic == W8A8:
        return {"weight": weight, "w_scale": scale}
    return {
        "weight": weight,
        "deq_scale": scale,
        "input_scale": np.full(inputs, 40, np.float32),
        "input_offset": np.zeros(inputs, np.int8),
        "quant_bias": rng.integers(-99, 99, outputs).astype(np.int32),
    }


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize(
    ("arithmetic", "group", "inputs"),
    [
        (W8A8_STATIC, 0, 1500),
        (W8A8, 0, 1500),
        (W8A8, 0, 30),
        (W4A8, 0, 1500),
        (W4A8, 128, 1536),
        (W4A8, 6, 66),
    ],
)
def test_a_linear_layer_has_the_bits_of_the_plain_operators(arithmetic, group, inputs, mode):
    runtime.start("cpu", mode)
    import mindspore as ms
    from mindspore import Tensor

    from ms_pangu_quant.backends import cpu, cpu_fused

    rng = np.random.default_rng(inputs)
    values = parameters(arithmetic, 70, inputs, group, rng)
    cells = [
        linear_cell(module.BACKEND.linear_methods, arithmetic, 70, inputs, group, values) for module in (cpu, cpu_fused)
    ]
    if mode == "graph":
        for cell in cells:
            cell.set_inputs(Tensor(shape=[None, inputs], dtype=ms.float32))
    for rows in ROWS:
        x = rng.normal(size=(rows, inputs)).astype(np.float32)
        x[rows // 2] *= 1e-3
        if rows == ROWS[1]:
            x[0], x[3, 7], x[4, 9] = 0, np.nan, np.inf
        plain, fused = (cell(Tensor(x)).asnumpy() for cell in cells)
        assert np.array_equal(plain, fused, equal_nan=True)
        assert np.isfinite(plain[:3]).all()
        if rows == ROWS[1]:
            assert np.isnan(plain[3:]).all()


@pytest.mark.parametrize("mode", ["graph", "pynative"])
@pytest.mark.parametrize("size", [48, 1536])
def test_a_hadamard_matrix_is_the_one_of_the_plain_operators_up_to_rounding(size, mode):
    runtime.start("cpu", mode)
    import mindspore as ms
    from mindspore import Tensor

    from ms_pangu_quant.backends import cpu, cpu_fused

    cells = [module.BACKEND.hadamard(size, ms.float32) for module in (cpu, cpu_fused)]
    if mode == "graph":
        for cell in cells:
            cell.set_inputs(Tensor(shape=[None, size], dtype=ms.float32))
    for rows in ROWS:
        x = np.random.default_rng(rows).normal(size=(rows, size)).astype(np.float32)
        plain, kernel = (cell(Tensor(x)).asnumpy() for cell in cells)
        assert np.abs(kernel - plain).max() <= 2e-6 * np.abs(plain).max()


@pytest.mark.parametrize("recipe", [*RECIPES, "online w8a8"])
def test_a_quantized_network_gives_the_logits_of_the_plain_operators(recipe, stored, monkeypatch):
    directory = stored(recipe)
    ids = golden("mini")["ids_0"].tolist()[:70]
    fused = load(directory, kv_cache_tokens=128).logits(ids)
    monkeypatch.setenv(SETTING, "off")
    plain_model = load(directory, kv_cache_tokens=128)
    assert plain_model.network.backend.mlp is None
    plain = plain_model.logits(ids)
    # Norm and attention round differently, which moves an int8 code now and then.
    assert np.abs(fused - plain).max() < 2e-2 * np.abs(plain).max()
    assert (fused.argmax(1) == plain.argmax(1)).mean() > 0.95


@pytest.mark.parametrize("recipe", [*RECIPES, *ONLINE])
def test_blocks_as_one_operator_have_the_bits_of_single_ones_and_of_their_cells(recipe, stored):
    joined, blocks, parts = (load(stored(recipe), kv_cache_tokens=256) for _ in range(3))
    layers = list(joined.network.model.decoder.layers)
    assert layers[0].run is not None
    assert [layer.joined for layer in layers] == [False] + [True] * (len(layers) - 1)
    for single, cells in zip(blocks.network.model.decoder.layers, parts.network.model.decoder.layers, strict=True):
        assert single.whole
        assert cells.whole
        single.run, single.joined, cells.whole = None, False, False
    prompts, tables = [list(range(3, 20)), [7], list(range(40, 80))], [[0, 1], [2], [3, 4, 5]]
    for pieces, contexts, phase in ((prompts, [0, 0, 0], "logits"), ([[9], [10], [11]], [17, 1, 40], "decode")):
        ours, single, cells = (model.forward(pieces, contexts, tables, phase=phase) for model in (joined, blocks, parts))
        assert np.array_equal(ours, single)
        assert np.array_equal(ours, cells)


@pytest.mark.parametrize("largest", [12, 11])
def test_a_core_too_large_for_the_kernel_is_multiplied_in_front_of_a_block_of_cells(largest, stored, monkeypatch):
    """768 = 12 * 64. What is not the kernel's order of sums moves an int8 code now and then."""
    from ms_pangu_quant.backends import cpu_fused

    ids = list(range(3, 60))
    wanted = load(stored("online w8a8"), kv_cache_tokens=64).logits(ids)
    monkeypatch.setattr(cpu_fused, "LARGEST_CORE", largest)
    model = load(stored("online w8a8"), kv_cache_tokens=64)
    assert {layer.whole for layer in model.network.model.decoder.layers} == {largest == 12}
    assert np.abs(model.logits(ids) - wanted).max() <= (largest == 11) * 2e-2 * np.abs(wanted).max()


def test_blocks_are_joined_between_the_layers_that_are_not_whole(quantized):
    model, untouched = (load(quantized("w8a8"), kv_cache_tokens=64) for _ in range(2))
    network = model.network
    from ms_pangu_quant.backends.cpu_block import join_blocks

    layers = list(network.model.decoder.layers)
    for layer in layers:
        layer.run, layer.joined = None, False
    middle = len(layers) // 2
    layers[middle].whole = False
    runs = join_blocks(layers)
    assert [blocks for _, blocks in runs] == [layers[:middle], layers[middle + 1 :]]
    assert [layer.run is not None for layer in layers] == [index in (0, middle + 1) for index in range(len(layers))]
    assert not layers[middle].joined
    for run, blocks in runs:
        run.point(blocks)
    assert np.array_equal(model.logits(list(range(3, 40))), untouched.logits(list(range(3, 40))))


def test_weights_loaded_again_are_those_that_are_computed_with(quantized):
    from ms_pangu_quant.formats.reader import open_checkpoint
    from ms_pangu_quant.network.weights import served_tensors

    first, second = quantized("paper_w4a8"), quantized("w4a8_rtn")  # of other ranges
    ids = list(range(3, 40))
    model = load(first, kv_cache_tokens=64)
    before = model.logits(ids)
    model.network.load_tensors(served_tensors(open_checkpoint(second), model.network.backend))
    after = model.logits(ids)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, load(second, kv_cache_tokens=64).logits(ids))


def test_blocks_without_weights_are_an_error_and_not_a_crash():
    from mindspore import Tensor

    from ms_pangu_quant.backends.cpu_operators import operator

    kernel = operator(library(), "PanguStack")
    x, index = Tensor(np.ones((1, 8), np.float32)), Tensor(np.zeros(1, np.int32))
    with pytest.raises(RuntimeError):
        kernel(x, x, x, index, index, index, index, Tensor(np.zeros((1, 40, 7), np.int64))).asnumpy()


def test_a_head_in_int8_has_the_integers_and_scales_of_the_definition():
    import ml_dtypes
    from mindspore import Tensor

    from ms_pangu_quant.backends.cpu_tables import HeadMethod

    rng = np.random.default_rng(5)
    stored = rng.normal(size=(130, 72)).astype(ml_dtypes.bfloat16)
    x = rng.normal(size=(3, 72)).astype(np.float32)
    method = HeadMethod(library(), rounded=True)
    layer = type("Layer", (), {"input_size": 72, "narrow": True, "weight": method.round(stored.view(np.uint16))})
    w = stored.astype(np.float32)
    scale = np.abs(w).max(1) / np.float32(127)
    bits = scale.view(np.uint32)  # a W8A8 scale is a bfloat16 value, rounded up
    scale = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    codes = np.clip(np.rint(w / scale[:, None]), -127, 127).astype(np.int64)
    token = np.abs(x).max(1) / np.float32(127)
    sums = np.rint(x / token[:, None]).astype(np.int64) @ codes.T
    wanted = sums.astype(np.float32) * (token[:, None] * scale)
    assert np.array_equal(method.apply(layer, Tensor(x)).asnumpy(), wanted)


def test_a_rounded_head_gives_nearly_the_logits_of_the_stored_one(quantized):
    ids, path = list(range(3, 40)), quantized("w8a8")
    whole = load(path, kv_cache_tokens=64).logits(ids)
    rounded = load(path, kv_cache_tokens=64, head="int8").logits(ids)
    assert 0 < np.linalg.norm(rounded - whole) < 0.02 * np.linalg.norm(whole)


def test_a_head_that_cannot_be_rounded_is_refused_and_not_left_as_it_is(quantized, monkeypatch):
    path = quantized("w8a8")
    for given, error, said in (
        ((path, "cpu", "int4"), RequestError, "got 'int4', wanted stored or int8"),
        ((MINI, "cpu", "int8"), RequestError, "is a float checkpoint"),
        ((path, "ascend", "int8"), RequestError, "only the CPU kernels"),
    ):
        with pytest.raises(error, match=said):
            load(given[0], given[1], head=given[2])
    monkeypatch.setenv(SETTING, "off")
    with pytest.raises(BackendError, match="no CPU kernels"):
        load(path, head="int8")


def test_a_batch_of_answers_has_the_tokens_of_each_alone(quantized):
    model = load(quantized("w8a8"), kv_cache_tokens=2048)
    prompts = [list(range(3, 3 + length)) for length in (1, 17, 40, 5)]
    together = model.generate(prompts, 12)
    for prompt, answer in zip(prompts, together, strict=True):
        assert model.generate([prompt], 12)[0].token_ids == answer.token_ids


def test_logits_of_a_token_do_not_depend_on_the_batch_to_the_last_bit(quantized):
    model = load(quantized("w4a8_g128"), kv_cache_tokens=2048)
    pieces = [list(range(3, 3 + length)) for length in (33, 1, 40)]
    tables = [[0, 1, 2], [3], [4, 5, 6]]
    together = model.forward(pieces, [0, 0, 0], tables, phase="logits")
    alone = [model.forward([piece], [0], [table], phase="logits") for piece, table in zip(pieces, tables, strict=True)]
    assert np.array_equal(together, np.concatenate(alone))


def test_an_operator_that_fails_says_so_instead_of_returning_noise():
    from mindspore import Tensor

    from ms_pangu_quant.network.batch import packed_inputs

    model = load(MINI, kv_cache_tokens=64)
    inputs = packed_inputs([2], [0], [[0]], 16, model.network.backend)
    inputs["batch_valid_length"] = Tensor(np.array([1], np.int32))  # two tokens of a sequence of one
    with pytest.raises(RuntimeError):
        model.network(Tensor(np.array([5, 6], np.int32)), *inputs.values()).asnumpy()
