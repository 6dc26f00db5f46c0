"""The prediction's arithmetic: hand-computed operators, scaling laws, and sizes that are known."""

import dataclasses

import pytest
import yaml

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.report.roofline import (
    PRECISIONS,
    Device,
    Operator,
    decode_seconds,
    load_device,
    memory_bytes,
    prefill_seconds,
)
from tools.ascend import fit_host

FIELDS = {field.name for field in dataclasses.fields(Device)}
UNIT = Device(**{**dict.fromkeys(FIELDS, 1.0), "operator_us": 1e-9, "cache_mib": 1e-9, "host_ms": 0, "layer_launch_ms": 0})


@pytest.fixture(scope="module")
def device():
    return load_device("atlas_a2")


@pytest.fixture(scope="module")
def model():
    shapes = {"hidden_size": 4096, "intermediate_size": 12800, "num_attention_heads": 32, "num_key_value_heads": 8}
    raw = {"model_type": "PanguEmbedded", "num_hidden_layers": 34, "vocab_size": 153376, "max_position_embeddings": 32768}
    return ModelConfig.from_dict({**raw, **shapes}, where="test")


@pytest.mark.parametrize(
    ("operator", "seconds"),
    [
        (Operator("matmul", 0, 3e12), 3.0),
        (Operator("matmul", 2e9, 1e12), 2.0),
        (Operator("matmul", 1e9, 1e12, "integer", 4e9), 5.0),
        (Operator("add", 0), 1e-15),
    ],
)
def test_an_operator_takes_the_longest_of_arithmetic_traffic_and_launch(operator, seconds):
    assert UNIT.seconds(operator) == pytest.approx(seconds)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_blocks_with_precisions_of_their_own_are_those_of_one_where_all_are_alike(device, model, precision):
    device = dataclasses.replace(device, host_ms=0, layer_launch_ms=0)
    alike = [dict.fromkeys(layout.FUSED, precision) for _ in range(model.num_hidden_layers)]
    assert decode_seconds(device, model, alike, 4, 512) == decode_seconds(device, model, precision, 4, 512)
    if precision == "w4a8":
        changed = [{**alike[0], layout.FC2: "w8a8"}, *alike[1:]]
        slower = decode_seconds(device, model, changed, 4, 512) - decode_seconds(device, model, alike, 4, 512)
        limits = device.bandwidth_gbytes * 1e9 * device.bandwidth_efficiency
        assert slower == pytest.approx(0.5 * model.hidden_size * model.intermediate_size / limits)


def test_activations_that_fit_in_the_cache_move_faster_and_weights_do_not():
    device = dataclasses.replace(UNIT, cache_mib=1000.0, cache_speedup=4.0)
    assert device.seconds(Operator("add", 1e9, weights=1e9)) == pytest.approx(1.25)
    assert device.seconds(Operator("add", 2e9, weights=1e9)) == pytest.approx(3.0)


def test_a_step_is_the_hosts_time_and_then_the_launches_or_the_device_whichever_takes_longer():
    device = dataclasses.replace(UNIT, host_ms=1000.0, layer_launch_ms=2000.0)
    matmuls = [Operator("matmul", 0, 3e12)] * 2
    assert device.step_seconds(matmuls, layers=2) == pytest.approx(1 + 6)
    assert device.step_seconds(matmuls, layers=4) == pytest.approx(1 + 8)
    assert UNIT.step_seconds(matmuls, layers=4) == pytest.approx(6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_device_twice_as_fast_in_everything_takes_half_as_long(precision, device, model):
    limits, times = ("fp16_tflops", "int8_tops", "bandwidth_gbytes"), ("operator_us", "host_ms", "layer_launch_ms")
    changed = {name: 2 * getattr(device, name) for name in limits} | {name: getattr(device, name) / 2 for name in times}
    faster = dataclasses.replace(device, **changed)
    for seconds in (prefill_seconds, decode_seconds):
        assert seconds(faster, model, precision, 4, 512) == pytest.approx(seconds(device, model, precision, 4, 512) / 2)


def test_where_only_arithmetic_counts_prefill_is_that_of_the_weights_and_of_attention(model):
    device = dataclasses.replace(UNIT, bandwidth_gbytes=1e15)
    weights, head = 34 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12800), 4096 * 153376
    attention = 34 * 4 * 4096 * 512 * 513 / 2
    wanted = (2 * 512 * weights + 2 * head + attention) / 1e12
    assert prefill_seconds(device, model, "float16", 1, 512) == pytest.approx(wanted, rel=1e-6)


def test_where_only_the_memory_counts_a_decode_step_reads_weights_and_cache_once(model):
    device = dataclasses.replace(UNIT, fp16_tflops=1e15, int8_tops=1e15, cache_mib=1e9, cache_speedup=1e9)
    linear, head, cache = 34 * 4096 * (6144 + 4096 + 3 * 12800), 2 * 4096 * 153376, 34 * 4 * 8 * 128 * 1000
    for precision, size in (("float16", 2), ("w8a8", 1), ("w4a8", 0.5)):
        wanted = (size * linear + head + cache) / 1e9
        assert decode_seconds(device, model, precision, 1, 1000) == pytest.approx(wanted, rel=1e-6)


def test_memory_is_the_checkpoints_and_the_cache_has_its_known_size(model):
    parameters = 8_031_000_000
    assert memory_bytes(model, "float16", 0) == pytest.approx(2 * parameters, rel=1e-3)
    assert memory_bytes(model, "float16", 1) - memory_bytes(model, "float16", 0) == 139_264
    quantized = 6.774e9
    for precision, saved in (("w8a8", 1.0), ("w4a8", 1.5)):
        assert memory_bytes(model, "float16", 0) - memory_bytes(model, precision, 0) == pytest.approx(
            saved * quantized, rel=2e-3
        )


def test_the_papers_prefill_speed_up_is_reproduced(device, model):
    speed_up = prefill_seconds(device, model, "float16", 4, 512) / prefill_seconds(device, model, "w8a8", 4, 512)
    assert speed_up == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: {fp16_tflops: 1}", "wanted exactly"),
        ("nothing", "not a device file"),
        ("parameters: {" + ", ".join(f"{name}: {-1 if name == 'int8_tops' else 1}" for name in FIELDS) + "}", "int8_tops"),
        (
            "parameters: {" + ", ".join(f"{name}: {3 if name == 'float_efficiency' else 1}" for name in FIELDS) + "}",
            "a share of at most 1",
        ),
    ],
)
def test_a_wrong_device_file_is_named(text, message, tmp_path):
    (tmp_path / "device.yaml").write_text(text)
    with pytest.raises(RequestError, match=message):
        load_device(str(tmp_path / "device.yaml"))


@pytest.mark.parametrize("name", ["atlas_a2", "ascend_910b2"])
def test_every_parameter_of_a_shipped_device_says_where_it_is_from(name, root):
    raw = yaml.safe_load((root / f"configs/devices/{name}.yaml").read_text())
    assert set(raw["notes"]) == set(raw["parameters"])


@pytest.fixture(scope="module")
def measured():
    return fit_host.read_rows(fit_host.DEVICE, load_device("ascend_910b2"))


def test_the_hosts_constants_are_the_fit_of_the_measured_rows(measured):
    best = min(fit_host.fit(measured), key=lambda found: found.rms)
    device = load_device("ascend_910b2")
    assert best.form == "host + max(launch * layers, device)"
    assert (device.host_ms, device.layer_launch_ms) == pytest.approx((best.host, best.launch), abs=1e-9)


def test_a_fit_finds_the_constants_its_rows_were_made_with():
    rows = [fit_host.Row("m", "p", layers, 2 * (5.0 + max(0.2 * layers, device),), device) for layers, device in
            ((20, 1.0), (20, 3.0), (30, 9.0), (40, 12.0))]  # fmt: skip
    found = fit_host.fit(rows)[-1]
    assert (found.host, found.launch, found.rms) == pytest.approx((5.0, 0.2, 0.0), abs=1e-9)


def test_what_is_predicted_for_the_measured_rows_is_near_what_was_measured(measured, model):
    device = load_device("ascend_910b2")
    for row in measured:
        step = device.host_ms + max(device.layer_launch_ms * row.layers, row.device)
        assert row.milliseconds[0] - 0.3 <= step <= row.milliseconds[1] + 0.3
    assert 1e3 * decode_seconds(device, model, "w8a8", 1, 256) == pytest.approx(19.75, abs=0.05)
