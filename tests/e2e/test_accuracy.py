"""Rewrites and rounding on served models: rotations leave logits alone, recipes hold whatever the outliers."""

import dataclasses
import json
import shutil
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from safetensors.numpy import load_file, save_file

from ms_pangu_quant.calibration import runner as running
from ms_pangu_quant.calibration.runner import BlockRunner, Hidden, Way
from ms_pangu_quant.calibration.statistics import Needs
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.reader import CheckpointReader, embedding_rows
from ms_pangu_quant.cli.quantize import Shown
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.estimate import stored_bytes
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.pipeline.report import Progress
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from ms_pangu_quant.recipe.plan import BlockPlan
from ms_pangu_quant.recipe.scheme import PRESETS
from tests.conftest import MINI, TIED, calibration, token_data
from tools.dev import make_checkpoint

ROTATED_FLOAT = "scheme: float\ntransforms: [{rotate: {seed: 3}}]\n"
TINY = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 96}


@pytest.fixture
def recipe(tmp_path):
    def make(text):
        (tmp_path / "mine.yaml").write_text(text)
        return load_recipe(tmp_path / "mine.yaml")

    return make


@pytest.fixture
def rounded(tmp_path):
    """(checkpoint, recipe, chats) -> the quantized directory."""

    def make(checkpoint, chosen, chats=128):
        runtime.start("cpu", "graph")
        output = tmp_path / f"out-{checkpoint.name}"
        quantize(CheckpointReader(checkpoint), chosen, output, data=calibration(chats) if chats else None)
        return output

    return make


def rewrite(source, folder, change):
    """A copy of a checkpoint whose tensors `change` has edited in place, as float32."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_float_checkpoint_is_served_with_the_logits_of_the_original(tied, recipe, rounded, tmp_path):
    config = make_checkpoint.make_config("tiny", tie_word_embeddings=tied, **TINY)
    make_checkpoint.write_checkpoint(tmp_path / "float", config, seed=1, dtype="float32")
    made = rounded(tmp_path / "float", recipe(ROTATED_FLOAT), chats=0)
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    ids = np.random.default_rng(0).integers(0, 96, 40).tolist()
    wanted, got = (load(path, kv_cache_tokens=64).logits(ids) for path in (tmp_path / "float", made))
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_embedded_checkpoint_rotated_has_its_own_logits(recipe, rounded, tmp_path):
    """In float32, so that nothing but the rotation acts; its head is tied and becomes a tensor of its own."""
    wide = rewrite(TIED, tmp_path / "wide", lambda tensors: None)
    made = rounded(wide, recipe(ROTATED_FLOAT), chats=0)
    ids = token_data("validation", 1).sequences[0].tolist()
    wanted, got = (load(path, kv_cache_tokens=512).logits(ids) for path in (wide, made))
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.fixture
def begun(tmp_path):
    """A tiny checkpoint's reader, and embeddings in front of its blocks."""
    runtime.start("cpu", "graph")
    config = make_checkpoint.make_config("tiny", **TINY)
    make_checkpoint.write_checkpoint(tmp_path / "float", config, seed=1, dtype="float32")
    reader = CheckpointReader(tmp_path / "float")
    return reader, Hidden(embedding_rows(reader.files, np.arange(48, dtype=np.int32)), [17, 1, 30])


@pytest.mark.parametrize("held_out", [0, 1])
def test_each_input_alone_is_seen_as_all_of_them_together(begun, held_out):
    """Nothing quantized and both models the same: the statistics are those of the float block, and nothing drifts. What
    is held out is the last sequence, of 30 tokens, and is not in the others."""
    reader, hidden = begun
    lengths, block = hidden.lengths, reader.block(1)
    hidden = dataclasses.replace(hidden, held_out=held_out, first_rows=(0, 18))
    served, floats = (BlockRunner(reader.config, lengths, held_out=held_out) for _ in range(2))
    known = Needs(data=True, gram=True, rows=20, temper=0.5, held_out=7)
    together, target = served.observe(block, hidden, known, "test")
    rows = {name: each.held_out.rows for name, each in together.items()}
    ways = Way(served, hidden, BlockPlan()), Way(floats, hidden)
    for name, wanted in together.items():
        needs = dataclasses.replace(known, drift=True)
        alone = served.observe_input(name, RoundedBlock(block), ways, needs, "test")
        assert alone.tokens == wanted.tokens == (18 if held_out else 48)
        np.testing.assert_allclose(alone.gram, wanted.gram, atol=1e-4 * np.abs(wanted.gram).max())
        np.testing.assert_allclose(alone.absmax, wanted.absmax, rtol=1e-4)
        np.testing.assert_allclose(alone.sample.rows, wanted.sample.rows, atol=1e-4 * wanted.absmax.max())
        assert np.abs(alone.drift).max() <= 1e-4 * np.abs(wanted.gram).max()
        assert len(rows[name]) == (7 if held_out else 0)
        np.testing.assert_allclose(alone.held_out.rows, rows[name], atol=1e-4 * wanted.absmax.max())
        assert np.abs(alone.held_out_drift.rows).sum() <= 1e-4 * np.abs(rows[name]).sum() + 1e-9
    reached = ways[1].behind(RoundedBlock(block)).states
    np.testing.assert_allclose(reached, target.states, atol=1e-5 * np.abs(target.states).max())


@pytest.mark.parametrize("whole", [[site.name for site in layout.SITES], [layout.Q_PROJ.name]], ids=["integers", "floats"])
def test_a_way_gone_on_with_reaches_what_it_does_from_its_beginning(begun, whole):
    """To the last bit, with the layers in front of each input rounded meanwhile, and where not every input is asked for;
    in integers and, of a plan that no network serves, in floats."""
    reader, hidden = begun
    runner, block = BlockRunner(reader.config, hidden.lengths), reader.block(1)
    scheme = PRESETS["w4a8"]
    plan = BlockPlan(tuple(scheme if site.name in whole else None for site in layout.SITES))
    stages = [{}]
    for name in layout.INPUT_NAMES[:-1]:
        sites = layout.sites_reading(name)
        weights = {site.name: RoundToNearest()(block.weight(site), scheme.weight, None) for site in sites}
        stages.append({**stages[-1], **{name: QuantizedLinear(scheme, weight) for name, weight in weights.items()}})
    inputs = [RoundedBlock(block, linears=linears) for linears in stages]

    def gone(way, place):
        return np.concatenate([x for _, x, _ in way.to(place, inputs[place])])

    wanted = [gone(Way(runner, hidden, plan), place) for place in range(4)]
    for places in ([0, 1, 2, 3], [1, 3], [2, 3], [0, 2], [0, 3], [1, 2]):
        way = Way(runner, hidden, plan)
        for place in places:
            np.testing.assert_array_equal(gone(way, place), wanted[place])


def test_without_the_output_the_same_inputs_are_seen_and_nothing_behind_them_is_computed(begun):
    reader, hidden = begun
    runner, block, needs = BlockRunner(reader.config, hidden.lengths), reader.block(1), Needs(data=True, gram=True, rows=20)
    seen, output = runner.observe(block, hidden, needs, "test", output=False)
    assert output is None
    assert [steps for _, _, steps, _ in runner._cells] == [(0, running._INPUTS, False)]
    wanted, _ = runner.observe(block, hidden, needs, "test")
    assert list(seen) == list(wanted)
    for one, two in zip(seen.values(), wanted.values(), strict=True):
        assert np.array_equal(one.gram, two.gram)
        assert np.array_equal(one.sample.rows, two.sample.rows)


def test_the_size_of_a_rotated_checkpoint_with_its_new_head_is_known_beforehand(rounded):
    chosen = load_recipe(find_recipe("paper_w4a8_hadamard"))
    made = rounded(TIED, chosen, chats=0)
    reader = chosen.rewritten(CheckpointReader(TIED))
    stored = QuantizedReader(made)
    assert stored_bytes(reader, chosen, chosen.plan(reader.config)) == stored.files.nbytes
    head, embedding = (stored.files.entries[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert (head.dtype, head.nbytes) == (embedding.dtype, embedding.nbytes)


def test_a_raised_damping_is_in_the_report_and_on_the_terminal(recipe, tmp_path):
    """One chat has fewer tokens than the layers have inputs: without damping the grams are singular."""
    runtime.start("cpu", "graph")
    bars = Bars(console=Console(file=StringIO(), width=200))
    chosen = recipe("scheme: w8a8\nrounding: {gptq: {damping: 0}}")
    quantize(CheckpointReader(MINI), chosen, tmp_path / "out", data=calibration(1), progress=Shown(bars).progress)
    report = json.loads((tmp_path / "out/quantization_report.json").read_text())
    for block in report["blocks"]:
        assert block["notes"]["mlp.down_proj"].startswith("damping raised from 0 to ")
    assert bars.console.file.getvalue().count("mlp.down_proj: damping raised from 0 to ") == 4


# --- slow: other outliers, and resumption of the longest path --------------------------------------------------------


def norm_channels(tensors):
    """(norm, channel, layers that read it) of the embedded checkpoint's outlier channels: the four largest of each norm."""
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        prefix, norm = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
        readers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if norm == "input_layernorm" else []
        readers = readers or ["mlp.gate_proj", "mlp.up_proj"]
        for channel in np.argsort(-np.abs(tensors[name]))[:4]:
            yield name, channel, [f"{prefix}.{reader}.weight" for reader in readers]


def rescaled(factor):
    """The same function with the norms' outlier channels `factor` times as large: a power of two, so exact."""

    def change(tensors):
        for norm, channel, readers in list(norm_channels(tensors)):
            tensors[norm][channel] *= factor
            for reader in readers:
                tensors[reader][:, channel] /= factor

    return change


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0, 1 / 64], ids=["stronger outliers (x128)", "no outliers in the norms"])
@pytest.mark.parametrize(
    ("name", "limit"),
    [("w8a8", 1e-4), ("w8a8_static", 2e-3), ("w4a8", 1.8e-3), ("w4a8_g128", 1e-3), ("w4a8_online", 2e-3)],
)
def test_the_recipes_hold_whatever_the_outliers(factor, name, limit, rounded, tmp_path):
    checkpoint = rewrite(MINI, tmp_path / "rescaled", rescaled(factor))
    made = rounded(checkpoint, load_recipe(find_recipe(name)))
    assert compare(checkpoint, made, token_data("validation", 120).sequences).kl_mean <= limit


@pytest.mark.slow
def test_a_corrected_and_rotated_run_resumes_to_the_same_bytes(recipe, tmp_path):
    """The longest path: a rewritten reader, and the float model beside the quantized stream, both kept or both replayed."""

    class Stopped(Exception):
        pass

    def stop(report):
        if report.index == 1:
            raise Stopped

    runtime.start("cpu", "graph")
    reader, chosen, data = CheckpointReader(MINI), load_recipe(find_recipe("w4a8_g128")), calibration(16)
    quantize(reader, chosen, tmp_path / "whole", data=data)
    with pytest.raises(Stopped):
        quantize(reader, chosen, tmp_path / "kept", data=data, progress=Progress(on_block=stop))
    shutil.copytree(tmp_path / "kept", tmp_path / "replayed", ignore=shutil.ignore_patterns(".states-*"))
    for name in ("kept", "replayed"):
        quantize(reader, chosen, tmp_path / name, data=data, resume=True)
    whole, *resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "kept", "replayed")
    )
    assert resumed == [whole, whole]
