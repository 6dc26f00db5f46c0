"""One quantization in every format: the same bytes whichever way it is reached, the same logits; also other programs'."""

import importlib.util
import json
import os
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ASCEND_FILE
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader, open_checkpoint
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.estimate import stored_bytes
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.report import Progress
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.recipe.scheme import W8A8, W8A8_STATIC
from tests.conftest import MINI, ROOT, token_data
from tools.goldens import formats as tool

GOLDEN = ROOT / "tests/golden/formats"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ids():
    return token_data("validation", 1).sequences[0].tolist()[:80]


def float_twin(directory, folder):
    """A float checkpoint with the quantized one's dequantized weights."""
    reader = QuantizedReader(directory)
    tensors = {name: reader.files.read_float32(name) for name in layout.outer_shapes(reader.config)}
    for index in range(reader.config.num_hidden_layers):
        rounded = reader.rounded_block(index)
        prefix = layout.block_prefix(index)
        tensors.update({prefix + name: value for name, value in rounded.kept.items()})
        tensors.update({f"{prefix}{site}.weight": linear.weight.dequantize() for site, linear in rounded.linears.items()})
    folder.mkdir()
    raw = {key: value for key, value in reader.config.raw.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def unpacked(name, folder):
    """A golden as the directory it was."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        values = dict(archive)
    folder.mkdir()
    tensors = {key.removeprefix("tensor/"): value for key, value in values.items() if key.startswith("tensor/")}
    save_file(tensors, folder / "model.safetensors")
    for key in values:
        if key.startswith("json/"):
            (folder / key.removeprefix("json/")).write_text(str(values[key]))
    return folder, values


@pytest.mark.parametrize("recipe", ["w8a8_rtn", "w4a8_g128_rtn"])
def test_quantizing_into_a_format_is_exporting_into_it_byte_for_byte(recipe, tmp_path):
    chosen = load_recipe(find_recipe(recipe))
    source = CheckpointReader(MINI)
    for name, each in FORMATS.items():
        quantize(source, chosen, tmp_path / name, stored_as=each)
        size = stored_bytes(source, chosen, chosen.plan(source.config), each)
        assert size == QuantizedReader(tmp_path / name).files.nbytes  # what --dry-run tells
    for start in FORMATS:
        for end in FORMATS:
            export(QuantizedReader(tmp_path / start), FORMATS[end], tmp_path / "out")
            assert contents(tmp_path / "out") == contents(tmp_path / end), (start, end)
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8_static", pytest.param("w4a8_g128", marks=pytest.mark.slow)])
def test_there_and_back_is_the_same_bytes_and_each_stop_is_sound(recipe, quantized, tmp_path):
    start = quantized(recipe)
    for name in ("ascend", "compressed-tensors"):
        export(QuantizedReader(start), FORMATS[name], tmp_path / name)
        found = verify(tmp_path / name, CheckpointReader(MINI))
        assert (found.faults, found.layers) == ((), 28)
        assert [note for note in found.notes if "'gptq' moves weights further" not in note] == []
        assert len(found.notes) == 1
    export(QuantizedReader(tmp_path / "ascend"), FORMATS["compressed-tensors"], tmp_path / "across")
    assert contents(tmp_path / "across") == contents(tmp_path / "compressed-tensors")
    export(QuantizedReader(tmp_path / "across"), FORMATS["mindformers"], tmp_path / "back")
    assert contents(tmp_path / "back") == contents(start)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("w8a8_static", "ascend"), pytest.param("w4a8_g128", "compressed-tensors", marks=pytest.mark.slow)],
)
def test_another_format_is_served_with_the_same_logits(recipe, name, quantized, tmp_path):
    export(QuantizedReader(quantized(recipe)), FORMATS[name], tmp_path / "out")
    wanted = load(quantized(recipe), kv_cache_tokens=128).logits(ids())
    np.testing.assert_array_equal(load(tmp_path / "out", kv_cache_tokens=128).logits(ids()), wanted)


def test_a_run_begun_in_one_format_is_not_resumed_in_another(tmp_path):
    chosen = load_recipe(find_recipe("w8a8_rtn"))

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(CheckpointReader(MINI), chosen, tmp_path, stored_as=FORMATS["ascend"], progress=Progress(on_block=stop))
    with pytest.raises(OutputError, match="begun with another format"):
        quantize(CheckpointReader(MINI), chosen, tmp_path, resume=True)


def test_an_export_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, quantized):
    class Stopped(Exception):
        pass

    def stop(index):
        if index == 1:
            raise Stopped

    reader = QuantizedReader(quantized("w8a8"))
    export(reader, FORMATS["ascend"], tmp_path / "whole")
    with pytest.raises(Stopped):
        export(reader, FORMATS["ascend"], tmp_path / "out", on_block=stop)
    assert not (tmp_path / "out/config.json").exists()
    export(reader, FORMATS["ascend"], tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- code that no one here wrote ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [pytest.param("w8a8_rtn", marks=pytest.mark.slow), "w4a8_g128_rtn"])
def test_transformers_with_compressed_tensors_loads_the_same_weights(recipe, tmp_path):
    """Its logits, activations left in float, are those of our network on our dequantized weights."""
    with np.load(GOLDEN / "compressed_tensors.npz") as archive:
        golden = dict(archive)
    chosen, stored_as = load_recipe(find_recipe(recipe)), FORMATS["compressed-tensors"]
    quantize(CheckpointReader(MINI), chosen, tmp_path / "out", stored_as=stored_as)

    def weights(text):
        return {line for line in text.splitlines() if line.endswith(".safetensors")}

    loaded = weights(str(golden[f"sha256_{recipe}"]))
    assert len(loaded) == 5
    assert weights((tmp_path / "out/SHA256SUMS").read_text()) == loaded
    model = load(float_twin(tmp_path / "out", tmp_path / "float"), kv_cache_tokens=64)
    assert np.abs(model.logits(golden["ids"].tolist()) - golden[f"logits_{recipe}"]).max() < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "llmcompressor_w8a8",
        "msmodelslim_w8a8",
        pytest.param("msmodelslim_w8a8_dynamic", marks=pytest.mark.slow),
        pytest.param("msmodelslim_w4a8_dynamic", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_msmodelslim_or_llm_compressor_loads_and_generates(name, tmp_path):
    directory, _ = unpacked(name, tmp_path / "theirs")
    model = load(directory, kv_cache_tokens=128)
    prompt = [1, 40, 7, 62, 33, 18, 25, 90]
    (answer,) = model.generate([prompt], max_new_tokens=8)
    whole = [*prompt, *answer.token_ids]
    assert model.logits(whole[:-1]).argmax(1).tolist()[len(prompt) - 1 :] == list(answer.token_ids)  # greedy
    assert len(answer.token_ids) == 8 or answer.finish_reason == "eos"
    wanted = load(float_twin(directory, tmp_path / "float"), kv_cache_tokens=128).logits(prompt)
    got = model.logits(prompt)
    assert 0 < np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted)  # of rounding activations to int8


def test_a_zero_point_is_served_and_compared_with(tmp_path):
    """The comparison runs in float32 values, the served layers in integers: perplexity is the same."""
    directory, _ = unpacked("msmodelslim_w8a8", tmp_path / "theirs")
    reader = QuantizedReader(directory)
    assert any(linear.input_offset for linear in reader.rounded_block(0).linears.values())
    export(reader, FORMATS["mindformers"], tmp_path / "out")
    ids = np.array([1, 40, 7, 33, 62, 18, 9, 70, 21, 5, 90, 11], np.int32)
    served = load(directory, kv_cache_tokens=64).logits(ids[:-1].tolist())
    np.testing.assert_array_equal(load(tmp_path / "out", kv_cache_tokens=64).logits(ids[:-1].tolist()), served)
    twin = float_twin(directory, tmp_path / "float")
    runtime.start("cpu", "graph")
    compared = compare(twin, directory, [ids])
    assert compared.ppl_quantized == pytest.approx(perplexity(served, ids), rel=1e-5)
    assert abs(compared.ppl_reference - compared.ppl_quantized) > 1e-3  # rounding is seen at that precision


def perplexity(logits, ids):
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(ids) - 1), ids[1:]]
    return np.exp((np.log(np.exp(logits).sum(1)) - own).mean())


@pytest.mark.parametrize("recipe", [pytest.param("w8a8", marks=pytest.mark.slow), "w8a8_static"])
def test_mindformers_own_lookup_and_linear_methods_and_loader_give_our_logits(recipe, quantized, monkeypatch):
    """Its GoldenStickConfig on our description (the first key that contains a layer's name decides), its create_weights and
    weight loaders, its load_weights: all that is ours is the CPU's `apply` of the two methods, in plain operators."""
    monkeypatch.setenv("MS_PANGU_QUANT_KERNELS", "off")
    from mindformers.parallel_core.inference.model_utils import InferModelMixin
    from mindformers.parallel_core.inference.quantization.golden_stick import config as golden_stick
    from mindformers.parallel_core.inference.tensor_parallel.layers import LinearBase

    from ms_pangu_quant.backends import current_backend
    from ms_pangu_quant.checkpoint.config import QUANTIZATION_FILE
    from ms_pangu_quant.network.pangu import WEIGHT_MAPPING, PanguEmbeddedConfig, PanguEmbeddedForCausalLM

    directory = quantized(recipe)
    ours = load(directory, kv_cache_tokens=512)
    raw = json.loads((directory / "config.json").read_text())
    description = json.loads((directory / QUANTIZATION_FILE).read_text())
    methods = {
        "W8A8": current_backend().linear_methods[W8A8_STATIC],
        "W8A8_DYNAMIC": current_backend().linear_methods[W8A8],
    }
    for word, method in methods.items():
        assert issubclass(method, golden_stick.QUANTIZATION_METHOD_MAPPING[word])
        assert method.create_weights is golden_stick.QUANTIZATION_METHOD_MAPPING[word].create_weights
        monkeypatch.setitem(golden_stick.QUANTIZATION_METHOD_MAPPING, word, method)
    settings = {
        **raw["quantization_config"],
        **description,
        "weight_mapping": WEIGHT_MAPPING,
        "quantization": "golden-stick",
    }
    dtypes = ("compute_dtype", "params_dtype", "layernorm_compute_dtype", "rotary_dtype")
    with runtime.quiet():
        quant_config = golden_stick.GoldenStickConfig.from_config(settings)
        config = PanguEmbeddedConfig(
            **raw, num_blocks=32, block_size=16, position_embedding_type="rope", **dict.fromkeys(dtypes, "float32")
        )
        network = PanguEmbeddedForCausalLM(config, quant_config)
        InferModelMixin.load_weights(network, str(directory))
    word = word_of(QuantizedReader(directory).plan.blocks[0].scheme(layout.Q_PROJ))
    used = [type(cell.quant_method) for _, cell in network.model.decoder.cells_and_names() if isinstance(cell, LinearBase)]
    assert used == [methods[word]] * (4 * raw["num_hidden_layers"])
    network.set_train(False)
    network.set_dynamic_inputs()
    wanted = ours.logits(ids())
    kept, ours.network = ours.network, network
    try:
        np.testing.assert_array_equal(ours.logits(ids()), wanted)
    finally:
        ours.network = kept


def mindformers_on_msmodelslims_layout(directory):
    """MindFormers' own network with its own linear methods, loaded by its own loader from an `ascend` directory."""
    from mindformers.parallel_core.inference.model_utils import InferModelMixin
    from mindformers.parallel_core.inference.quantization.golden_stick.config import GoldenStickConfig

    from ms_pangu_quant.network.pangu import WEIGHT_MAPPING, PanguEmbeddedConfig, PanguEmbeddedForCausalLM

    raw, description = (json.loads((directory / name).read_text()) for name in ("config.json", ASCEND_FILE))
    dtypes = ("compute_dtype", "params_dtype", "layernorm_compute_dtype", "rotary_dtype")
    with runtime.quiet():
        settings = GoldenStickConfig.from_config(
            {**description, "weight_mapping": WEIGHT_MAPPING, "quantization": "ascend"}
        )
        config = PanguEmbeddedConfig(
            **raw, num_blocks=32, block_size=16, position_embedding_type="rope", **dict.fromkeys(dtypes, "float32")
        )
        network = PanguEmbeddedForCausalLM(config, settings)
        InferModelMixin.load_weights(network, str(directory))
    return network


@pytest.mark.slow
def test_mindformers_adds_the_bias_of_msmodelslims_static_layers_twice_as_the_table_says(quantized, tmp_path):
    """What its A8W8LinearMethod hands to QuantV2 and QuantBatchMatmul, in their formulas, and the bias that it adds."""
    runtime.start("cpu", "graph")
    export(QuantizedReader(quantized("w8a8_static")), FORMATS["ascend"], tmp_path / "out")
    network = mindformers_on_msmodelslims_layout(tmp_path / "out")
    block = QuantizedReader(tmp_path / "out").rounded_block(0)
    layer, ours = network.model.decoder.layers[0].self_attention.linear_proj, block.linears[layout.O_PROJ.name]
    x = np.random.default_rng(0).uniform(-1, 1, (5, ours.weight.codes.shape[1])).astype(np.float32)
    factor = layer.input_scale.float().asnumpy()
    assert factor == ours.input_scale  # it is made in bfloat16, from the step in bfloat16
    codes = np.clip(np.rint(x * factor), -128, 127)
    made = (codes @ layer.weight.asnumpy().T.astype(np.float64) + layer.quant_bias.asnumpy()) * layer.deq_scale.asnumpy()
    bias = block.kept[f"{layout.O_PROJ.name}.bias"]
    np.testing.assert_array_equal(layer.bias.asnumpy(), bias)
    wanted = codes / factor @ ours.weight.dequantize().T + bias
    np.testing.assert_allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(bias).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.slow
def test_mindformers_does_not_load_msmodelslims_dynamic_q_k_and_v_as_the_table_says(quantized, tmp_path):
    runtime.start("cpu", "graph")
    export(QuantizedReader(quantized("w8a8")), FORMATS["ascend"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"could not broadcast input array from shape \(128,1\) into shape \(128,\)"):
        mindformers_on_msmodelslims_layout(tmp_path / "out")


def test_mindformers_refuses_dense_w4a8_as_the_table_says():
    from mindformers.parallel_core.inference.quantization.golden_stick.a8dynw4 import A8W4DynamicLinearMethod
    from mindformers.parallel_core.inference.quantization.golden_stick.config import GoldenStickConfig

    runtime.start("cpu", "graph")
    settings = GoldenStickConfig({"weight_mapping": [], "quantization": "golden-stick", "group_size": 128})
    with pytest.raises(ValueError, match="only support for MOE"):
        A8W4DynamicLinearMethod(settings).create_weights(None, 256, [256], "float32")


# --- the command line -----------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    """(exit code, standard output, standard error)"""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_export_refuses_what_no_program_computes_and_says_what_to_use(quantized, tmp_path, capsys):
    arguments = ("export", quantized("w4a8_g128"), "--format", "ascend", "--output", tmp_path / "out")
    code, _, said = command(capsys, *arguments)
    assert code == 2
    assert "the layer's bias is not added" in said
    assert "use --format compressed-tensors or mindformers" in said
    assert not (tmp_path / "out").exists()
    code, said, _ = command(capsys, *arguments, "--allow-unserved")
    assert code == 0
    assert "mindformers -> ascend" in said


def test_quantize_refuses_it_before_it_begins(tmp_path, capsys):
    code, _, said = command(
        capsys, "quantize", MINI, "--recipe", "w4a8_rtn", "--format", "ascend", "--output", tmp_path / "out"
    )
    assert code == 2
    assert "group_size 0" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gguf", "Ascend"])
def test_an_unknown_format_is_refused_naming_the_known_ones(name, quantized, tmp_path, capsys):
    code, _, said = command(capsys, "export", quantized("w8a8"), "--format", name, "--output", tmp_path / "out")
    assert code == 2
    assert "wanted one of mindformers, ascend, compressed-tensors" in said


def test_a_float_checkpoint_is_not_exported_and_has_no_servable_scheme(tmp_path, capsys):
    for arguments in (
        ("export", MINI, "--format", "ascend", "--output", tmp_path / "out"),
        ("inspect", MINI, "--servable"),
    ):
        code, _, said = command(capsys, *arguments)
        assert code == 2
        assert "is a float checkpoint" in said


def test_inspect_tells_who_serves_it(quantized, capsys):
    code, said, _ = command(capsys, "inspect", quantized("w8a8_static"), "--servable", "--json")
    rows = json.loads(said)["rows"]
    assert code == 0
    found = {(row["format"], row["consumer"]): row["verdict"] for row in rows}
    assert found["mindformers", "MindFormers"] == "integer GEMM"
    assert found["ascend", "MindFormers"] == "loads it wrongly"  # it would add the bias twice
    assert all(row["source"] for row in rows)
    code, said, _ = command(capsys, "inspect", quantized("w8a8_static"), "--servable")
    assert code == 0
    assert "vllm-ascend" in said


def test_verify_exits_with_2_and_a_line_for_each_fault(quantized, tmp_path, capsys):
    code, said, _ = command(capsys, "verify", quantized("w8a8"), "--against", MINI)
    assert (code, len(said.splitlines())) == (0, 1)
    broken = shutil.copytree(quantized("w8a8"), tmp_path / "broken")
    (broken / "tokenizer.model").write_bytes(b"another")
    (broken / "generation_config.json").unlink()
    code, said, _ = command(capsys, "verify", broken)
    assert code == 2
    assert len(said.splitlines()) == 2
    assert "tokenizer.model: is not the file that was written" in said
    assert "generation_config.json: is missing" in said


# --- with the library itself ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8_static", "w4a8_g128"])
def test_transformers_with_rounded_activations_agrees_with_ours(recipe, quantized, tmp_path):
    """Needs an interpreter with compressed-tensors and transformers: this one, or PANGU_QUANT_PEERS_PYTHON."""
    python = os.environ.get("PANGU_QUANT_PEERS_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; set PANGU_QUANT_PEERS_PYTHON to a Python that has it")
    export(QuantizedReader(quantized(recipe)), FORMATS["compressed-tensors"], tmp_path / "out")
    ours = load(tmp_path / "out", kv_cache_tokens=128).logits(ids())
    reference = load(MINI, kv_cache_tokens=128).logits(ids())
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(tool.as_llama(config, biases=config["bias"])))
    np.save(tmp_path / "ids.npy", np.array(ids(), np.int32))
    program = tool.TRANSFORMERS.replace("model.apply(disable_quantization)", "")
    values = {"DIRECTORY": tmp_path / "out", "IDS": tmp_path / "ids.npy", "OUTPUT": tmp_path / "logits.npy"}
    tool.run(tool.python_command(python, program, **values))
    theirs = np.load(tmp_path / "logits.npy")
    spread = float(ours.std())
    difference, cost = float(np.abs(theirs - ours).mean()), float(np.abs(ours - reference).mean())
    print(
        f"{recipe}: mean |theirs - ours| {difference / spread:.4f} of the logits' spread, quantization {cost / spread:.4f}"
    )
    # With static scales the grids are the same. Per token its grid is absmax/127.5 where ours is /127: codes differ.
    assert difference < (1.5 if recipe == "w8a8" else 0.3) * cost
    assert (theirs.argmax(1) == ours.argmax(1)).mean() >= 0.97


def test_open_checkpoint_knows_every_format_by_its_files(quantized, tmp_path):
    for name, each in FORMATS.items():
        folder = tmp_path / f"surely-not-{name}"
        export(QuantizedReader(quantized("w8a8")), each, folder)
        reader = open_checkpoint(folder)
        assert isinstance(reader, QuantizedReader)
        assert reader.format is each
