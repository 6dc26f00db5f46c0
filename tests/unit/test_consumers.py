"""formats/consumers.py: the table is complete, the documentation repeats it, and export is refused by it."""

import pytest
import yaml

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.errors import BackendError, RequestError
from ms_pangu_quant.formats.consumers import (
    DEQUANTIZED,
    FLOAT_CACHE,
    INT8_CACHE,
    INTEGER,
    MEMORY,
    REFUSES,
    UNKNOWN,
    WRONG,
    Facts,
    check_served,
    facts_of,
    read_table,
    rows_for,
    table,
)
from ms_pangu_quant.formats.reader import FORMATS
from ms_pangu_quant.formats.words import INT8_CACHE_WORD, WORDS
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import PRESETS, W4A8, W8A8, W8A8_STATIC

ROWS = table()

CONFIG = {
    "model_type": "PanguEmbedded",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}


def plan_of(chosen):
    """site name -> preset, for every block; others stay float."""
    config = ModelConfig.from_dict(CONFIG, where="test")
    names = layout.layer_names(config)
    schemes = {name: next((PRESETS[preset] for site, preset in chosen.items() if site in name), None) for name in names}
    return config, Plan.of_layers(schemes, config.num_hidden_layers)


def words(row):
    return [INT8_CACHE_WORD if scheme is None else WORDS[scheme] for scheme in row.schemes]


def markdown(row):
    """The row as docs/formats.md has it."""
    conditions = [
        *({True: ["with a bias"], False: ["without a bias"]}.get(row.biased, [])),
        *([] if row.group_sizes is None else [f"groups of {' or '.join(map(str, row.group_sizes))}"]),
    ]
    schemes = ", ".join(words(row)) + (f" ({', '.join(conditions)})" if conditions else "")
    schemes = schemes.replace("groups of 0", "per channel")
    said = (row.format, schemes, row.consumer, row.versions, row.verdict, row.known, row.note, row.source)
    return f"| {' | '.join(said)} |"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.format}-{row.consumer}-{words(row)[0]}-{row.verdict[:9]}")
def test_the_documentation_has_the_row_word_for_word(row, root):
    assert markdown(row) in (root / "docs/formats.md").read_text(encoding="utf-8").splitlines()


def test_the_documentation_has_no_other_row(root):
    lines = (root / "docs/formats.md").read_text(encoding="utf-8").splitlines()
    rows = {
        line for line in lines if line.startswith(tuple(f"| {name} | {word}" for name in FORMATS for word in ("W", "C8")))
    }
    assert rows == {markdown(row) for row in ROWS}


def test_the_file_has_a_row_for_every_scheme_in_every_format_and_no_other():
    found = {(row.format, scheme) for row in ROWS for scheme in row.schemes}
    assert found == {(name, scheme) for name in FORMATS for scheme in (*WORDS, None)}


def test_a_verdict_on_a_cache_is_of_a_cache_and_one_on_layers_of_layers():
    for row in ROWS:
        of_cache = row.schemes == (None,)
        assert of_cache or None not in row.schemes
        own = (INT8_CACHE, FLOAT_CACHE) if of_cache else (INTEGER, MEMORY, DEQUANTIZED)
        assert row.verdict in (*own, REFUSES, WRONG, UNKNOWN)


def test_the_file_is_read_once():
    assert table() is table()


LAWFUL = {
    "consumer": "MindFormers",
    "versions": "2.1",
    "schemes": ["w8a8", "int8_cache"],
    "verdict": INTEGER,
    "note": "how",
    "known": "read",
    "source": "-",
}


def test_a_row_of_the_file_calls_schemes_as_recipes_do_and_its_conditions_may_be_left_out():
    (row,) = read_table(yaml.safe_dump({"ascend": [LAWFUL]}), "a.yaml")
    assert (row.schemes, row.biased, row.group_sizes) == ((W8A8, None), None, None)
    assert words(row) == ["W8A8_DYNAMIC", "C8"]
    (row,) = read_table(yaml.safe_dump({"ascend": [{**LAWFUL, "biased": False, "group_sizes": [0, 64]}]}), "a.yaml")
    assert (row.biased, row.group_sizes) == (False, (0, 64))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verdikt": INTEGER}, "unknown key 'verdikt'.*did you mean 'verdict'"),
        ({"verdict": "fast"}, "verdict is 'fast', wanted one of: integer GEMM"),
        ({"verdict": None}, "verdict is None"),
        ({"schemes": ["W8A8"]}, "schemes is .*'W8A8'.*wanted a list of some of w8a8, w8a8_static, w4a8, int8_cache"),
        ({"schemes": "w8a8"}, "schemes is 'w8a8'"),
        ({"schemes": []}, "schemes is"),
        ({"schemes": [["w8a8"]]}, "schemes is"),
        ({"versions": 2.1}, r"versions is 2.1, wanted a text \(a number in quotes\)"),
        ({"known": "seen"}, "known is 'seen', wanted one of: executed, read, unknown"),
        ({"note": ""}, "note is ''"),
        ({"biased": "yes"}, "biased is 'yes', wanted true or false"),
        ({"group_sizes": 64}, "group_sizes is 64"),
        ({"group_sizes": [True]}, "group_sizes is"),
        ({"group_sizes": [-1]}, "group_sizes is"),
    ],
)
def test_a_row_that_is_not_one_is_an_error_that_names_it(change, said):
    text = yaml.safe_dump({"ascend": [LAWFUL, {**LAWFUL, **change}]})
    with pytest.raises(BackendError, match=rf"^a.yaml: ascend: row 2 \(MindFormers\): {said}"):
        read_table(text, "a.yaml")


@pytest.mark.parametrize("key", LAWFUL)
def test_a_row_without_one_of_its_keys_is_an_error_that_names_both(key):
    text = yaml.safe_dump({"ascend": [{name: value for name, value in LAWFUL.items() if name != key}]})
    with pytest.raises(BackendError, match=rf"ascend: row 1 .*{key} is None"):
        read_table(text, "a.yaml")


@pytest.mark.parametrize("text", ["ascnd: []", "ascend: 1", "- ascend", "", "ascend: [", "ascend: [1]"])
def test_a_file_that_is_no_table_is_an_error_of_one_line(text):
    with pytest.raises(BackendError, match=r"^a.yaml: ") as raised:
        read_table(text, "a.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("arithmetic", "group_size"),
    [(W8A8_STATIC, 0), (W8A8, 0), (W4A8, 0), (W4A8, 32)],
    ids=["W8A8", "W8A8_DYNAMIC", "W4A8", "W4A8 g32"],
)
@pytest.mark.parametrize("name", FORMATS)
def test_every_scheme_in_every_format_has_a_verdict_of_each_consumer_of_the_format(name, arithmetic, group_size, biased):
    rows = rows_for(name, Facts(arithmetic, group_size, biased))
    assert {row.consumer for row in rows} == {row.consumer for row in ROWS if row.format == name}
    assert all(row.verdict in (INTEGER, MEMORY, DEQUANTIZED, REFUSES, WRONG, UNKNOWN) for row in rows)
    assert all(row.note and row.source and row.versions for row in rows)


def test_int8_is_served_from_every_format_and_int4_from_two():
    for name in FORMATS:
        for arithmetic in (W8A8_STATIC, W8A8):
            check_served(name, [Facts(arithmetic, 0, True)])
    for name in ("mindformers", "compressed-tensors"):
        check_served(name, [Facts(W4A8, 128, True)])
    check_served("ascend", [Facts(W4A8, 128, False)])


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (Facts(W4A8, 128, True), "W4A8_DYNAMIC in groups of 128 with biases.*bias is not added"),
        (Facts(W4A8, 0, False), "W4A8_DYNAMIC in the ascend format.*divides by group_size 0"),
        (Facts(W4A8, 32, False), "groups of 32 in the ascend format.*64 and 128 only"),
    ],
)
def test_what_no_consumer_computes_is_refused_with_the_reason_and_the_way_out(facts, said):
    with pytest.raises(RequestError, match=said) as raised:
        check_served("ascend", [Facts(W8A8_STATIC, 0, True), facts])
    assert "use --format compressed-tensors or mindformers" in str(raised.value)


def test_the_facts_are_those_of_the_layers_of_each_arithmetic():
    """int4 in the MLP alone has no biases, and then there is a program that takes it."""
    facts = facts_of(*plan_of({"self_attn": "w8a8", "mlp": "w4a8_g128"}))
    assert facts == (Facts(W8A8, 0, True), Facts(W4A8, 128, False))
    check_served("ascend", facts)
    assert facts_of(*plan_of({"mlp.up_proj": "w8a8_static"})) == (Facts(W8A8_STATIC, 0, False),)
    assert {row.verdict for row in rows_for("ascend", Facts(W8A8_STATIC, 0, False)) if row.consumer == "MindFormers"} == {
        INTEGER
    }


def test_a_verdict_is_that_of_the_first_row_that_applies():
    every = [
        Facts(arithmetic, size, biased) for arithmetic in WORDS for size in (0, 32, 64, 128) for biased in (True, False)
    ]
    for facts in every:
        for name in FORMATS:
            for chosen in rows_for(name, facts):
                same = [row for row in ROWS if (row.format, row.consumer) == (name, chosen.consumer) and row.applies(facts)]
                assert same[0] is chosen
