"""evaluate and compare against a real server: an unmodified vLLM serves the embedded checkpoint (`make served`)."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from ms_pangu_quant import api
from ms_pangu_quant.cli import main
from ms_pangu_quant.evaluation.samples import read_records
from tests.conftest import ASSETS, MINI
from tests.served.server import command, serving

pytestmark = [pytest.mark.slow, pytest.mark.served]


@pytest.fixture(scope="module", params=["float", "w8a8"])
def pair(request, tmp_path_factory, quantized):
    """(a directory, the same as it is served).

    Without smoothing, the embedded checkpoint's outliers make int8 so coarse that vLLM's bfloat16 in front of it moves as
    much as the rounding does: answers, and ten of 300 verdicts, are then chance.
    """
    if request.param == "float":
        output = tmp_path_factory.mktemp("merged") / "float"
        command("merge", MINI, "--output", output)
        return MINI, output
    directory, output = quantized("w8a8"), tmp_path_factory.mktemp("export") / "w8a8"
    api.export(directory, output, stored_as="compressed-tensors")
    return directory, output


@pytest.fixture(scope="module")
def url(pair):
    with serving(pair[1], "--dtype", "bfloat16", "--max-model-len", "512") as server:
        yield f"{server.address}/v1"


def evaluate(directory, output, *more: str) -> list[str]:
    asked = ["--tasks", "mini", "--modes", "slow_think,no_think", "--max-new-tokens", "230"]
    return ["evaluate", str(directory), *asked, "--sandbox", "rlimits", "--output", str(output), *more]


def test_what_is_served_passes_what_the_checkpoint_passes(pair, url, tmp_path):
    """Killed in the middle, it goes on and asks nothing twice: samples that were there are there, byte for byte."""
    served = evaluate(pair[1], tmp_path / "served", "--endpoint", url)
    samples = tmp_path / "served/samples.jsonl"
    with subprocess.Popen([sys.executable, "-m", "ms_pangu_quant", *served], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (samples.exists() and samples.read_bytes().count(b"\n") > 20):
            time.sleep(0.05)
        process.kill()
    before = {line for line in samples.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}
    assert main(served) == 0
    assert before <= set(samples.read_bytes().splitlines(keepends=True))

    assert main(evaluate(pair[0], tmp_path / "loaded")) == 0
    entries = [json.loads((tmp_path / name / "summary.json").read_text())["entries"] for name in ("served", "loaded")]
    for one, other in zip(*entries, strict=True):
        assert abs(one["passed"] - other["passed"]) <= 3
    answers = [[record["completion"] for _, record in read_records(tmp_path / name / "samples.jsonl")] for name in
               ("served", "loaded")]  # fmt: skip
    assert sum(one == other for one, other in zip(*answers, strict=True)) >= 0.9 * len(answers[0])
    said = json.loads((tmp_path / "served/run.json").read_text())["served_by"]
    assert (said["software"], said["max_model_len"], said["asked_with"]) == ("vllm", 512, "token ids")


def test_distributions_of_a_server_are_those_of_the_checkpoint(pair, url):
    found = api.compare_served(pair[0], api.Endpoint(url), ASSETS / "validation.jsonl", limit=20)
    assert 0 <= found.kl_mean < 5e-4
    assert found.top1_agreement > 0.97
    assert found.ppl_served == pytest.approx(found.ppl_reference, rel=5e-3)
    assert found.given >= 20
