"""formats/verify.py: a sound directory has no fault in any format, and every way to damage one is named."""

import json

import ml_dtypes
import numpy as np
import pytest

from ms_pangu_quant.calibration.statistics import InputStats
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import QuantizedLinear, RoundedBlock
from ms_pangu_quant.checkpoint.config import ASCEND_FILE, QUANTIZATION_FILE
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.writer import HASHES_FILE, REPORT_FILE, QuantizedWriter
from ms_pangu_quant.formats.against import law_of
from ms_pangu_quant.formats.reader import FORMATS
from ms_pangu_quant.formats.verify import verify
from ms_pangu_quant.quantizers.grid import relative_weight_error
from ms_pangu_quant.quantizers.rtn import RoundToNearest
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import PRESETS
from ms_pangu_quant.transforms.rotate import Rotate
from ms_pangu_quant.transforms.smooth import SmoothQuant
from tests.unit.edited import edit

SMOOTH = "transforms:\n  - smooth: {alpha: 0.5}\nrounding: rtn\n"
Q, UP, DOWN, O_PROJ = (
    f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
)


def stats_of(block, generator):
    """Made-up statistics with a few large channels, so that smoothing does something."""
    made = {}
    for name in layout.INPUT_NAMES:
        inputs = block.weight(layout.sites_reading(name)[0]).shape[1]
        x = generator.normal(size=(16, inputs)) * generator.lognormal(sigma=1.5, size=inputs)
        made[name] = InputStats.observe(x.astype(np.float32), gram=False, where=name)
    return made


@pytest.fixture
def quantized(make_checkpoint, tmp_path):
    """(scheme or {site: scheme}, format, bias, transforms, full range) -> (directory, source): the loop of the pipeline."""

    def make(
        scheme="w8a8", name="mindformers", *, bias=True, smooth=True, recipe=SMOOTH, full_range=False, shift=0, rewrite=None
    ):
        source = CheckpointReader(make_checkpoint("source", vocab_size=64, bias=bias, dtype="float32"))
        read = source if rewrite is None else rewrite(source)
        schemes = scheme if isinstance(scheme, dict) else dict.fromkeys([site.name for site in layout.SITES], scheme)
        generator, stored_as = np.random.default_rng(3), FORMATS[name]
        blocks, errors = [], []
        output = tmp_path / f"out-{name}"
        with QuantizedWriter(output, {}, blocks=2, resume=False) as writer:
            for index, block in enumerate(map(read.block, range(source.config.num_hidden_layers))):
                if smooth:
                    block, _ = SmoothQuant()(block, stats_of(block, generator))
                prefix, tensors, linears, error = layout.block_prefix(index), dict(block.tensors), {}, {}
                for site in layout.SITES:
                    if schemes.get(site.name) is None:
                        continue
                    preset = PRESETS[schemes[site.name]].with_range(full_range=full_range)
                    weight = tensors.pop(f"{site.name}.weight")
                    made = RoundToNearest()(weight, preset.weight, None)
                    if shift:  # another rounding than to nearest
                        made.codes[:, ::3] = np.clip(made.codes[:, ::3] + shift, -7, 7)
                    static = not preset.activation.dynamic
                    linears[site] = QuantizedLinear(preset, made, 21.25 if static else None)
                    error[site.name] = relative_weight_error(made, weight)
                for site, linear in linears.items():
                    stored = stored_as.encode(block, site, linear)
                    tensors.update({f"{site.name}.{key}": value for key, value in stored.items()})
                writer.write_block({prefix + key: value for key, value in tensors.items()}, {})
                errors.append({"weight_error": error})
                blocks.append(RoundedBlock(block, {site.name: linear for site, linear in linears.items()}).plan)
            files = stored_as.metadata(read.config, Plan(tuple(blocks)))
            if recipe is not None:
                files[REPORT_FILE] = {"recipe": {"text": recipe}, "blocks": errors}
            outer = {each: read.files.entries[each] for each in layout.outer_shapes(read.config)}
            writer.finish(outer, source.directory, files)
        return output, source

    return make


MIXED = {
    "self_attn.q_proj": "w8a8_static",
    "self_attn.k_proj": "w8a8_static",
    "self_attn.v_proj": "w8a8_static",
    "mlp.gate_proj": "w4a8_g32",
    "mlp.up_proj": "w4a8_g32",
    "mlp.down_proj": "w8a8",
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_g32", "w8a8_static", MIXED], ids=str)
def test_what_was_rounded_to_nearest_after_smoothing_obeys_the_half_step_law(quantized, scheme, bias, name):
    directory, source = quantized(scheme, name, bias=bias)
    found = verify(directory, source)
    assert found.faults == ()
    assert found.notes == ()
    assert found.layers == 2 * (7 if isinstance(scheme, str) else 6)


def test_the_full_range_of_codes_obeys_it_too(quantized):
    directory, source = quantized("w4a8_g32", full_range=True)
    assert verify(directory, source).faults == ()


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("site", layout.SITES, ids=lambda site: site.name)
def test_one_code_that_is_off_breaks_it(quantized, site, bias):
    """By one step; by two in rows that have a free scale, which can give way by half a step."""
    directory, source = quantized("w8a8", bias=bias)
    name = f"model.layers.1.{site.name}.weight"

    def one_off(tensors):
        row, column = 5, int(np.abs(tensors[name][5].astype(int)).argsort()[-3])
        steps = 2 if site.name == "mlp.up_proj" or (site.name == "self_attn.v_proj" and not bias) else 1
        tensors[name][row, column] -= steps * np.sign(tensors[name][row, column])

    edit(directory, one_off)
    (fault,) = verify(directory, source).faults
    assert fault.startswith(f"{name}: 1 of ")
    assert "half a step" in fault


def test_another_float_checkpoint_breaks_it_everywhere(quantized, make_checkpoint):
    directory, _ = quantized("w8a8")
    other = CheckpointReader(make_checkpoint("other", seed=1, vocab_size=64, dtype="float32"))
    faults = verify(directory, other).faults
    assert len(faults) == 14
    assert all("half a step" in fault for fault in faults)


def test_a_float_checkpoint_of_another_size_is_named(quantized, make_checkpoint):
    directory, _ = quantized("w8a8")
    other = CheckpointReader(make_checkpoint("other", vocab_size=64, intermediate_size=96))
    assert verify(directory, other).faults == (
        "config.json: intermediate_size is 128, wanted 96 as in the float checkpoint",
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("num_attention_heads", 2, "2"), ("rope_theta", 500.0, "500.0"), ("rms_norm_eps", 0.1, "0.1"), ("bias", False, "[]")],
)
def test_a_float_checkpoint_of_another_function_is_named_and_its_weights_are_not_compared(
    key, value, told, quantized, make_checkpoint
):
    directory, source = quantized("w8a8")
    wanted = {"head_dim": source.config.head_dim, key: value}
    other = CheckpointReader(make_checkpoint("other", seed=1, vocab_size=64, dtype="float32", **wanted))
    (fault,) = verify(directory, other).faults
    assert fault.startswith("config.json: ")
    assert key in fault
    assert f"wanted {told} as in the float checkpoint" in fault


def test_a_head_may_come_untied_but_not_tied(quantized, make_checkpoint):
    """A rotation gives a tied head a tensor of its own; nothing takes one away."""
    directory, tied = quantized("w8a8", "compressed-tensors")
    untied = CheckpointReader(make_checkpoint("untied", vocab_size=64, dtype="float32", tie_word_embeddings=False))
    (fault,) = verify(directory, untied).faults
    assert fault == "config.json: tie_word_embeddings is true, but the float checkpoint's head is a tensor of its own"
    edit(directory, lambda tensors: tensors.update({layout.HEAD: tensors[layout.EMBEDDING]}))
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    assert verify(directory, tied).faults == ()


def test_other_roundings_are_held_to_the_errors_of_their_report(quantized):
    directory, source = quantized("w8a8", recipe=SMOOTH.replace("rtn", "gptq"), shift=1)
    found = verify(directory, source)
    assert found.faults == ()
    assert "half-step law is not checked: 'gptq'" in found.notes[0]
    path = directory / REPORT_FILE
    report = json.loads(path.read_text())
    report["blocks"][1]["weight_error"]["mlp.gate_proj"] *= 1.1
    path.write_text(json.dumps(report))
    (changed, fault) = verify(directory, source).faults
    assert changed.startswith(str(path))
    assert fault.startswith("model.layers.1.mlp.gate_proj.weight: relative error")


@pytest.mark.parametrize(
    ("rounding", "held_to_half_a_step"),
    [("rtn", True), ("{rtn: {scale: absmax}}", True), ("{rtn: {scale: mse}}", False), ("{gptq: {sweeps: 1}}", False)],
)
@pytest.mark.parametrize("transform", ["smooth", "smooth_search"])
def test_only_plain_rounding_is_held_to_half_a_step(transform, rounding, held_to_half_a_step, quantized):
    directory, _ = quantized("w8a8", recipe=f"transforms: [{transform}]\nrounding: {rounding}\n")
    law = law_of(directory)
    assert law.half_step == held_to_half_a_step
    assert bool(law.errors) != held_to_half_a_step


@pytest.mark.parametrize("settings", [{}, {"seed": 3, "heads": False, "kind": "orthogonal"}])
@pytest.mark.parametrize("rounding", ["rtn", "{rtn: {scale: mse}}"])
def test_rotated_weights_are_compared_with_the_checkpoint_rotated_alike(settings, rounding, quantized, make_checkpoint):
    recipe = f"transforms: [{{rotate: {json.dumps(settings)}}}, smooth]\nrounding: {rounding}\n"
    directory, source = quantized("w8a8", recipe=recipe, rewrite=Rotate(**settings))
    found = verify(directory, source)
    assert found.faults == ()
    assert len(found.notes) == (rounding != "rtn")
    other = CheckpointReader(make_checkpoint("other", seed=1, vocab_size=64, dtype="float32"))
    assert verify(directory, other).faults


def test_what_another_transform_mixed_is_not_compared_and_that_is_said(quantized):
    directory, source = quantized("w8a8", recipe="transforms: [mixed]\n")
    found = verify(directory, source)
    assert found.faults == ()
    assert found.notes == ("weights are not compared: transform 'mixed' does more than scale channels",)


def test_without_a_report_weights_must_be_near(quantized, make_checkpoint):
    directory, source = quantized("w8a8", recipe=None)
    found = verify(directory, source)
    assert found.faults == ()
    assert "not there" in found.notes[0]
    other = CheckpointReader(make_checkpoint("other", seed=1, vocab_size=64, dtype="float32"))
    assert "not the rounding of" in verify(directory, other).faults[0]


def scaled(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].reshape(-1)[2] = value

    return change


DAMAGE = {  # (change of the tensors, what one line must say)
    "missing": (lambda t: t.pop(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale: is missing"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight: is missing"),
    "extra": (lambda t: t.update({f"{UP}.smooth_scale": np.ones(3, np.float32)}), f"{UP}.smooth_scale: is no tensor"),
    "transposed": (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].T}), f"{DOWN}.weight: got int8 [128, 64]"),
    "float codes": (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].astype(np.float32)}), f"{DOWN}.weight: got"),
    "negative scale": (scaled(f"{DOWN}.weight_scale", -1), f"{DOWN}.weight_scale: 1 of 64 scales"),
    "zero scale": (scaled(f"{UP}.weight_scale", 0), f"{UP}.weight_scale: 1 of 256 scales"),
    "infinite scale": (scaled(f"{Q}.deq_scale", np.inf), f"{Q}.deq_scale: 1 of 64 scales"),
    "not a number": (scaled(f"{DOWN}.weight_scale", np.nan), f"{DOWN}.weight_scale: 1 of 64 scales"),
    "infinite norm": (
        scaled("model.layers.1.input_layernorm.weight", np.inf),
        "model.layers.1.input_layernorm.weight: has",
    ),
    "infinite embedding": (scaled("model.embed_tokens.weight", np.inf), "model.embed_tokens.weight: has"),
    "infinite bias": (scaled(f"{Q}.bias", np.nan), f"{Q}.bias: has"),
    "another correction": (scaled(f"{Q}.quant_bias", 5), f"{Q}.quant_bias: is not"),
    "inputs of q alone": (
        lambda t: t.update({f"{Q}.input_scale": np.full(64, 2, ml_dtypes.bfloat16)}),
        "read the same input and need the same scale",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tensor_is_named(quantized, damage):
    directory, source = quantized(MIXED)
    change, said = DAMAGE[damage]
    edit(directory, change)
    faults = verify(directory, source).faults
    assert any(said in fault for fault in faults), faults
    assert all("\n" not in fault for fault in faults)


def test_every_fault_gets_its_line_not_only_the_first(quantized):
    directory, _ = quantized(MIXED)

    def change(tensors):
        for fault in ("missing", "extra", "zero scale", "infinite norm"):
            DAMAGE[fault][0](tensors)

    edit(directory, change)
    faults = verify(directory).faults
    wanted = [DAMAGE[fault][1] for fault in ("missing", "extra", "zero scale", "infinite norm")]
    assert all(any(said in fault for fault in faults) for said in wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_one_changed_bit_anywhere_is_found_by_the_recorded_hashes(quantized, name):
    directory, _ = quantized("w8a8", name)
    files = sorted(path for path in directory.iterdir() if path.name != HASHES_FILE)
    for path in files:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert any(str(path) in fault for fault in verify(directory).faults)
        path.write_bytes(before)
    assert verify(directory).faults == ()


@pytest.mark.parametrize(("name", "file"), [("mindformers", QUANTIZATION_FILE), ("ascend", ASCEND_FILE)])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("model.layers.0.mlp.up_proj.weight_scale", None), "weight_scale is None, but it is stored as"),
        (lambda d: d.update({"model.norm.weight": "W8A8"}), "model.norm.weight is 'W8A8', but it is stored as FLOAT"),
        (lambda d: d.update({"model.layers.9.mlp.up_proj.weight": "W8A8"}), "described as 'W8A8', but not stored"),
        (lambda d: d.update({"model.layers.0.mlp.up_proj.weight": "FLOAT"}), "model.layers.0.mlp.up_proj.weight: got int8"),
        (lambda d: d.update({"model.layers.0.mlp.up_proj.weight": "W2A2"}), "is 'W2A2', wanted"),
    ],
)
def test_a_description_that_does_not_agree_with_the_tensors_is_named(quantized, name, file, change, said):
    directory, _ = quantized("w8a8", name)
    description = json.loads((directory / file).read_text())
    change(description)
    (directory / file).write_text(json.dumps(description))
    assert any(said in fault for fault in verify(directory).faults)


def test_layers_that_are_computed_as_one_need_one_scheme(quantized):
    directory, _ = quantized({**MIXED, "self_attn.v_proj": "w8a8"})
    said = "v_proj: W8A8_DYNAMIC; these layers are computed as one"
    assert sum(said in fault for fault in verify(directory).faults) == 2  # one for each block


def test_two_descriptions_are_one_too_many(quantized):
    directory, _ = quantized("w8a8")
    (directory / ASCEND_FILE).write_text("{}")
    assert any("a loader may take either" in fault for fault in verify(directory).faults)


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_directory_that_cannot_be_opened_is_a_fault_and_no_exception(quantized, tmp_path, content):
    directory, _ = quantized("w8a8")
    (directory / "config.json").write_bytes(content)
    assert any("config.json" in fault for fault in verify(directory).faults)
    assert "no such directory" in verify(tmp_path / "nowhere").faults[0]
