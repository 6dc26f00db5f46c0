"""A Hadamard matrix in front of down_proj that is computed when the model is run: the same function, no one misled."""

import functools
import json

import numpy as np
import pytest

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import BackendError, CheckpointError, RequestError
from ms_pangu_quant.formats.consumers import REFUSES, facts_of, rows_for
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.kernels.library import SETTING
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import load_recipe
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import PRESETS, W8A8
from ms_pangu_quant.transforms.hadamard import hadamard_factors, multiply
from tests.conftest import streamed_bar
from tools.dev import make_checkpoint

FLOAT = "scheme: float\ntransforms: [{rotate: {seed: 3, online: true}}]\n"
INT4 = "scheme: w4a8_g32\ntransforms: [{rotate: {online: true}}]\nrounding: {gptq: {correct: true, sweeps: 1}}\n"
IDS = np.random.default_rng(0).integers(3, 96, 40).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("online")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """128 inputs of down_proj are 64 * 2: more than one factor."""
    make_checkpoint.write_checkpoint(folder / "float", make_checkpoint.make_config("tiny"), seed=3, dtype="float32")
    return folder / "float"


@pytest.fixture(scope="module")
def made(folder, checkpoint):
    runtime.start("cpu", "graph")

    def make(name, text, **arguments):
        if not (folder / name).exists():
            (folder / f"{name}.yaml").write_text(text)
            quantize(CheckpointReader(checkpoint), load_recipe(folder / f"{name}.yaml"), folder / name, **arguments)
        return folder / name

    return make


@pytest.fixture(scope="module")
def int4(made):
    data = TokenData((IDS, IDS[::-1].copy()), sha256="d", truncated=0)
    return made("int4", INT4, data=data)


def log_probabilities(directory):
    x = load(directory, kv_cache_tokens=64).logits(IDS.tolist()).astype(np.float64)
    return x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kernels", "plain operators"])
def test_the_float_model_keeps_its_logits(made, checkpoint, plain, monkeypatch):
    if plain:
        monkeypatch.setenv(SETTING, "off")
    wanted, got = (load(path, kv_cache_tokens=64).logits(IDS.tolist()) for path in (checkpoint, made("rotated", FLOAT)))
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_without_the_matrix_the_model_is_another_one(made, checkpoint, folder):
    """What a program would compute that did not know of it; so none may take the directory for an ordinary one."""
    runtime.start("cpu", "graph")
    directory = made("rotated", FLOAT)
    path = directory / "config.json"
    whole = path.read_text()
    try:
        path.write_text(whole.replace("golden-stick-hadamard", "golden-stick"))
        assert compare(checkpoint, directory, [IDS]).kl_mean > 0.1
        path.write_text(whole.replace("golden-stick-hadamard", "golden-stick-of-another-kind"))
        with pytest.raises(CheckpointError, match="quantization_config is"):
            QuantizedReader(directory)
    finally:
        path.write_text(whole)


def test_a_quantized_one_is_served_as_it_was_compared(int4, checkpoint):
    a, b = log_probabilities(checkpoint), log_probabilities(int4)
    streamed = compare(checkpoint, int4, [np.append(IDS, 0).astype(np.int32)])
    assert (np.exp(a) * (a - b)).sum(1).mean() == pytest.approx(streamed.kl_mean, rel=streamed_bar())
    assert verify(int4, CheckpointReader(checkpoint)).faults == ()


@pytest.mark.parametrize("name", ["ascend", "compressed-tensors"])
def test_formats_whose_readers_do_not_know_it_refuse_it_before_anything_is_written(int4, folder, name):
    with pytest.raises(RequestError, match=f"the {name} format: no program that reads it computes the Hadamard"):
        export(QuantizedReader(int4), FORMATS[name], folder / f"as-{name}")
    assert not (folder / f"as-{name}").exists()
    reader = QuantizedReader(int4)
    (facts,) = facts_of(reader.config, reader.plan)
    verdicts = {row.consumer: row.verdict for row in rows_for("mindformers", facts)}
    assert {verdict for consumer, verdict in verdicts.items() if not consumer.startswith("ms_pangu_quant")} == {REFUSES}


def test_the_graph_of_an_npu_has_the_matrix_in_front_of_down_proj_alone(checkpoint):
    """One matmul for each factor, in bfloat16."""
    runtime.start("cpu", "graph")
    from ms_pangu_quant.backends.ascend import BACKEND
    from ms_pangu_quant.network.graph import exported_operators

    raw = json.loads((checkpoint / "config.json").read_text())
    raw = {**raw, "intermediate_size": 384, "quantization_config": {"quant_method": "golden-stick-hadamard"}}
    config = ModelConfig.from_dict(raw, where="test")
    one_layer = Plan(Plan.uniform(config, PRESETS["w8a8"]).blocks[:1])
    operators = exported_operators(config, one_layer, BACKEND, phase="decode")
    matmuls = [each for each in operators if "matmul" in each.kind.lower()]
    assert [each.kind for each in matmuls].count("QuantBatchMatmul") == 4
    turns = [each for each in matmuls if each.kind == "MatMul" and "output_layer" not in each.where]
    assert [str(each.inputs[0]) for each in turns] == [str(each.outputs[0]) for each in turns]
    assert [str(each.inputs[0]) for each in turns] == ["bfloat16[?, 12]", "bfloat16[?, 32]"]  # the factors are constants
    assert len({each.where for each in turns}) == 1


@pytest.mark.parametrize("size", [128, 384, 6144, 12800])
def test_the_matrix_is_exact_in_bfloat16_and_neither_swells_nor_shrinks(size):
    runtime.start("cpu", "graph")
    import mindspore as ms

    from ms_pangu_quant.backends.hadamard import Hadamard

    exact = functools.reduce(np.kron, [factor.asnumpy() for factor in Hadamard(size, ms.float32).factors[:2]])
    narrow = functools.reduce(
        np.kron, [factor.astype(ms.float32).asnumpy() for factor in Hadamard(size, ms.bfloat16).factors[:2]]
    )
    assert np.array_equal(narrow, exact)
    gain = np.prod([float(np.linalg.norm(factor.asnumpy()[0])) for factor in Hadamard(size, ms.float32).factors])
    assert 0.7 < gain < 1.42
    x = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    got = Hadamard(size, ms.float32)(ms.Tensor(x)).asnumpy()
    wanted = multiply(x.astype(np.float64), hadamard_factors(size)) * gain
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_device_that_holds_a_part_of_the_inputs_refuses():
    runtime.start("cpu", "graph")
    import mindspore as ms

    from ms_pangu_quant.backends.cpu import BACKEND
    from ms_pangu_quant.backends.hadamard import RotatedInput

    with pytest.raises(BackendError, match="in front of 128 inputs, of which one device holds 64"):
        RotatedInput(BACKEND.linear_methods[W8A8], BACKEND.hadamard(128, ms.float32)).create_weights(
            None, 64, [32], ms.float32
        )
