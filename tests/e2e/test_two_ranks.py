"""Two ranks, started by msrun as on a cluster: what they compute together is what one computes alone.

One job here is in the default suite, and does as much as fits into one; the others are slow tests.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import psutil
import pytest

from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.formats.reader import open_checkpoint
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.job.msrun import Job, run
from ms_pangu_quant.pipeline.loop import quantize
from ms_pangu_quant.recipe.parse import load_recipe
from tests.conftest import ASSETS, MINI, ROOT
from tests.e2e import msrun_job

SHAPE = {
    "model_type": "PanguEmbedded",
    "bias": True,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
MIXED = """
scheme: w4a8_g32
layers:
  model.layers.0.self_attn.*: w8a8
  model.layers.0.mlp.*: w8a8_static
  model.layers.1.self_attn.o_proj: float
transforms: auto
rounding: gptq
kv_cache: int8
"""


def two_ranks(folder, *arguments: str) -> int:
    script = str(ROOT / "tests" / "e2e" / "msrun_job.py")
    return run(Job(workers=2, log_dir=str(folder / "logs")), "quantize", [script, str(folder), *arguments])


def alone(folder, name, recipe):
    (folder / f"{name}.yaml").write_text(recipe)
    reader = CheckpointReader(folder / "float")
    data = msrun_job.random_data(reader.config.vocab_size)
    quantize(reader, load_recipe(folder / f"{name}.yaml"), folder / name, data=data)


def answers_of(folder, name, rank):
    with np.load(folder / f"{name}.rank{rank}.npz") as stored:
        return dict(stored)


def check_answers(folder, name, tolerance):
    """Logits within `tolerance` of one rank's, tokens the same; both ranks have the same bits."""
    wanted = msrun_job.answers(load(folder / name, **msrun_job.SIZES))
    first, second = (answers_of(folder, name, rank) for rank in range(2))
    assert sorted(wanted) == sorted(first) == sorted(second)
    for key, value in wanted.items():
        assert first[key].tobytes() == second[key].tobytes(), key
        if key.startswith("tokens"):
            assert first[key].tolist() == value.tolist(), key
        else:
            assert first[key].shape == value.shape
            assert np.abs(first[key] - value).max() <= tolerance, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_checkpoint):
    """A float checkpoint, quantized by one rank and by two; answers of two ranks to the prompts of msrun_job."""
    folder = tmp_path_factory.mktemp("msrun")
    write_checkpoint(folder / "float", SHAPE, seed=3)
    alone(folder, "one", MIXED)
    assert two_ranks(folder, "quantize", "one") == 0
    return folder


def test_two_ranks_calibrate_and_round_as_one(folder):
    """Fewer than one code of a thousand may differ, by one: sums of statistics are added up in another order."""
    one, two = open_checkpoint(folder / "one"), open_checkpoint(folder / "two")
    different = total = 0
    for index in range(SHAPE["num_hidden_layers"]):
        rounded, rounded2 = one.rounded_block(index), two.rounded_block(index)
        linears, linears2 = rounded.linears, rounded2.linears
        assert list(linears) == list(linears2)
        for name, linear in linears.items():
            difference = linear.weight.codes.astype(np.int32) - linears2[name].weight.codes
            assert np.abs(difference).max() <= 1
            different, total = different + np.count_nonzero(difference), total + difference.size
            np.testing.assert_allclose(linears2[name].weight.scale, linear.weight.scale, rtol=1e-5)
            assert linears2[name].input_scale == linear.input_scale
        for name, value in rounded.kept.items():
            np.testing.assert_allclose(rounded2.kept[name], value, rtol=1e-5, atol=1e-6)
        for grid, grid2 in zip(vars(rounded.cache).values(), vars(rounded2.cache).values(), strict=True):
            np.testing.assert_allclose(grid2.scale, grid.scale, rtol=2.0**-7)  # a step of bfloat16
            assert np.mean(grid2.scale != grid.scale) < 0.05
    assert different * 1000 <= total
    assert total == SHAPE["num_hidden_layers"] * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192) - 64 * 64


def test_one_rank_writes_one_checkpoint(folder):
    one, two = folder / "one", folder / "two"
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    report, report2 = (json.loads((path / "quantization_report.json").read_text()) for path in (one, two))
    assert report2["fingerprint"].pop("number of ranks") == "2"
    assert report2["fingerprint"] == report["fingerprint"]
    for block, block2 in zip(report["blocks"], report2["blocks"], strict=True):
        assert block2["output_error"] == pytest.approx(block["output_error"], rel=1e-4)
        assert list(block2["weight_error"]) == list(block["weight_error"])


def test_a_network_cut_over_two_ranks_computes_what_a_whole_one_does(folder):
    """Of the layers that are cut along their inputs, one each is in W8A8 dynamic and static, W4A8 by group and float."""
    check_answers(folder, "one", 1e-4)


# --- slow -----------------------------------------------------------------------------------------------------------

EXACT = ("w8a8", "w8a8_static", "w4a8")  # integers are added up over ranks: the bits of one rank
KINDS = ("float", "w4a8_g32", *EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_every_scheme_is_cut_with_kernels_and_with_plain_operators(kernels, tmp_path, write_checkpoint, monkeypatch):
    """With embedding and head apart, and one key head that both ranks have a copy of."""
    monkeypatch.setenv("MS_PANGU_QUANT_KERNELS", kernels)
    shape = {**SHAPE, "num_key_value_heads": 1, "tie_word_embeddings": False}
    write_checkpoint(tmp_path / "float", shape, seed=4)
    for kind in KINDS[1:]:
        alone(tmp_path, kind, f"scheme: {kind}\nrounding: rtn\n")
    assert two_ranks(tmp_path, "answer", *KINDS) == 0
    for kind in KINDS:
        check_answers(tmp_path, kind, 0.0 if kind in EXACT else 1e-4)


RECIPE = """
scheme: w4a8_g128
transforms: [smooth_search]
rounding: {gptq: {correct: true, products: bfloat16}}
calibration: {samples: 12, max_length: 96}
"""


def start(command, here, *arguments, job=()):
    """A script of tools/, in the folder `here`."""
    line = [str(ROOT / "tools" / f"msrun_{command}.sh"), "--workers", "2", *job, "--", *map(str, arguments)]
    variables = {name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"}
    return subprocess.Popen(line, cwd=here, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, f"{out}\n{errors}"
    return out


@pytest.fixture
def here(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_resume_gives_the_same_files(here):
    arguments = [MINI, "--recipe", here.parent / "recipe.yaml", "--calibration", ASSETS / "calibration.jsonl"]
    shown = finished(start("quantize", here, *arguments, "--output", "whole"))
    assert "block 4/4" in shown
    assert sorted(path.name for path in here.iterdir()) == ["whole"]

    process = start("quantize", here, *arguments, "--output", "stopped")
    while not process.stdout.readline().startswith("block 2/4"):
        assert process.poll() is None
    started = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [each for each in started if {"MS_ROLE": "MS_WORKER", "RANK_ID": "1"}.items() <= each.environ().items()]
    victim.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=1500)
    assert process.returncode == 1
    assert "msrun: rank 1 was killed (SIGKILL); the other ranks were stopped" in errors
    assert "--resume" in errors
    psutil.wait_procs(started, timeout=300)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    assert not (here / "stopped" / "config.json").exists()

    other = subprocess.run(
        [sys.executable, "-m", "ms_pangu_quant", "quantize", *map(str, arguments), "--output", "stopped", "--resume"],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "was begun with another number of ranks" in other.stderr

    finished(start("quantize", here, *arguments, "--output", "stopped", "--resume"))
    names = sorted(path.name for path in (here / "whole").iterdir())
    assert names == sorted(path.name for path in (here / "stopped").iterdir())
    for name in names:
        assert (here / "whole" / name).read_bytes() == (here / "stopped" / name).read_bytes(), name


@pytest.mark.slow
def test_a_rank_that_dies_on_another_node_ends_the_job_on_this_one(here):
    """msrun knows only this node's ranks. The other's is started here as msrun would start it there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [MINI, "--recipe", here.parent / "recipe.yaml", "--calibration", ASSETS / "calibration.jsonl"]
    arguments += ["--output", "out"]
    process = start("quantize", here, *arguments, job=["--local-workers", "1", "--master-port", port])
    variables = {name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"}
    variables |= {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1", "RANK_ID": "1", "MS_WORKER_NUM": "2", "RANK_SIZE": "2"}
    variables |= {"MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "ms_pangu_quant", "quantize", *map(str, arguments)]
    other = subprocess.Popen(line, cwd=here, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not process.stdout.readline().startswith("block 1/4"):
        assert process.poll() is None
    other.kill()
    other.wait()
    out, errors = process.communicate(timeout=1500)
    assert process.returncode == 1
    assert "--resume" in errors
    assert "pangu-quant: error: rank 1 has ended before its work was done" in out
    assert "Traceback" not in out + errors


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_evaluate_as_one(tensor_parallel, here):
    arguments = ["--tasks", "mini", "--limit", "5", "--modes", "no_think,slow_think", "--max-new-tokens", "60,no_think=40"]
    arguments += ["--sandbox", "rlimits"]
    line = [sys.executable, "-m", "ms_pangu_quant", "evaluate", str(MINI), *arguments, "--output", "one"]
    subprocess.run(line, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    shown = finished(
        start("evaluate", here, MINI, *arguments, "--output", "two", "--tensor-parallel", str(tensor_parallel))
    )
    assert "pass@1" in shown
    assert sorted(path.name for path in here.iterdir()) == ["one", "two"]
    assert sorted(path.name for path in (here / "one").iterdir()) == sorted(path.name for path in (here / "two").iterdir())
    assert (here / "one" / "samples.jsonl").read_bytes() == (here / "two" / "samples.jsonl").read_bytes()
    one, two = (json.loads((here / name / "summary.json").read_text())["entries"] for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_two_ranks_generate_the_text_of_one_and_one_of_them_says_it(here):
    arguments = [str(MINI), "--mode", "no_think", "--prompt", "def add(a, b):", "--max-new-tokens", "40"]
    line = [sys.executable, "-m", "ms_pangu_quant", "generate", *arguments]
    one = subprocess.run(
        line, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    shown = finished(start("generate", here, *arguments)).splitlines()
    assert shown[:-1] == one.stdout.splitlines()
    assert shown[-1].startswith(one.stderr.split(" in ")[0])  # "N tokens"
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_what_ranks_cannot_share_is_one_line_and_exit_code_2(here, capsys):
    process = start("generate", here, MINI, "--prompt", "x", job=["--workers", "3"])
    out, errors = process.communicate(timeout=1500)
    assert process.returncode == 2
    assert "num_attention_heads is 4, wanted a multiple of it; use fewer ranks" in out + errors
    assert "Traceback" not in out + errors
