"""What each of two ranks loads of a quantized layer, put together again, is the layer. For Ascend, whose networks can be
built here and loaded, and not run; on the CPU tests/e2e/test_two_ranks.py runs them."""

import itertools

import numpy as np
import pytest
from mindformers.parallel_core.inference import parallel_state
from mindformers.parallel_core.inference.parallel_state import ProcessGroup

from ms_pangu_quant.backends.ascend import BACKEND
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.network.pangu import build_network
from ms_pangu_quant.network.weights import served_tensors
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import load_recipe
from tests.e2e.msrun_job import random_data
from tests.network.test_ascend_linear import layer_of, nibbles

HIDDEN, INNER, HEADS, KV_HEADS = 512, 1024, 8, 4
SHAPE = {
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
DIM = HIDDEN // HEADS
COLUMN = {  # cut along outputs -> outputs of the layers that are computed as one
    "self_attention.linear_qkv": (HIDDEN, KV_HEADS * DIM, KV_HEADS * DIM),
    "mlp.linear_fc1": (INNER, INNER),
}
ROW = ("self_attention.linear_proj", "mlp.linear_fc2")


def as_rank(monkeypatch, rank, size):
    """MindFormers' groups as in a job of `size` ranks; no message is sent while a network is built and loaded."""
    cut = ProcessGroup("of the test", [*range(size)], size, rank)
    cut._is_group_created = True
    monkeypatch.setattr(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", cut)
    for name in ("DATA_PARALLEL", "PIPELINE_MODEL_PARALLEL", "TENSOR_AND_DATA_PARALLEL", "MOE_EXPERT_MODEL_PARALLEL"):
        monkeypatch.setattr(parallel_state, f"_{name}_GROUP", ProcessGroup())
    monkeypatch.setattr(parallel_state, "_MOE_TENSOR_MODEL_PARALLEL_GROUP", ProcessGroup())
    monkeypatch.setattr(parallel_state, "_WORLD_GROUP", cut)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, write_checkpoint):
    """scheme -> reader of a checkpoint rounded with it."""
    folder, made = tmp_path_factory.mktemp("cut"), {}
    write_checkpoint(folder / "float", SHAPE, seed=5)

    def make(scheme):
        if scheme not in made:
            (folder / f"{scheme}.yaml").write_text(f"scheme: {scheme}\n")
            data = random_data(64, 3) if scheme.endswith("static") else None
            quantize(CheckpointReader(folder / "float"), load_recipe(folder / f"{scheme}.yaml"), folder / scheme, data=data)
            made[scheme] = QuantizedReader(folder / scheme)
        return made[scheme]

    return make


def network_of(reader, monkeypatch, rank, size):
    as_rank(monkeypatch, rank, size)
    network = build_network(reader.config, reader.plan, num_blocks=1, backend=BACKEND)
    network.load_tensors(served_tensors(reader, BACKEND))
    return network


def tensors_of(network, cell):
    """What the operators get, weights as codes [out, in], scales of groups as [out, groups]."""
    layer = layer_of(network, 0, cell)
    found = {}
    for name, value in layer.parameters_and_names():
        array = value.float().asnumpy() if str(value.dtype) == "BFloat16" else value.asnumpy()
        found[name.rpartition(".")[2]] = array
    if "gmm_bias" in found:
        found["weight"] = nibbles(found["weight"])[0].T
        found["group_scale"] = found["group_scale"][0].astype(np.uint32).view(np.float32).T
        found["gmm_bias"] = found["gmm_bias"][0]
    return found


def outputs_together(parts, outputs):
    """The rows of each rank, its slice of every fused layer one behind the other, in the whole layer's order."""
    edges = np.cumsum([0, *outputs]) // len(parts)
    slices = itertools.pairwise(edges)
    return np.concatenate([part[begin:end] for begin, end in slices for part in parts])


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8_static", "w4a8", "w4a8_g256"])
def test_two_ranks_hold_the_layer_between_them(scheme, stored, monkeypatch):
    reader = stored(scheme)
    whole = network_of(reader, monkeypatch, 0, 1)
    ranks = [network_of(reader, monkeypatch, rank, 2) for rank in range(2)]
    for cell, outputs in COLUMN.items():
        wanted, found = tensors_of(whole, cell), [tensors_of(rank, cell) for rank in ranks]
        for name, value in wanted.items():
            parts = [part[name] for part in found]
            if name in ("input_scale", "input_offset"):
                assert all(part.tobytes() == value.tobytes() for part in parts), (cell, name)
            else:
                np.testing.assert_array_equal(outputs_together(parts, outputs), value, f"{cell} {name}")
    for cell in ROW:
        wanted, found = tensors_of(whole, cell), [tensors_of(rank, cell) for rank in ranks]
        for name, value in wanted.items():
            parts = [part[name] for part in found]
            if name in ("weight", "group_scale"):
                np.testing.assert_array_equal(np.concatenate(parts, axis=1), value, f"{cell} {name}")
            elif name in ("input_scale", "input_offset"):
                np.testing.assert_array_equal(np.concatenate(parts), value, f"{cell} {name}")
            elif name == "gmm_bias":  # a sum over inputs
                np.testing.assert_allclose(sum(parts), value, rtol=1e-4, atol=1e-5)
            elif name == "quant_bias":
                np.testing.assert_array_equal(sum(parts), value)
            else:
                assert all(part.tobytes() == value.tobytes() for part in parts), (cell, name)
    assert {"weight", "bias"} <= set(tensors_of(whole, "self_attention.linear_proj"))


def test_what_the_operator_cannot_take_of_a_cut_layer_is_an_error(stored, monkeypatch):
    """1024 inputs of down_proj are 128 on each of 8 ranks."""
    reader = stored("w4a8_g256")
    with pytest.raises(BackendError, match="use fewer devices"):
        network_of(reader, monkeypatch, 0, 8)
