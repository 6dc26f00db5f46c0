"""What `import ms_pangu_quant` offers does what the commands do, and observe() what its docstring says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml

import ms_pangu_quant as pq
from ms_pangu_quant.api import GenerationSettings, Judging, as_recipe, compare_served
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import OutputError, PanguQuantError, RecipeError, RequestError
from ms_pangu_quant.formats.against import law_of
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.mixed.sensitivity import total_steps
from ms_pangu_quant.pipeline.report import Progress
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from tests.conftest import MINI, token_data
from tests.unit.openai_server import Server, running
from tools.dev.make_checkpoint import make_config

DATA = pq.ASSETS / "validation.jsonl"
SMOOTH = {"scheme": "w8a8", "transforms": [{"smooth": {"alpha": 0.5}}]}
SEARCHED = {"scheme": "w8a8", "rounding": {"rtn": {"scale": "mse"}}}
ROTATE = {"scheme": "w8a8", "transforms": ["rotate"]}


def test_quantize_writes_the_bytes_that_the_command_writes(tmp_path, capsys):
    result = pq.quantize(str(MINI), "w8a8_rtn", tmp_path / "function", stored_as="ascend")
    command = ["quantize", str(MINI), "--recipe", "w8a8_rtn", "--output", str(tmp_path / "command"), "--format", "ascend"]
    assert main(command) == 0
    capsys.readouterr()
    sums = [(tmp_path / name / "SHA256SUMS").read_bytes() for name in ("function", "command")]
    assert sums[0] == sums[1]
    assert result.output == tmp_path / "function"


def test_quantize_refuses_an_int8_cache_that_no_program_reads_as_the_command_does(tmp_path, capsys):
    asked = {"calibration": DATA, "stored_as": "compressed-tensors"}
    with pytest.raises(RequestError, match=r"an int8 key/value cache .* no program computes it") as refused:
        pq.quantize(MINI, "kv8", tmp_path / "function", **asked)
    command = ["quantize", str(MINI), "--recipe", "kv8", "--calibration", str(DATA), "--format", "compressed-tensors"]
    assert main([*command, "--output", str(tmp_path / "command")]) == 2
    assert " ".join(capsys.readouterr().err.split()) == f"pangu-quant: error: {' '.join(str(refused.value).split())}"
    assert not any(tmp_path.iterdir())


def test_quantize_measures_for_a_budget_and_writes_the_bytes_that_the_command_writes(tmp_path, make_small, capsys):
    """It measured nothing and failed: only the command could."""
    checkpoint, data, recipe = make_small(tmp_path)
    seen = {"measuring": [], "streams": [], "budget": [], "blocks": []}
    progress = Progress(
        on_measuring=seen["measuring"].append,
        on_streams=seen["streams"].append,
        on_budget=seen["budget"].append,
        on_block=seen["blocks"].append,
    )
    pq.quantize(checkpoint, recipe, tmp_path / "function", calibration=data, progress=progress)
    command = ["quantize", str(checkpoint), "--recipe", str(recipe), "--calibration", str(data)]
    assert main([*command, "--output", str(tmp_path / "command")]) == 0
    capsys.readouterr()
    for name in ("{}.sensitivity.json", "{}/SHA256SUMS"):
        function, written = ((tmp_path / name.format(run)).read_bytes() for run in ("function", "command"))
        assert function == written
    assert seen["measuring"] == [tmp_path / "function.sensitivity.json"]
    assert sum(seen["streams"]) == total_steps(2)
    assert [len(seen[name]) for name in ("budget", "blocks")] == [1, 2]


@pytest.fixture
def make_small(write_checkpoint):
    """A folder -> a tiny checkpoint, rows of tokens, and a recipe with a budget, in it."""

    def make(folder):
        write_checkpoint(folder / "float", make_config("tiny"), seed=3, dtype="float32")
        generator = np.random.default_rng(0)
        lengths = (500, 500, 500, 400, *[512] * 9)
        rows = [json.dumps({"token_ids": generator.integers(3, 96, length).tolist()}) for length in lengths]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        budget = {"budget": {"bits_per_weight": 6.5, "schemes": ["w4a8_g32", "w8a8"]}}
        (folder / "mixed.yaml").write_text(yaml.safe_dump({"scheme": budget, "transforms": ["smooth"]}))
        return folder / "float", folder / "rows.jsonl", folder / "mixed.yaml"

    return make


@pytest.mark.parametrize("name", ["w8a8", "w4a8_g128", "w4a8_online", "w4a8_mixed"])
def test_a_recipe_is_the_same_by_name_by_file_and_as_a_mapping(name):
    path = find_recipe(name)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert as_recipe(name).digest == as_recipe(path).digest == as_recipe(content).digest == load_recipe(path).digest
    assert as_recipe(as_recipe(name)).digest == load_recipe(path).digest


def test_held_out_texts_are_measured_on_and_change_no_tensor(tmp_path):
    """Rounding fits what it is fitted to better than other texts; nothing that is written depends on those."""
    recipe = {"scheme": "w4a8_g64", "transforms": ["smooth_search"], "rounding": "gptq"}
    blocks = {}
    for held_out in (0, 0.5):
        given = {**recipe, "calibration": {"samples": 8, "max_length": 128, "held_out": held_out}}
        blocks[held_out] = pq.quantize(MINI, given, tmp_path / str(held_out), calibration=DATA).blocks
    for file in (tmp_path / "0").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "0.5" / file.name).read_bytes()
    assert [block.output_error for block in blocks[0]] == [block.output_error for block in blocks[0.5]]
    assert {block.held_out_error for block in blocks[0]} == {None}
    assert all(block.held_out_error > block.output_error for block in blocks[0.5])
    report = json.loads((tmp_path / "0.5" / "quantization_report.json").read_text())
    assert (report["calibration"]["sequences"], report["calibration"]["held_out"]) == (12, 4)
    assert [block["held_out_error"] for block in report["blocks"]] == [block.held_out_error for block in blocks[0.5]]


def test_what_a_layer_needs_held_out_texts_for_is_refused_without_them(tmp_path):
    recipe = {"scheme": "w4a8_g64", "rounding": {"gptq": {"damping": "auto"}}, "calibration": {"samples": 8, "held_out": 0}}
    with pytest.raises(PanguQuantError, match="0 held out; recipe chooses on held-out rows"):
        pq.quantize(MINI, recipe, tmp_path / "out", calibration=DATA)


def test_a_recipe_changed_in_a_program_is_another_run_and_its_report_says_so(tmp_path):
    """A searched scale clips: by the text of the file, the half-step law would hold of the weights."""
    read, output = as_recipe("w8a8_rtn"), tmp_path / "out"
    pq.quantize(MINI, dataclasses.replace(read, quantizer=RoundToNearest("mse")), output)
    assert not law_of(output).half_step
    assert verify(output, CheckpointReader(MINI)).faults == ()
    with pytest.raises(OutputError, match="made with another recipe"):
        pq.quantize(MINI, read, output, resume=True)
    assert pq.quantize(MINI, dict(SEARCHED), output, resume=True).was_complete


@pytest.fixture(scope="module")
def as_it_is():
    return pq.observe(MINI, 1, DATA, samples=3)


@pytest.mark.parametrize("recipe", [SMOOTH, ROTATE])
def test_what_is_observed_after_a_transform_is_other_numbers_with_the_same_products(recipe, as_it_is):
    """gate_proj's outputs: nothing that is done to a block scales its rows. A rotated embedding is rounded to bfloat16."""
    (block, stats), (changed, changed_stats) = as_it_is, pq.observe(MINI, 1, DATA, recipe=recipe, samples=3)
    x, y = (each["mlp_input"].sample.rows for each in (stats, changed_stats))
    w, v = (each["mlp.gate_proj.weight"] for each in (block, changed))
    assert len(x) == stats["mlp_input"].tokens > 100
    assert np.abs(y).max() / y.std() < np.abs(x).max() / x.std() / 2  # the outliers that the embedded checkpoint has
    np.testing.assert_allclose(y @ v.T, x @ w.T, rtol=0, atol=2**-9 * np.abs(x @ w.T).max())


def test_no_more_rows_are_kept_than_asked_for(as_it_is):
    _, stats = pq.observe(MINI, 1, DATA, samples=3, rows=10)
    assert all(each.sample.rows.shape[0] == 10 for each in stats.values())
    assert stats["mlp_input"].tokens == as_it_is[1]["mlp_input"].tokens


def test_a_checkpoint_compared_with_itself_has_no_kl():
    found = pq.compare(MINI, MINI, DATA, limit=2)
    assert found.kl_mean == 0
    assert found.top1_agreement == 1
    assert found.ppl_reference == found.ppl_quantized


def test_a_served_checkpoint_is_as_far_away_as_the_directory_is_and_what_is_not_given_only_lowers_it(quantized):
    """Behind the API is the quantized checkpoint itself, loaded here."""
    directory = quantized("w8a8_rtn")
    model, texts = pq.load(directory), token_data("validation", 3).sequences
    logits = {tuple(text.tolist()): model.logits(text.tolist()).astype(np.float64) for text in texts}

    def top(prompt, count):
        chances = logits[tuple(prompt)]
        chances = chances - np.log(np.exp(chances).sum(axis=1, keepdims=True))
        said = [None]
        for row, own in zip(chances, prompt[1:], strict=False):
            said.append({str(token): {"logprob": row[token]} for token in {*np.argsort(-row)[:count].tolist(), own}})
        return {"prompt_logprobs": said}

    whole = pq.compare(MINI, directory, DATA, limit=3)
    with running(Server(reply=lambda prompt: "", tokens=lambda text: [4], logprobs=top)) as server:
        endpoint = pq.Endpoint(server.url)
        some, everything = (compare_served(MINI, endpoint, DATA, top=count, limit=3) for count in (5, 1024))
    assert 0 < some.kl_mean < everything.kl_mean
    assert everything.kl_mean == pytest.approx(whole.kl_mean, rel=1e-3)
    for found in (some, everything):
        assert (found.texts, found.tokens, found.top1_agreement) == (whole.texts, whole.tokens, whole.top1_agreement)
        assert found.ppl_reference == pytest.approx(whole.ppl_reference)
        assert found.ppl_served == pytest.approx(whole.ppl_quantized, rel=1e-5)
    assert 5 <= some.given < 6
    assert everything.covered == pytest.approx(1)


def test_evaluate_writes_the_bytes_that_the_command_writes(tmp_path, capsys):
    generation = GenerationSettings(60, temperature=0.8, seed=3)
    asked = {"tasks": ["mini"], "modes": ["no_think"], "limit": 2, "samples": 2, "generation": generation}
    given = []
    request = pq.EvaluationRequest(str(MINI), tmp_path / "function", **asked)
    found = pq.evaluate(request, Judging("rlimits"), on_begin=given.append, on_answer=lambda: given.append("answer"))
    command = ["evaluate", str(MINI), "--tasks", "mini", "--modes", "no_think", "--limit", "2", "--n", "2", "--json"]
    command += ["--max-new-tokens", "60", "--temperature", "0.8", "--seed", "3", "--sandbox", "rlimits"]
    assert main([*command, "--output", str(tmp_path / "command")]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert given == [4, *["answer"] * 4]
    for name in ("samples.jsonl", "run.json", "results.jsonl", "summary.json"):
        assert (tmp_path / "function" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()


@pytest.mark.parametrize("index", [-1, 10_000])
def test_a_block_that_does_not_exist_is_an_error(index):
    with pytest.raises(RequestError, match="index: got"):
        pq.observe(MINI, index, DATA)


def test_mistakes_are_said_before_anything_is_written(tmp_path):
    for wrong in (
        lambda output: pq.quantize(MINI, "w8a8", output),  # needs data
        lambda output: pq.quantize(MINI, {"scheme": "w9a9"}, output),
        lambda output: pq.quantize(MINI, "w8a8_rtn", output, stored_as="gguf"),
        lambda output: pq.quantize(tmp_path / "nowhere", "w8a8_rtn", output),
        lambda output: pq.quantize(MINI, "w4a8_mixed", output),  # a budget, and nothing to measure for it
    ):
        with pytest.raises(PanguQuantError):
            wrong(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="recipe: unknown key 'shceme'"):
        as_recipe({"shceme": "w8a8"})
