"""Measured sensitivities against checkpoints that are quantized so, and mixed checkpoints the whole way."""

import itertools
import json
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.formats.export import export
from ms_pangu_quant.formats.reader import FORMATS, QuantizedReader
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.inference.compare import compare
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.kernels.library import SETTING
from ms_pangu_quant.mixed.measure import measure
from ms_pangu_quant.mixed.sensitivity import assigned, split, total_steps
from ms_pangu_quant.network import runtime
from ms_pangu_quant.pipeline.estimate import stored_bytes
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import load_recipe
from tests.conftest import streamed_bar
from tools.dev import make_checkpoint

SCHEMES = ("w4a8_g32", "w8a8")
METHOD = "transforms: [smooth]\nrounding: {gptq: {damping: 0.01}}\n"
BUDGET = "scheme: {budget: {bits_per_weight: 6.5, schemes: [w4a8_g32, w8a8]}}\n" + METHOD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sensitivity")


@pytest.fixture(scope="module")
def checkpoint(folder):
    make_checkpoint.write_checkpoint(folder / "float", make_checkpoint.make_config("tiny"), seed=3, dtype="float32")
    return folder / "float"


@pytest.fixture(scope="module")
def data():
    """Texts of tokens; the last two are measured on."""
    generator = np.random.default_rng(0)
    sequences = tuple(generator.integers(3, 96, length).astype(np.int32) for length in (90, 70, 80, 40, 33))
    return TokenData(sequences, sha256="d", truncated=0)


def recipe_of(folder, text, name="mine"):
    (folder / f"{name}.yaml").write_text(text)
    return load_recipe(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def found(folder, checkpoint, data):
    runtime.start("cpu", "graph")
    steps = []
    made = measure(
        CheckpointReader(checkpoint),
        recipe_of(folder, BUDGET),
        folder / "partial",
        data=data,
        tokens=60,
        on_step=steps.append,
    )
    assert sum(steps) == total_steps(2)
    assert not (folder / "partial").exists()
    return made


@pytest.fixture(scope="module")
def mixed(folder, checkpoint, data, found):
    """A checkpoint of the budget, int4 and int8 layers side by side."""
    reader = CheckpointReader(checkpoint)
    chosen = assigned(recipe_of(folder, BUDGET), reader.config, found, FORMATS["mindformers"])
    quantize(reader, chosen, folder / "mixed", data=data)
    return folder / "mixed"


@pytest.fixture(scope="module")
def plain(folder, checkpoint):
    """(data, what was found of it): 100 texts to measure on, so that the draws' noise is small; no transforms."""
    generator = np.random.default_rng(1)
    sequences = tuple(generator.integers(3, 96, 24).astype(np.int32) for _ in range(110))
    texts = TokenData(sequences, sha256="d", truncated=0)
    chosen = recipe_of(folder, BUDGET.replace("[smooth]", "[]"), "plain")
    return texts, measure(CheckpointReader(checkpoint), chosen, folder / "plain", data=texts, tokens=2400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "layers"),
    [(0, "self_attn.[qkv]_proj"), (0, "mlp.down_proj"), (1, "self_attn.o_proj"), (1, "mlp.*_proj")],
)
def test_the_kl_of_a_group_is_that_of_a_checkpoint_with_it_alone_quantized(folder, checkpoint, plain, block, layers):
    """Written, read back and compared by the ordinary commands' own code; the statistics are of the known texts alone."""
    texts, measured = plain
    known, others = split(texts, 2400)
    part = TokenData(tuple(known), sha256="k", truncated=0)
    chosen = recipe_of(
        folder, f'scheme: float\nlayers: {{"*.{block}.{layers}": w4a8_g32}}\n' + METHOD.replace("[smooth]", "[]")
    )
    output = folder / f"alone-{block}-{layers[:6]}"
    quantize(CheckpointReader(checkpoint), chosen, output, data=part)
    wanted = compare(checkpoint, output, [np.append(each, 0).astype(np.int32) for each in others])
    groups = [each for each in measured.groups if each.block == block and fnmatch(each.layers[0], f"*.{layers}")]
    assert sum(each.kl for each in groups) == pytest.approx(wanted.kl_mean, rel=0.2)
    if len(groups) == 1:
        assert wanted.kl_se < groups[0].kl_se < 4 * wanted.kl_se


def test_the_dearer_scheme_errs_less_everywhere_and_together_is_near_the_sum(found):
    for group in found.groups:
        assert group.output_error["w8a8"] < 0.3 * group.output_error["w4a8_g32"]
    assert 0.3 < found.additivity < 3  # of two texts
    assert found.together["w8a8"] < 0.1 * found.together["w4a8_g32"]


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 3, 4], ids=["a block", "the head", "a block backwards"])
def test_a_killed_measurement_goes_on_and_ends_with_the_same_figures(folder, checkpoint, data, found, part):
    class Killed(Exception):
        pass

    steps = itertools.count(1)

    def kill(streams):
        if next(steps) == part:
            raise Killed

    arguments = (CheckpointReader(checkpoint), recipe_of(folder, BUDGET), folder / f"killed-{part}")
    with pytest.raises(Killed):
        measure(*arguments, data=data, tokens=60, on_step=kill)
    with pytest.raises(OutputError, match="holds an unfinished run; go on with --resume"):
        measure(*arguments, data=data, tokens=60)
    with pytest.raises(OutputError, match="was begun with another measured, statistics"):
        measure(*arguments, data=data, tokens=30, resume=True)
    seen = []
    assert measure(*arguments, data=data, tokens=60, resume=True, on_step=seen.append) == found
    assert sum(seen) == total_steps(2)


FLOAT_MLP, FLOAT_ATTENTION = 'layers: {"*.mlp.*": float}', 'layers: {"*.self_attn.*": float}'


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("bfloat16", FLOAT_MLP),
        ("bfloat16", f"{FLOAT_MLP}\ntransforms: [smooth]"),
        ("float32", f"{FLOAT_MLP}\ntransforms: [smooth]"),
        ("bfloat16", f"{FLOAT_MLP}\ntransforms: [{{smooth: {{inputs: [attention_input]}}}}]"),
        ("bfloat16", f"{FLOAT_MLP}\ntransforms: [smooth_search]\nkv_cache: int8"),
        ("bfloat16", f"{FLOAT_ATTENTION}\ntransforms: [{{smooth: {{inputs: [attention_output, mlp_hidden]}}}}]"),
        ("bfloat16", 'layers: {"*.1.self_attn.o_proj": float}\ntransforms: [smooth_search]'),
        ("bfloat16", f"{FLOAT_ATTENTION}\ntransforms: [{{rotate: {{heads: false}}}}]"),
        ("bfloat16", f"{FLOAT_MLP}\ntransforms: [rotate, {{smooth: {{inputs: [mlp_input]}}}}]"),
    ],
)
def test_the_size_is_known_beforehand_to_the_byte_where_layers_stay_float(data, tmp_path, dtype, text):
    """What a transform did not change is written in its own dtype."""
    from tools.dev import make_checkpoint as tool

    tool.write_checkpoint(tmp_path / "float", tool.make_config("tiny"), seed=3, dtype=dtype)
    reader, chosen = CheckpointReader(tmp_path / "float"), recipe_of(tmp_path, f"scheme: w8a8\n{text}\n")
    quantize(reader, chosen, tmp_path / "out", data=data)
    reader = chosen.rewritten(reader)
    assert stored_bytes(reader, chosen, chosen.plan(reader.config)) == QuantizedReader(tmp_path / "out").files.nbytes


def test_a_mixed_checkpoint_is_whole_and_within_its_budget(mixed, checkpoint):
    reader = QuantizedReader(mixed)
    assert {word_of(scheme) for _, _, scheme in reader.plan} == {"W4A8_DYNAMIC", "W8A8_DYNAMIC"}
    report = json.loads((mixed / "quantization_report.json").read_text())
    stored = [entry.nbytes for name, entry in reader.files.entries.items() if "proj" in name and not name.endswith("bias")]
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert 8 * sum(stored) / weights == report["budget"]["bits_per_weight"] <= 6.5
    assert verify(mixed, CheckpointReader(checkpoint)).faults == ()


@pytest.mark.parametrize("name", ["ascend", "compressed-tensors"])
def test_every_format_holds_a_mixed_checkpoint_and_gives_it_back(folder, mixed, checkpoint, name):
    there, back = folder / f"as-{name}", folder / f"from-{name}"
    export(QuantizedReader(mixed), FORMATS[name], there)
    assert verify(there, CheckpointReader(checkpoint)).faults == ()
    assert QuantizedReader(there).plan == QuantizedReader(mixed).plan
    export(QuantizedReader(there), FORMATS["mindformers"], back)
    for path in mixed.glob("model*.safetensors"):
        assert (back / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kernels", "plain operators"])
def test_a_mixed_checkpoint_is_served_as_it_was_compared(mixed, checkpoint, data, plain, monkeypatch):
    if plain:
        monkeypatch.setenv(SETTING, "off")
    ids = data.sequences[-1].tolist()
    a, b = (load(path, kv_cache_tokens=64).logits(ids).astype(np.float64) for path in (checkpoint, mixed))
    a, b = (x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (a, b))
    streamed = compare(checkpoint, mixed, [np.append(data.sequences[-1], 0).astype(np.int32)])
    assert (np.exp(a) * (a - b)).sum(1).mean() == pytest.approx(streamed.kl_mean, rel=streamed_bar())


def test_the_command_writes_a_plot_and_quantize_reads_what_it_wrote(folder, checkpoint, data, capsys):
    rows = "".join(json.dumps({"token_ids": each.tolist()}) + "\n" for each in data.sequences)
    (folder / "rows.jsonl").write_text(rows)
    (folder / "budget.yaml").write_text(BUDGET)
    common = ["--recipe", str(folder / "budget.yaml"), "--calibration", str(folder / "rows.jsonl")]
    written = folder / "out.json"
    command = ["sensitivity", str(checkpoint), *common, "-o", str(written), "--tokens", "60"]
    assert main([*command, "--dry-run"]) == 0
    assert "KL on " in capsys.readouterr().out
    assert main(command) == 0
    assert (folder / "out.svg").read_text().count("<svg") == 1
    assert json.loads(written.read_text())["schemes"] == list(SCHEMES)
    again = ["quantize", str(checkpoint), *common, "--output", str(folder / "by-command")]
    assert main([*again, "--sensitivity", str(written)]) == 0
    dry = ["quantize", str(checkpoint), *common, "--output", str(folder / "x"), "--dry-run"]
    assert main(dry) == 2
    assert "--dry-run" in capsys.readouterr().err
    shutil.copy(written, folder / "x.sensitivity.json")  # as a run into x has measured them
    assert main(dry) == 0
    record = json.loads((folder / "by-command" / "quantization_report.json").read_text())
    assert record["budget"]["bits_per_weight"] <= 6.5
    assert len(set(record["schemes"].values())) == 2
