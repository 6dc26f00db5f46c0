"""formats/packing.py: which int4 lies in which half of which byte, in both layouts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_pangu_quant.formats.packing import pack_along_out, pack_offset_along_in, unpack_along_out, unpack_offset_along_in


def random_codes(outputs, inputs, seed):
    return np.random.default_rng(seed).integers(-8, 8, (outputs, inputs)).astype(np.int8)


def test_a_hand_packed_vector_has_the_even_output_channel_in_the_low_nibble():
    """4 outputs, 3 inputs. Byte [i][o/2] = codes[o][i] & 15 | (codes[o+1][i] & 15) << 4; 0x9F as int8 is -97."""
    codes = np.array(
        [
            [-1, 3, -8],
            [-7, 2, 7],
            [0, 5, 1],
            [1, -5, 0],
        ],
        np.int8,
    )
    wanted = np.array(
        [
            [0x9F, 0x10],
            [0x23, 0xB5],
            [0x78, 0x01],
        ],
        np.uint8,
    ).view(np.int8)
    packed = pack_along_out(codes)
    assert packed.dtype == np.int8
    assert packed.tolist() == wanted.tolist()
    assert packed[0, 0] == -97
    assert unpack_along_out(wanted).tolist() == codes.tolist()


def test_every_pair_of_codes_makes_the_round_trip():
    low, high = (grid.reshape(-1).astype(np.int8) for grid in np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)))
    codes = np.stack([low, high])  # [2, 256]: every pair once
    packed = pack_along_out(codes)
    assert sorted(packed.view(np.uint8)[:, 0].tolist()) == list(range(256))
    back = unpack_along_out(packed)
    assert back.dtype == np.int8
    assert (back == codes).all()


def test_every_byte_makes_the_round_trip():
    packed = np.arange(256, dtype=np.uint8).view(np.int8).reshape(32, 8)
    codes = unpack_along_out(packed)
    assert codes.shape == (16, 32)
    assert codes.min() == -8
    assert codes.max() == 7
    assert (pack_along_out(codes) == packed).all()


@given(st.integers(1, 6).map(lambda half: 2 * half), st.integers(1, 9), st.integers(0, 1000))
def test_packed_bytes_are_transposed_and_half_as_many(outputs, inputs, seed):
    codes = random_codes(outputs, inputs, seed)
    packed = pack_along_out(codes)
    assert packed.shape == (inputs, outputs // 2)
    assert packed.nbytes * 2 == codes.nbytes
    assert (unpack_along_out(packed) == codes).all()


def test_memory_layout_of_the_codes_does_not_matter():
    codes = random_codes(6, 10, 0)
    assert (pack_along_out(np.asfortranarray(codes)) == pack_along_out(codes)).all()
    assert (pack_offset_along_in(np.asfortranarray(codes)) == pack_offset_along_in(codes)).all()
    assert (unpack_along_out(np.asfortranarray(pack_along_out(codes))) == codes).all()


def test_a_hand_packed_vector_of_the_cpu_layout_has_the_even_input_in_the_low_nibble():
    packed = pack_offset_along_in(np.array([[-8, 7, 0, -1], [1, 2, 7, -8]], np.int8))
    assert packed.dtype == np.uint8
    assert packed.tolist() == [[0xF0, 0x78], [0xA9, 0x0F]]


@pytest.mark.parametrize("seed", range(5))
def test_the_cpu_layout_equals_a_slow_loop(seed):
    codes = random_codes(5, 14, seed)
    wanted = [
        [(int(codes[row, 2 * pair]) + 8) + 16 * (int(codes[row, 2 * pair + 1]) + 8) for pair in range(7)]
        for row in range(5)
    ]
    assert pack_offset_along_in(codes).tolist() == wanted
    assert (unpack_offset_along_in(pack_offset_along_in(codes)) == codes).all()


def test_packing_leaves_its_input_alone():
    codes = random_codes(4, 4, 1)
    before = codes.copy()
    pack_along_out(codes)
    pack_offset_along_in(codes)
    assert (codes == before).all()
