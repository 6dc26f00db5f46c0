"""The whole way on the embedded checkpoint: accuracy, resume, what is stored, and that MindFormers loads it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ms_pangu_quant.calibration.runner import BlockRunner
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline import loop
from ms_pangu_quant.pipeline.estimate import stored_bytes
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.report import Progress
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe, parse_recipe
from tests.conftest import ASSETS, MINI, calibration, streamed_bar, token_data
from tests.e2e.msrun_job import random_data
from tools.dev import make_checkpoint

RECIPES = ("w8a8", "w8a8_static", "w4a8_rtn", "w4a8_g128")  # one of each kind on disk


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def validation_kl(directory: Path) -> float:
    runtime.start("cpu", "graph")
    return compare(MINI, directory, token_data("validation", 120).sequences).kl_mean


# The recipes were chosen on other rows of this file (docs/recipes.md).
@pytest.mark.parametrize(
    ("recipe", "limit"),
    [("w8a8", 1e-4), ("w8a8_static", 3e-4), ("w4a8_g128", 0.9e-3), pytest.param("w4a8", 1.0e-3, marks=pytest.mark.slow)],
)
def test_the_recipes_keep_the_distributions(recipe, limit, quantized):
    assert validation_kl(quantized(recipe)) <= limit


@pytest.mark.parametrize(("naive", "smoothed"), [("w8a8_rtn", "w8a8"), ("w4a8_g128_rtn", "w4a8_g128")])
def test_naive_rounding_is_visibly_worse(naive, smoothed, quantized):
    assert validation_kl(quantized(naive)) > 10 * validation_kl(quantized(smoothed))


def test_the_streamed_comparison_equals_the_served_models_logits(quantized):
    sequences = token_data("validation", 4).sequences
    runtime.start("cpu", "graph")
    streamed = compare(MINI, quantized("w8a8"), sequences)
    models = [load(path, kv_cache_tokens=512) for path in (MINI, quantized("w8a8"))]
    kl, agree = [], []
    for sequence in sequences:
        a, b = (model.logits(sequence[:-1].tolist()).astype(np.float64) for model in models)
        a, b = (
            x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (a, b)
        )
        kl.append((np.exp(a) * (a - b)).sum(1))
        agree.append(a.argmax(1) == b.argmax(1))
    assert streamed.kl_mean == pytest.approx(np.concatenate(kl).mean(), rel=streamed_bar())
    # One token of these is 0.14 %, and a near tie can turn.
    assert streamed.top1_agreement == pytest.approx(np.concatenate(agree).mean(), abs=2e-2)
    assert streamed.tokens == sum(len(sequence) - 1 for sequence in sequences)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_size_is_known_beforehand(recipe, quantized):
    reader, chosen = CheckpointReader(MINI), load_recipe(find_recipe(recipe))
    chosen = chosen.decided("smooth_search", "") if chosen.choices else chosen  # as this model wants it
    assert stored_bytes(reader, chosen, chosen.plan(reader.config)) == QuantizedReader(quantized(recipe)).files.nbytes


@pytest.mark.parametrize(
    "recipe", ["w8a8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("w8a8_static", "w4a8_g128"))]
)
def test_a_run_interrupted_after_any_block_resumes_to_the_same_bytes(recipe, quantized, tmp_path, monkeypatch):
    """From the hidden states that it kept; where they are gone, by running through the finished blocks."""

    class Stopped(Exception):
        pass

    replayed = []
    replay = loop.replay_block
    monkeypatch.setattr(loop, "replay_block", lambda *given: [replayed.append(given[1]), replay(*given)])

    reader, chosen, data = CheckpointReader(MINI), load_recipe(find_recipe(recipe)), calibration(128)
    runtime.start("cpu", "graph")
    for stop_after, gone in ((2, False), (0, True)):
        output = tmp_path / f"stopped{stop_after}"

        def stop(report, last=stop_after):
            if report.index == last:
                raise Stopped

        with pytest.raises(Stopped):
            quantize(reader, chosen, output, data=data, progress=Progress(on_block=stop))
        assert not (output / "config.json").exists()
        (states,) = output.glob(".states-*")
        if gone:
            states.unlink()
        replayed.clear()
        result = quantize(reader, chosen, output, data=data, resume=True)
        assert result.resumed_at == stop_after + 1
        assert replayed == ([*range(stop_after + 1)] if gone else [])
        assert contents(output) == contents(quantized(recipe))


KILLED = """
import os, signal, sys
from ms_pangu_quant.__main__ import run
from ms_pangu_quant.checkpoint.writer import QuantizedWriter

write = QuantizedWriter.write_block

def killed(self, *arguments):
    write(self, *arguments)
    if self.finished == 2:
        os.kill(os.getpid(), signal.SIGKILL)

QuantizedWriter.write_block = killed
run(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bytes(quantized, tmp_path):
    output = tmp_path / "killed"
    arguments = ["quantize", MINI, "--recipe", "w8a8", "--calibration", ASSETS / "calibration.jsonl", "--output", output]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert (output / "model-00002-of-00005.safetensors").exists()
    assert not (output / "config.json").exists()
    command = [sys.executable, "-m", "ms_pangu_quant", *map(str, arguments)]
    subprocess.run([*command, "--resume"], check=True, capture_output=True, cwd=tmp_path)
    assert contents(output) == contents(quantized("w8a8"))
    assert [path.name for path in tmp_path.iterdir()] == ["killed"], "a stray file was left in the working directory"


CORRECTED = "scheme: w8a8\ntransforms: [smooth]\nrounding: {gptq: {correct: true}}\nkv_cache: int8\n"
ONCE_A_BLOCK = ((CheckpointReader, "block"), (BlockRunner, "observe_cache"), (BlockRunner, "observe"))


def recorded(method, calls):
    def record(self, *arguments, **options):
        calls.append((arguments, options))
        return method(self, *arguments, **options)

    return record


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Of a run that aims at the float model, with an int8 cache: (blocks, method -> arguments of each call of it)."""
    folder, asked = tmp_path_factory.mktemp("corrected"), {name: [] for _, name in ONCE_A_BLOCK}
    config = make_checkpoint.make_config("tiny")
    make_checkpoint.write_checkpoint(folder / "float", config, seed=1, dtype="float32")
    (folder / "corrected.yaml").write_text(CORRECTED)
    runtime.start("cpu", "graph")
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ONCE_A_BLOCK:
            patch.setattr(owner, name, recorded(getattr(owner, name), asked[name]))
        reader, data = CheckpointReader(folder / "float"), random_data(config["vocab_size"], 4)
        quantize(reader, load_recipe(folder / "corrected.yaml"), folder / "out", data=data)
    return config["num_hidden_layers"], asked


def test_both_models_are_advanced_with_one_reading_of_each_block(asked):
    blocks, calls = asked
    assert [index for (index,), _ in calls["block"]] == list(range(blocks))


def test_the_grids_of_the_cache_are_made_once_for_all_inputs_behind_it(asked):
    blocks, calls = asked
    assert [where for (*_, where, _), _ in calls["observe_cache"]] == [f"block {index}" for index in range(blocks)]


def test_an_output_that_nobody_wants_is_not_computed(asked):
    """The float block's output of the quantized stream: the float model's own is what the error is measured against."""
    blocks, calls = asked
    assert [options for _, options in calls["observe"]] == [{"output": False}] * blocks


@pytest.mark.parametrize("changed", ["recipe", "checkpoint", "calibration data"])
def test_a_run_begun_with_other_inputs_is_not_resumed(changed, tmp_path):
    checkpoint = shutil.copytree(MINI, tmp_path / "checkpoint", copy_function=shutil.copyfile)
    recipe, data = load_recipe(find_recipe("w8a8_rtn")), calibration(4)
    runtime.start("cpu", "graph")

    def stop(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(CheckpointReader(checkpoint), recipe, tmp_path / "out", data=data, progress=Progress(on_block=stop))
    if changed == "recipe":
        recipe = load_recipe(find_recipe("w4a8_rtn"))
    elif changed == "calibration data":
        data = calibration(5)
    else:
        raw = bytearray((checkpoint / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (checkpoint / "model.safetensors").write_bytes(raw)
    with pytest.raises(OutputError, match=changed):
        quantize(CheckpointReader(checkpoint), recipe, tmp_path / "out", data=data, resume=True)


def test_the_report_says_what_produced_the_checkpoint(quantized):
    report = json.loads((quantized("w8a8") / "quantization_report.json").read_text())
    assert report["calibration"]["sha256"] == calibration(128).sha256
    told, shipped = (parse_recipe(text, "") for text in (report["recipe"]["text"], find_recipe("w8a8").read_text()))
    assert told.digest == shipped.decided("smooth_search", "").digest
    assert report["fingerprint"]["transforms"].startswith("smooth_search: error 0.01")
    assert [block["index"] for block in report["blocks"]] == [0, 1, 2, 3]
    assert all(0 < block["output_error"] < 0.05 for block in report["blocks"])


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8_static"])
def test_mindformers_own_builder_and_loader_give_our_logits(recipe, quantized):
    from mindformers.parallel_core.inference.model_utils import InferModelMixin
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

    ours = load(quantized(recipe), kv_cache_tokens=512)
    raw = json.loads((quantized(recipe) / "config.json").read_text())
    with runtime.quiet():
        config = MindFormerRegister.get_cls(MindFormerModuleType.CONFIG, raw["model_type"])(
            **raw,
            quantization=raw["quantization_config"]["quant_method"],
            pretrained_model_dir=str(quantized(recipe)),
            num_blocks=32,
            block_size=16,
            position_embedding_type="rope",
            compute_dtype="float32",
            params_dtype="float32",
            layernorm_compute_dtype="float32",
            rotary_dtype="float32",
        )
        network = MindFormerRegister.get_cls(MindFormerModuleType.MODELS, raw["architectures"][0])(config)
        InferModelMixin.load_weights(network, str(quantized(recipe)))
    network.set_train(False)
    network.set_dynamic_inputs()
    ids = token_data("validation", 1).sequences[0].tolist()
    wanted = ours.logits(ids)
    ours.network, kept = network, ours.network
    try:
        assert np.array_equal(ours.logits(ids), wanted)
    finally:
        ours.network = kept


@pytest.mark.parametrize("recipe", RECIPES)
def test_graph_mode_equals_pynative(recipe, quantized):
    ids = token_data("validation", 1).sequences[0].tolist()[:60]
    graph = load(quantized(recipe), mode="graph", kv_cache_tokens=128).logits(ids)
    eager = load(quantized(recipe), mode="pynative", kv_cache_tokens=128).logits(ids)
    assert np.abs(graph - eager).max() < 2e-2 * np.abs(graph).max()
    assert (graph.argmax(1) == eager.argmax(1)).all()


def test_quantizing_from_python_prints_nothing_and_leaves_nothing_else(tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"token_ids": [5, 6, 7, 8]}\n{"token_ids": [9, 10, 11]}\n')
    code = f"""
import ms_pangu_quant
ms_pangu_quant.quantize({str(MINI)!r}, "w8a8", "out", calibration="ids.jsonl")
"""
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl", "out"]
