"""recipe/scheme.py: codes, divisors and arithmetic of every scheme, and the combinations that do not exist."""

import dataclasses

import pytest

from ms_pangu_quant.errors import RecipeError
from ms_pangu_quant.recipe.scheme import PRESETS, W4A8, W8A8, W8A8_STATIC, QuantScheme, TensorScheme

PER_TOKEN = TensorScheme(bits=8, granularity="token", dynamic=True)


@pytest.mark.parametrize(
    ("bits", "full_range", "code_min", "code_max", "divisor"),
    [
        (8, False, -127, 127, 127.0),
        (8, True, -128, 127, 127.5),  # arXiv:2512.23367: scale = 2 max|x| / (2^8 - 1)
        (4, False, -7, 7, 7.0),
        (4, True, -8, 7, 7.5),
    ],
)
def test_codes_and_divisor_are_those_of_the_two_ranges(bits, full_range, code_min, code_max, divisor):
    scheme = TensorScheme(bits=bits, granularity="channel", full_range=full_range)
    assert (scheme.code_min, scheme.code_max, scheme.divisor) == (code_min, code_max, divisor)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 3}, "bits: got 3"),
        ({"bits": 16}, "bits: got 16"),
        ({"granularity": "group"}, "group_size: got 0"),
        ({"granularity": "group", "group_size": -2}, "group_size: got -2"),
        ({"granularity": "group", "group_size": 7}, "even number"),
        ({"granularity": "channel", "group_size": 32}, "group_size: got 32"),
        ({"granularity": "channel", "group_size": -2}, "group_size: got -2"),
        ({"granularity": "row"}, "granularity"),
    ],
)
def test_a_tensor_scheme_that_makes_no_sense_cannot_be_made(fields, said):
    with pytest.raises(RecipeError, match=said):
        TensorScheme(**{"bits": 4, "granularity": "channel", **fields})


@pytest.mark.parametrize(
    ("weight", "activation", "said"),
    [
        (TensorScheme(8, "channel"), TensorScheme(4, "token", dynamic=True), "activation bits: got 4"),
        (TensorScheme(8, "channel", dynamic=True), PER_TOKEN, "dynamic weight"),
        (TensorScheme(4, "channel"), TensorScheme(8, "tensor"), "static activations"),
        (TensorScheme(8, "group", group_size=32), TensorScheme(8, "tensor"), "static activations"),
    ],
)
def test_a_pair_of_schemes_that_the_runtime_cannot_compute_cannot_be_made(weight, activation, said):
    with pytest.raises(RecipeError, match=said):
        QuantScheme(weight, activation)


def test_presets_are_what_their_names_say():
    found = {
        name: (
            scheme.arithmetic,
            scheme.weight.bits,
            scheme.weight.granularity,
            scheme.weight.group_size,
            scheme.activation.dynamic,
        )
        for name, scheme in PRESETS.items()
    }
    assert found == {
        "w8a8": (W8A8, 8, "channel", 0, True),
        "w8a8_static": (W8A8_STATIC, 8, "channel", 0, False),
        "w4a8": (W4A8, 4, "channel", 0, True),
        "w4a8_g128": (W4A8, 4, "group", 128, True),
        "w4a8_g256": (W4A8, 4, "group", 256, True),
        "w4a8_g64": (W4A8, 4, "group", 64, True),
        "w4a8_g32": (W4A8, 4, "group", 32, True),
    }
    assert all(scheme.activation.bits == 8 for scheme in PRESETS.values())


def test_8_bit_scales_are_bfloat16_because_mindformers_holds_them_so_and_4_bit_scales_are_float32():
    assert {name: scheme.weight.bfloat16_scale for name, scheme in PRESETS.items()} == {
        name: name.startswith("w8") for name in PRESETS
    }


def test_groups_are_one_but_for_group_schemes_where_the_size_must_divide():
    assert TensorScheme(8, "channel").groups(4096) == 1
    grouped = TensorScheme(4, "group", group_size=128)
    assert grouped.groups(12800) == 100
    with pytest.raises(RecipeError, match="group_size 128 does not divide the 100 inputs"):
        grouped.groups(100)


@pytest.mark.parametrize(
    ("name", "bits"), [("w8a8", 8.0078125), ("w4a8", 4.0078125), ("w4a8_g128", 4.25), ("w4a8_g32", 5.0)]
)
def test_bits_per_weight_count_a_32_bit_scale_per_channel_or_group(name, bits):
    assert PRESETS[name].bits_per_weight(4096) == bits


def test_the_range_is_a_property_of_the_weight_alone():
    for scheme in PRESETS.values():
        full = scheme.with_range(full_range=True)
        assert full.weight == dataclasses.replace(scheme.weight, full_range=True)
        assert full.activation == scheme.activation
        assert full.with_range(full_range=False) == scheme


def test_schemes_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["w8a8"].weight.bits = 4
    assert TensorScheme(8, "channel") == TensorScheme(8, "channel")
    assert len({scheme.with_range(full_range=full) for scheme in PRESETS.values() for full in (False, True)}) == 2 * len(
        PRESETS
    )
