"""The embedded checkpoints are what their card says, and hard enough that a mistake in quantization shows."""

import hashlib
import json
import re

import pytest
from safetensors.numpy import load_file

import ms_pangu_quant as pq
from ms_pangu_quant.cli import main
from ms_pangu_quant.evaluation.summary import scores
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.report.results import load_runs
from tests.conftest import ASSETS
from tools.embedded.ship import write_data

CARD = (ASSETS / "README.md").read_text(encoding="utf-8")
CHECKPOINTS = ("openpangu-mini", "openpangu-mini-tied")
MODES = ("no_think", "slow_think", "auto_think")
PER_TENSOR = {"why": "x", "scheme": "w8a8_static", "rounding": "rtn", "calibration": {"samples": 128, "max_length": 512}}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_card_names_the_files_that_are_shipped(name):
    file = ASSETS / name / "model.safetensors"
    parameters = sum(tensor.size for tensor in load_file(file).values())
    row = f"| `{name}` | {parameters:,} | {file.stat().st_size:,} | `{hashlib.sha256(file.read_bytes()).hexdigest()}` |"
    assert row in CARD
    assert file.stat().st_size < 15e6
    assert json.loads((ASSETS / name / "config.json").read_text())["tie_word_embeddings"] is name.endswith("tied")


def test_the_data_are_what_the_generator_makes(tmp_path):
    write_data(tmp_path, 0)
    for file in tmp_path.rglob("*.jsonl"):
        name = file.relative_to(tmp_path)
        assert file.read_bytes() == (ASSETS / name).read_bytes(), name


def evaluated(checkpoint, output, modes=MODES):
    """mode -> task_id -> 1 where solved."""
    arguments = ["--tasks", "mini", "--modes", ",".join(modes), "--output", str(output)]
    assert main(["evaluate", str(checkpoint), *arguments]) == 0
    return {mode: scores(load_runs([output])[0].of("mini", mode)) for mode in modes}


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """What each checkpoint solves: name -> mode -> task_id -> 1 where solved."""
    return {name: evaluated(ASSETS / name, tmp_path_factory.mktemp("float") / name) for name in CHECKPOINTS}


def share(of):
    return sum(of.values()) / len(of)


def told(name):
    """mode -> pass@1 in percent, as the card's table has it."""
    table = CARD.split(f"<!-- table: {name} -->\n")[1].split("<!-- end -->")[0]
    return {mode: float(value) for mode, value in re.findall(r"(?m)^\| (\w+_think) \| ([\d.]+)%", table)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_cards_scores_are_those_of_an_evaluation(name, solved):
    """Two problems either way: another CPU may add up in another order."""
    assert told(name) == {mode: pytest.approx(100 * share(solved[name][mode]), abs=0.7) for mode in MODES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_problems_are_neither_too_easy_nor_too_hard_and_thinking_helps_with_the_long_ones(name, solved):
    assert 0.70 <= share(solved[name]["no_think"]) <= 0.95
    steps = {key: len(each.row["steps"]) for key, each in load_problems(TASKS["mini"]).by_id.items()}
    long = [{key: of for key, of in solved[name][mode].items() if steps[key] >= 4} for mode in ("slow_think", "no_think")]
    assert share(long[0]) >= share(long[1])


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "least"), [("w4a8_rtn", 0.05), (PER_TENSOR, 0.02)], ids=["W4A8, RTN", "W8A8, static"])
def test_plain_rounding_loses_visibly(recipe, least, solved, tmp_path):
    pq.quantize(ASSETS / "openpangu-mini", recipe, tmp_path / "rounded", calibration=ASSETS / "calibration.jsonl")
    found = evaluated(tmp_path / "rounded", tmp_path / "out", ("no_think",))
    assert share(found["no_think"]) <= share(solved["openpangu-mini"]["no_think"]) - least
