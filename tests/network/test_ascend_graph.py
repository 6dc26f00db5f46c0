"""The graphs an NPU would run, exported on the CPU front end: every operator, type and shape of the linear layers.

The expected operators are written from CANN's documentation of them, not from the backend. No kernel is run.
"""

import functools
import json
from collections import Counter

import pytest

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.cli import main
from ms_pangu_quant.kernels.library import library
from ms_pangu_quant.network import runtime
from ms_pangu_quant.recipe.plan import BlockPlan, Plan
from ms_pangu_quant.recipe.scheme import PRESETS

SHAPES = {
    "1b": {"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 12, "num_key_value_heads": 6,
           "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 12800, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
SCHEMES = {"float": None, **{name: PRESETS[name] for name in ("w8a8", "w8a8_static", "w4a8", "w4a8_g256", "w4a8_g128")}}
VOCAB = 1024  # of the exported embedding and head: their size changes no other operator


def config_of(shape):
    raw = {"model_type": "PanguEmbedded", "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 32768}
    return ModelConfig.from_dict({**raw, **SHAPES[shape]}, where="test")


@functools.cache
def exported(shape, scheme, phase, layers=1):
    runtime.start("cpu", "graph")
    from ms_pangu_quant.backends.ascend import BACKEND
    from ms_pangu_quant.network.graph import exported_operators

    plan = Plan((BlockPlan((SCHEMES[scheme],) * len(layout.SITES)),) * layers)
    return exported_operators(config_of(shape), plan, BACKEND, phase=phase)


def linears(config):
    """(cell, inputs, outputs) of a layer's four matmuls, q/k/v and gate/up fused."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return [
        ("self_attention.linear_qkv", hidden, queries + 2 * keys),
        ("self_attention.linear_proj", queries, hidden),
        ("mlp.linear_fc1", hidden, 2 * inner),
        ("mlp.linear_fc2", inner, hidden),
    ]


def expected(scheme, k, n):
    """The operators of one matmul as (kind, input types, output types); ? is the number of tokens."""
    x, codes, out = f"bfloat16[?, {k}]", f"int8[?, {k}]", f"bfloat16[?, {n}]"
    dynamic = ("DynamicQuantExt", [x], [codes, "float[?]"])
    grouped = [f"qint4x2[1, {k}, {n // 2}]", f"float[1, {n}]", f"uint64[1, {k // 256}, {n}]", "float[?]", "int64[1]"]
    return {
        "float": [("MatMul", [x, f"bfloat16[{n}, {k}]"], [out])],
        "w8a8": [dynamic, ("QuantBatchMatmul", [codes, f"int8[{n}, {k}]", f"bfloat16[{n}]", "float[?]"], [out])],
        "w8a8_static": [
            ("QuantV2", [x, f"bfloat16[{k}]", f"int8[{k}]"], [codes]),
            ("QuantBatchMatmul", [codes, f"int8[{n}, {k}]", f"float[{n}]", f"int32[{n}]"], [out]),
        ],
        "w4a8": [dynamic, ("GroupedMatmulV4", [codes, *grouped], [out])],
        "w4a8_g256": [dynamic, ("GroupedMatmulV4", [codes, *grouped], [out])],
        "w4a8_g128": [
            ("WeightQuantBatchMatmul", [x, f"qint4x2[{k}, {n // 2}]", f"bfloat16[{k // 128}, {n}]"], [out]),
        ],
    }[scheme]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", ["1b", pytest.param("7b", marks=pytest.mark.slow)])
def test_every_linear_layer_is_the_documented_operator_and_no_float_matmul_is_left(shape, scheme, phase):
    operators = exported(shape, scheme, phase)
    config = config_of(shape)
    found = [
        (each.where, each.kind, list(map(str, each.inputs)), list(map(str, each.outputs)))
        for each in operators
        if "matmul" in each.kind.lower() or "quant" in each.kind.lower()
    ]
    hidden = config.hidden_size
    head = ("output_layer", "MatMul", [f"bfloat16[?, {hidden}]", f"bfloat16[{VOCAB}, {hidden}]"], [f"bfloat16[?, {VOCAB}]"])
    wanted = [
        (f"decoder.layers.0.{cell}", *operator)
        for cell, inputs, outputs in linears(config)
        for operator in expected(scheme, inputs, outputs)
    ]
    assert found == [*wanted, head]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_bias_is_added_exactly_once(scheme):
    operators = exported("1b", scheme, "decode")
    biases = [each.name for operator in operators for each in operator.inputs if each.name.endswith(".bias")]
    assert sorted(biases) == [
        "decoder.layers.0.self_attention.linear_proj.bias",
        "decoder.layers.0.self_attention.linear_qkv.bias",
    ]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_attention_norm_and_rope_are_ascend_operators_and_nothing_falls_back_to_python(phase):
    operators = exported("1b", "w8a8", phase, layers=2)
    count = {kind: sum(each.kind == kind for each in operators) for kind in {each.kind for each in operators}}
    attention = "FlashAttentionScore" if phase == "prefill" else "PagedAttention"
    assert (count["RmsNorm"], count["ApplyRotaryPosEmb"], count["ReshapeAndCache"], count[attention]) == (5, 2, 2, 2)
    assert not [kind for kind in count if "Py" in kind]  # PyExecute, PyInterpret: what only the interpreter can run


@pytest.mark.parametrize(("phase", "gathered"), [("prefill", 1), ("decode", 0), ("logits", 0)])
def test_only_prefill_picks_each_sequences_last_token(phase, gathered):
    """The phase "logits" is for comparing devices, position by position."""
    kinds = [each.kind for each in exported("1b", "float", phase)]
    assert kinds.count("CumsumExt") == gathered
    assert kinds.count("FlashAttentionScore") == (phase != "decode")


@pytest.mark.parametrize(
    ("group_size", "int4"), [(0, "GroupedMatmulV4"), (256, "GroupedMatmulV4"), (128, "WeightQuantBatchMatmul")]
)
def test_a_mixed_network_has_each_layers_own_operators(group_size, int4):
    runtime.start("cpu", "graph")
    from ms_pangu_quant.backends.ascend import BACKEND
    from ms_pangu_quant.network.graph import exported_operators

    other = {layout.DOWN_PROJ: PRESETS["w8a8"], layout.O_PROJ: None}
    block = BlockPlan(tuple(other.get(site, PRESETS["w4a8"].grouped(group_size)) for site in layout.SITES))
    operators = exported_operators(config_of("1b"), Plan((block,)), BACKEND, phase="decode")
    matmuls = {each.where: each.kind for each in operators if "matmul" in each.kind.lower()}
    assert matmuls == {
        "decoder.layers.0.self_attention.linear_qkv": int4,
        "decoder.layers.0.self_attention.linear_proj": "MatMul",
        "decoder.layers.0.mlp.linear_fc1": int4,
        "decoder.layers.0.mlp.linear_fc2": "QuantBatchMatmul",
        "output_layer": "MatMul",
    }


@pytest.mark.parametrize("phase", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_the_summary_of_a_deep_mixed_network_counts_what_its_whole_graph_holds(phase):
    """One and two layers of each kind are exported for it, and here all of them."""
    runtime.start("cpu", "graph")
    from ms_pangu_quant.backends.ascend import BACKEND
    from ms_pangu_quant.network.graph import exported_operators, operator_counts

    raw = {"model_type": "PanguEmbedded", "num_hidden_layers": 5, "vocab_size": 1024, "max_position_embeddings": 512}
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig.from_dict({**raw, **shape}, where="test")
    plain, mixed = (BlockPlan((PRESETS["w8a8"],) * 4 + (PRESETS[name],) * 3) for name in ("w8a8", "w4a8"))
    plan = Plan((plain, mixed, plain, plain, mixed))
    found = operator_counts(config, plan, BACKEND, phase=phase)
    whole = exported_operators(config, plan, BACKEND, phase=phase)
    wanted = Counter((each.kind, tuple(map(str, each.inputs)), tuple(map(str, each.outputs))) for each in whole)
    assert {(each.kind, each.inputs, each.outputs): each.count for each in found} == dict(wanted)
    grouped = [each for each in found if each.kind == "GroupedMatmulV4"]
    assert [(each.count, each.cells) for each in grouped] == [
        (2, ("decoder.layers.*.mlp.linear_fc1",)),
        (2, ("decoder.layers.*.mlp.linear_fc2",)),
    ]


@pytest.mark.parametrize(("device", "kind"), [("ascend", "QuantBatchMatmul"), ("cpu", None)])
def test_inspect_shows_the_graphs_of_a_directory(device, kind, quantized, capsys):
    assert main(["inspect", str(quantized("w8a8")), "--graph", "--device", device, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == {"W8A8_DYNAMIC": 28}
    assert set(found["phases"]) == {"prefill", "decode"}
    for operators in found["phases"].values():
        counts = Counter()
        for each in operators:
            counts[each["kind"]] += each["count"]
        if kind:
            assert counts[kind] == 16
        else:  # all blocks are one operator, if there is a compiler
            assert counts["QuantBatchMatmul"] == 0
            assert 1 <= counts["Custom"] <= 6 if library() else counts.total() > 20
    assert main(["inspect", str(quantized("w8a8")), "--graph", "--device", "tpu"]) == 2
    assert "wanted ascend or cpu" in capsys.readouterr().err
