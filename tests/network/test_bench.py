"""bench and doctor: what they print, and that bench's figures follow from each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.cli import main
from ms_pangu_quant.formats.reader import QuantizedReader
from ms_pangu_quant.inference import bench as module
from ms_pangu_quant.inference.bench import MachineLimits, Subject, Work, _passes, bench, work_of
from ms_pangu_quant.inference.model import load
from ms_pangu_quant.kernels.library import SETTING, library
from tests.conftest import MINI

KEYS = {"model", "phase", "batch_size", "prompt_len", "latency_ms", "tokens_per_s", "spread", "peak_rss_gib"}


def test_bench_has_a_row_for_each_model_phase_batch_and_length_and_its_figures_agree(quantized, capsys):
    arguments = ["--prompt-lens", "8,40", "--batch-sizes", "1,3", "--new-tokens", "2", "--repeats", "2", "--json"]
    assert main(["bench", str(quantized("w8a8")), "--against", str(MINI), *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = [(row["prompt_len"], row["batch_size"], row["model"], row["phase"]) for row in rows]
    models = ("float", "quantized")
    assert found == [(n, b, m, phase) for n in (8, 40) for b in (1, 3) for m in models for phase in ("prefill", "decode")]
    for row in rows:
        assert KEYS | {"limit_fraction"} <= set(row)
        tokens = row["batch_size"] * (row["prompt_len"] if row["phase"] == "prefill" else 1)
        assert row["tokens_per_s"] == pytest.approx(tokens / row["latency_ms"] * 1e3)
        assert row["spread"] >= 0
        assert 0.1 < row["peak_rss_gib"] < 16
        assert row["limit_fraction"] > 0
        if row["phase"] == "prefill":
            assert 0 < row["time_to_first_token_ms"] <= row["latency_ms"]


@pytest.mark.skipif(library() is None, reason="no C++ compiler, or kernels switched off")
def test_bench_rounds_the_head_of_the_quantized_model_alone(quantized, capsys):
    arguments = ["--against", str(MINI), "--prompt-lens", "8", "--batch-sizes", "1", "--new-tokens", "2", "--repeats", "1"]
    assert main(["bench", str(quantized("w8a8")), *arguments, "--head", "int8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert main(["bench", str(MINI), "--head", "int8"]) == 2
    assert "is a float checkpoint" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_device_that_takes_no_pieces_of_prompts_prefills_the_whole_batch_at_once(chunked):
    model = SimpleNamespace(network=SimpleNamespace(backend=SimpleNamespace(chunked_prefill=chunked)))
    passes = list(_passes([[0] * 300] * 3, model))
    if chunked:
        assert passes == [[(0, 0, 300), (1, 0, 212)], [(1, 212, 300), (2, 0, 300)]]
    else:
        assert passes == [[(0, 0, 300), (1, 0, 300), (2, 0, 300)]]


def test_the_work_of_a_token_is_counted_from_the_weights_in_memory(quantized):
    reader = QuantizedReader(quantized("w4a8_g128"))
    work = work_of(load(reader.directory, kv_cache_tokens=64), reader.plan)
    sites = reader.config.num_hidden_layers * sum(
        outputs * inputs for outputs, inputs in (layout.site_shape(reader.config, site) for site in layout.SITES)
    )
    assert (work.quantized, work.floating) == (sites, 0)
    assert work.head == reader.config.vocab_size * reader.config.hidden_size
    assert work.head_bytes == work.head * (2 if library() is not None else 4)
    scales_norms_and_biases = work.layer_bytes - sites // 2
    assert sites / 128 * 4 <= scales_norms_and_biases < sites / 128 * 4 * 1.3


def test_the_limit_of_a_phase_is_the_slower_of_arithmetic_and_memory():
    limits = MachineLimits(int8=100.0, fp32=10.0, bandwidth=1000.0)
    work = Work(quantized=50, floating=5, head=20, layer_bytes=300, head_bytes=100)
    assert work.seconds(limits, tokens=10, logits=1, passes=1) == 2 * 10 * 50 / 100 + 2 * (10 * 5 + 20) / 10
    integers = replace(work, integer_head=True)
    assert integers.seconds(limits, tokens=10, logits=1, passes=1) == 2 * (10 * 50 + 20) / 100 + 2 * 10 * 5 / 10
    assert work.seconds(MachineLimits(1e9, 1e9, 1000.0), tokens=1, logits=1, passes=3) == pytest.approx(3 * 400 / 1000)


def test_a_row_stands_beside_the_median_of_what_its_own_repetitions_measured(quantized, monkeypatch):
    model = load(quantized("w8a8"), kv_cache_tokens=64)
    work = Work(quantized=1, floating=1, head=1, layer_bytes=3000, head_bytes=1000)
    bandwidths = iter([1e4, 9e9, 2e4, 5e5, 1e5, 2e9])
    monkeypatch.setattr(MachineLimits, "measure", staticmethod(lambda: MachineLimits(1e12, 1e12, next(bandwidths))))
    rows, limits = bench([Subject("quantized", model, work)], [8, 16], [1], new_tokens=2, repeats=3)
    least = [row["limit_fraction"] * row["latency_ms"] / 1e3 for row in rows if row["phase"] == "decode"]
    assert least == pytest.approx([4000 / 2e4, 4000 / 5e5])
    assert limits == MachineLimits(1e12, 1e12, (1e5 + 5e5) / 2)


def test_the_peak_of_memory_is_the_models_own_and_never_that_of_measuring_the_machine(monkeypatch):
    """A process whose peak is the largest of what was ever asked of it: 8 a token of a model, 1000 of a measurement."""
    peak = 0

    def touch(amount):
        nonlocal peak
        peak = max(peak, amount)

    def forward(pieces, starts, tables, *, phase):
        touch(8 * sum(map(len, pieces)))
        return np.zeros((len(pieces), 16), np.float32)

    def measure():
        touch(1000)
        return MachineLimits(1e12, 1e12, 1e12)

    monkeypatch.setattr(MachineLimits, "measure", staticmethod(measure))
    monkeypatch.setattr(module, "_peak_rss", lambda: peak * 2**30)
    network = SimpleNamespace(backend=SimpleNamespace(chunked_prefill=True), model=SimpleNamespace())
    network.model.parameters_and_names = list
    config = SimpleNamespace(vocab_size=16)
    model = SimpleNamespace(network=network, config=config, caches=None, forward=forward)
    work = Work(quantized=1, floating=1, head=1, layer_bytes=1, head_bytes=1)
    rows, _ = bench([Subject("quantized", model, work)], [2, 5], [1, 3], new_tokens=2, repeats=3)
    found = {(row["prompt_len"], row["batch_size"]): row["peak_rss_gib"] for row in rows}
    assert found == {(2, 1): 16, (2, 3): 48, (5, 1): 48, (5, 3): 120}
    assert peak == 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-lens", "0"], "--prompt-lens: got '0'"),
        (["--batch-sizes", "1;2"], "--batch-sizes: got '1;2'"),
        (["--prompt-lens", "600"], "the model ends at 512"),
    ],
)
def test_bench_says_what_is_wrong_with_its_options(options, said, capsys):
    assert main(["bench", str(MINI), *options]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_bench_wants_the_float_checkpoint_to_compare_with(quantized, capsys):
    assert main(["bench", str(MINI), "--against", str(quantized("w8a8"))]) == 2
    assert "is quantized; wanted the float checkpoint" in capsys.readouterr().err.replace("\n", " ")


def test_bench_refuses_another_model_to_compare_with_before_it_loads_any(quantized, tmp_path, capsys, monkeypatch):
    """Of the same sizes but one: its speed would be compared all the same."""
    other = shutil.copytree(MINI, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))
    monkeypatch.setattr("ms_pangu_quant.inference.model.load", None)
    assert main(["bench", str(quantized("w8a8")), "--against", str(other)]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "rope_theta is 10000.0, wanted 500.0, as in" in said
    assert "not the same model" in said


def test_doctor_names_the_kernels_and_what_is_missing(capsys, monkeypatch):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    built = library()
    assert (found["kernels"] or {}).get("path") == (built.path if built else None)
    assert found["packages"]["mindspore"]
    assert found["devices"]["cpu"] == "available"
    assert found["memory"]["total"] > found["memory"]["available"] > 0
    monkeypatch.setenv(SETTING, "off")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "plain MindSpore operators are used" in said
    assert SETTING in said
