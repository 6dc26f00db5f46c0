"""The C++ kernels without MindSpore: integers against NumPy's int64, on every path this CPU has."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

from ms_pangu_quant.formats import packing
from ms_pangu_quant.kernels.library import PATHS, SETTING, library
from ms_pangu_quant.quantizers.kv_cache import QuantizedCache, grid_of_range
from ms_pangu_quant.transforms.hadamard import hadamard_core, hadamard_factors, multiply, online_scale

BEST = library()
if BEST is None:
    pytest.skip("no C++ compiler, or kernels switched off", allow_module_level=True)

F32 = np.float32


@pytest.fixture(params=PATHS[: PATHS.index(BEST.best) + 1])
def kernels(request, monkeypatch):
    monkeypatch.setenv(SETTING, request.param)
    yield library().functions
    monkeypatch.undo()
    library()


def call(functions, name, inputs, shape):
    """Run an operator by the calling convention MindSpore uses; the output is filled with NaN first."""
    arrays = [*(np.ascontiguousarray(x) for x in inputs), np.full(shape, np.nan, F32)]
    count = len(arrays)
    shapes = [(ctypes.c_int64 * x.ndim)(*x.shape) for x in arrays]
    code = getattr(functions, name)(
        count,
        (ctypes.c_void_p * count)(*[x.ctypes.data for x in arrays]),
        (ctypes.c_int * count)(*[x.ndim for x in arrays]),
        (ctypes.c_void_p * count)(*[ctypes.addressof(x) for x in shapes]),
        None,
        None,
        None,
    )
    assert code == 0
    return arrays[-1]


def packed_w8(functions, codes):
    out = codes.copy()
    functions.pangu_pack_w8(out.ctypes.data, *codes.shape)
    return out


def packed_w4(functions, codes, group, scale):
    weight, scale = packing.pack_offset_along_in(codes), scale.copy()
    functions.pangu_pack_w4(weight.ctypes.data, *codes.shape, group)
    functions.pangu_pack_scale(scale.ctypes.data, *scale.shape)
    return weight, scale


def per_token(x):
    scale = np.abs(x).max(1, keepdims=True) / F32(127)
    return np.rint(x / np.maximum(scale, np.finfo(F32).tiny)).astype(np.int64), scale


def product(codes, weight):
    return (codes @ weight.astype(np.int64).T).astype(F32)


def w8a8(functions, x, weight, scale=None, bias=None):
    scale = np.ones(len(weight), F32) if scale is None else scale
    bias = np.zeros(1, F32) if bias is None else bias
    return call(functions, "PanguW8A8Dynamic", [x, packed_w8(functions, weight), scale, bias], (len(x), len(weight)))


def w4a8(functions, x, weight, scale, bias=None):
    packed = packed_w4(functions, weight, weight.shape[1] // scale.shape[1], scale)
    bias = np.zeros(1, F32) if bias is None else bias
    return call(functions, "PanguW4A8Dynamic", [x, *packed, bias], (len(x), len(weight)))


# One of everything, exact multiples of the tile, one more and one less, more rows than a tile, K longer than a slice.
SHAPES = [(1, 1, 1), (1, 64, 64), (7, 65, 66), (3, 200, 130), (13, 130, 4100), (5, 63, 9), (70, 17, 30), (515, 3, 8)]


def floats(functions, x, weight, bias=None, *, kind="PanguFloat"):
    packed, bias = weight.copy(), np.zeros(1, F32) if bias is None else bias
    pack = functions.pangu_pack_f32 if kind == "PanguFloat" else functions.pangu_pack_bfloat16
    pack(packed.ctypes.data, *weight.shape)
    return call(functions, kind, [x, packed, bias], (len(x), len(weight)))


def kinds(functions):
    """Of float layers on the path that is chosen."""
    return ["PanguFloat", "PanguBfloat16"][: 1 + bool(functions.pangu_bfloat16())]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_float_layer_is_the_product_whatever_the_order_of_its_sums(shape, kernels):
    rows, outputs, inputs = shape
    for kind in kinds(kernels):
        rng = np.random.default_rng(inputs)
        x, weight, bias = (rng.integers(-32, 33, each).astype(F32) for each in ((rows, inputs), (outputs, inputs), outputs))
        exact = x @ weight.T + bias  # integers below 2^24
        assert np.array_equal(floats(kernels, x, weight, bias, kind=kind), exact)
        x, weight = rng.normal(size=x.shape).astype(F32), rng.normal(size=weight.shape).astype(F32)
        found = floats(kernels, x, weight, kind=kind)
        if kind == "PanguBfloat16":
            x, weight = (each.astype(ml_dtypes.bfloat16).astype(F32) for each in (x, weight))
        assert np.abs(found - x.astype(np.float64) @ weight.T).max() <= 1e-5 * np.sqrt(inputs)


def test_a_row_of_a_float_layer_is_the_same_alone_and_among_others_and_on_any_number_of_threads(kernels):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(21, 1500)).astype(F32), rng.normal(size=(200, 1500)).astype(F32)
    x[5, 7] = np.nan
    threads = kernels.pangu_threads(0)
    for kind in kinds(kernels):
        together = floats(kernels, x, weight, kind=kind)
        for count in (1, 2, 5):
            parts = [floats(kernels, x[start : start + count], weight, kind=kind) for start in range(0, 21, count)]
            assert np.array_equal(np.concatenate(parts), together, equal_nan=True)
        assert np.isnan(together[5]).all()
        assert np.isfinite(np.delete(together, 5, axis=0)).all()
        try:
            for count in (1, 3):
                kernels.pangu_threads(count)
                assert np.array_equal(floats(kernels, x, weight, kind=kind), together, equal_nan=True)
        finally:
            kernels.pangu_threads(threads)


@pytest.mark.parametrize("shape", SHAPES)
def test_w8a8_has_the_exact_integers_and_the_floats_of_the_definition(shape, kernels):
    rows, outputs, inputs = shape
    rng = np.random.default_rng(inputs)
    x = rng.normal(size=(rows, inputs)).astype(F32)
    weight = rng.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    scale, bias = rng.uniform(0.1, 1, outputs).astype(F32), rng.normal(size=outputs).astype(F32)
    codes, token_scale = per_token(x)
    assert np.array_equal(w8a8(kernels, x, weight, scale, bias), product(codes, weight) * (token_scale * scale) + bias)
    factor, offset = rng.uniform(0, 60, inputs).astype(F32), rng.integers(-9, 9, inputs).astype(np.int8)
    sum_bias = rng.integers(-999, 999, outputs).astype(np.int32)
    codes = np.clip(np.rint(x * factor) + offset, -128, 127).astype(np.int64)
    got = call(
        kernels,
        "PanguW8A8Static",
        [x, packed_w8(kernels, weight), scale, factor, offset, sum_bias, bias],
        (rows, outputs),
    )
    assert np.array_equal(got, (product(codes, weight) + sum_bias.astype(F32)) * scale + bias)


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((1, 2, 2), 2),
        ((7, 65, 66), 66),
        ((7, 65, 66), 22),
        ((7, 65, 66), 2),
        ((3, 130, 130), 26),
        ((6, 64, 256), 128),
        ((13, 130, 4100), 4100),
        ((13, 64, 4100), 50),
        ((2, 96, 12800), 128),
        ((20, 10, 96), 32),
    ],
)
def test_w4a8_has_the_exact_integers_and_the_floats_of_the_definition(shape, group, kernels):
    rows, outputs, inputs = shape
    rng = np.random.default_rng(group)
    x = rng.normal(size=(rows, inputs)).astype(F32)
    weight = rng.integers(-8, 8, (outputs, inputs)).astype(np.int8)
    scale = rng.uniform(0.1, 1, (outputs, inputs // group)).astype(F32)
    bias = rng.normal(size=outputs).astype(F32)
    codes, token_scale = per_token(x)
    if group == inputs:
        wanted = product(codes, weight) * (token_scale * scale.T)
    else:
        wanted = np.zeros((rows, outputs), F32)
        for index in range(inputs // group):
            part = slice(index * group, (index + 1) * group)
            wanted = wanted + product(codes[:, part], weight[:, part]) * scale[:, index]
        wanted = wanted * token_scale
    assert np.array_equal(w4a8(kernels, x, weight, scale, bias), wanted + bias)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("code", [-128, 127])
def test_the_longest_sums_of_the_largest_codes_do_not_saturate(code, sign, kernels):
    x, inputs = np.full((2, 12800), sign, F32), 12800
    wanted = np.full((2, 65), sign * 127 * code * inputs, np.int64).astype(F32)
    assert np.array_equal(w8a8(kernels, x * 127, np.full((65, inputs), code, np.int8)), wanted)
    nibble = code // 16
    wanted = wanted // code * nibble
    assert np.array_equal(w4a8(kernels, x * 127, np.full((65, inputs), nibble, np.int8), np.ones((65, 1), F32)), wanted)


def test_minus_128_times_minus_128_over_12800_inputs_is_exact(kernels):
    x, weight = np.full((1, 12800), -1e9, F32), np.full((64, 12800), -128, np.int8)
    one, zero = np.ones(12800, F32), np.zeros(12800, np.int8)
    inputs = [x, packed_w8(kernels, weight), np.ones(64, F32), one, zero, np.zeros(64, np.int32), np.zeros(1, F32)]
    assert (call(kernels, "PanguW8A8Static", inputs, (1, 64)) == 128 * 128 * 12800).all()


def test_half_codes_are_rounded_to_even(kernels):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]], F32)
    assert w8a8(kernels, x, np.eye(8, dtype=np.int8)).tolist() == [[127, 0, 2, 2, 0, -2, 126, -126]]


def test_a_row_of_zeros_gives_zeros_and_a_row_of_denormals_does_not_blow_up(kernels):
    x = np.zeros((2, 64), F32)
    x[1] = 1e-44
    assert np.array_equal(w8a8(kernels, x, np.ones((3, 64), np.int8))[0], [0, 0, 0])
    assert np.isfinite(w8a8(kernels, x, np.ones((3, 64), np.int8))).all()
    assert call(kernels, "PanguW8A8Dynamic", [x[:0], np.ones((3, 64), np.int8), x[0, :3], x[0, :1]], (0, 3)).size == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_makes_its_own_row_nan_and_no_other(bad, kernels):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(9, 66)).astype(F32), rng.integers(-8, 8, (70, 66)).astype(np.int8)
    scale = np.ones((70, 3), F32)
    good = w8a8(kernels, x, weight), w4a8(kernels, x, weight, scale)
    x[4, 65] = bad
    for before, after in zip(good, (w8a8(kernels, x, weight), w4a8(kernels, x, weight, scale)), strict=True):
        assert np.isnan(after[4]).all()
        assert np.array_equal(np.delete(before, 4, 0), np.delete(after, 4, 0))


def test_every_path_and_every_number_of_threads_gives_the_same_bits(monkeypatch):
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(37, 1536)).astype(F32), rng.integers(-8, 8, (200, 1536)).astype(np.int8)
    scale = rng.uniform(size=(200, 12)).astype(F32)
    results = []
    threads = BEST.threads
    for path in PATHS[: PATHS.index(BEST.best) + 1]:
        for count in (1, 3):
            monkeypatch.setenv(SETTING, path)
            functions = library().functions
            assert functions.pangu_threads(count) == count
            results.append((w8a8(functions, x, weight).tobytes(), w4a8(functions, x, weight, scale).tobytes()))
    BEST.functions.pangu_threads(threads)
    monkeypatch.undo()
    library()
    assert len(set(results)) == 1


def test_a_tokens_result_does_not_depend_on_the_batch(kernels):
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(23, 320)).astype(F32), rng.integers(-8, 8, (70, 320)).astype(np.int8)
    scale = rng.uniform(size=(70, 10)).astype(F32)
    together = w8a8(kernels, x, weight), w4a8(kernels, x, weight, scale)
    for row in range(len(x)):
        alone = w8a8(kernels, x[row : row + 1], weight), w4a8(kernels, x[row : row + 1], weight, scale)
        assert np.array_equal(alone[0][0], together[0][row])
        assert np.array_equal(alone[1][0], together[1][row])


@pytest.mark.parametrize("shape", [(2, 2), (130, 66), (258, 300)])
def test_the_stored_int4_layout_is_turned_as_numpy_turns_it(shape):
    codes = np.random.default_rng(3).integers(-8, 8, shape).astype(np.int8)
    stored, out = packing.pack_along_out(codes), np.empty((shape[0], shape[1] // 2), np.uint8)
    BEST.functions.pangu_transpose_w4(stored.ctypes.data, out.ctypes.data, *shape)
    assert np.array_equal(out, packing.pack_offset_along_in(codes))


@pytest.mark.parametrize("hidden", [1, 16, 24, 100, 1536])
def test_the_norm_is_the_definition(hidden, kernels):
    rng = np.random.default_rng(hidden)
    x, weight = rng.normal(size=(9, hidden)).astype(F32), rng.normal(size=hidden).astype(F32)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight
    got = call(kernels, "PanguRMSNorm", [x, weight, np.array([1e-5], F32)], x.shape)
    assert np.abs(got - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_swiglu_is_the_definition_from_minus_infinity_to_infinity(kernels):
    gate = np.concatenate([np.linspace(-120, 120, 1999), [np.inf, np.nan]]).astype(F32)
    x = np.concatenate([gate, np.full_like(gate, 3)])[None]
    got = call(kernels, "PanguSwiGLU", [x], (1, len(gate)))[0].astype(np.float64)
    wide = gate[:-2].astype(np.float64)
    wanted = 3 * wide / (1 + np.exp(-wide))
    assert np.abs(got[:-2] - wanted).max() < 4e-7 * 360
    assert (np.abs(got[:-2] - wanted) <= 4e-7 * np.abs(wanted) + 1e-34).all()
    assert got[-2] == np.inf
    assert np.isnan(got[-1])


def hadamard(functions, x):
    core = hadamard_core(x.shape[1])
    bits = (core.T < 0).reshape(len(core), -1, 4) @ np.array([1, 2, 4, 8])
    return call(functions, "PanguHadamard", [x, bits.astype(np.uint8), np.array([online_scale(x.shape[1])], F32)], x.shape)


def hadamard_as_written(x):
    """float32 additions in the order that hadamard.h names."""
    core, y = hadamard_core(x.shape[1]).astype(F32), x * F32(online_scale(x.shape[1]))
    columns, stride = x.shape[1] // len(core), 1
    while stride < columns:
        pairs = y.reshape(-1, 2, stride)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        stride *= 2
    y, out = y.reshape(len(x), len(core), 1, columns), None
    for row in range(0, len(core), 4):
        a, b, c, d = (y[:, row + i] * core[row + i][:, None] for i in range(4))  # [rows, outputs of the core, columns]
        four = (a + b) + (c + d)
        out = four if out is None else out + four
    return out.reshape(x.shape)


# Powers of two from the least on; the core alone, beside less than a vector of any width, and beside many; those of models.
HADAMARD_SIZES = [4, 8, 16, 64, 2048, 12, 20, 40, 80, 160, 320, 36 * 16, 12 * 64, 12 * 128, 12 * 512, 76 * 128, 100 * 128]


@pytest.mark.parametrize("size", HADAMARD_SIZES)
def test_a_hadamard_matrix_is_added_up_in_the_order_written_on_every_path(size, kernels):
    """The same bits on every path, therefore; and the matrix that a checkpoint was rotated with, up to float32 rounding."""
    x = np.random.default_rng(size).normal(size=(3, size)).astype(F32) * np.array([[1], [1e-3], [1e4]], F32)
    got = hadamard(kernels, x)
    assert np.array_equal(got, hadamard_as_written(x))
    exact = multiply(x.astype(np.float64), hadamard_factors(size)) * (np.sqrt(size) * online_scale(size))
    core = len(hadamard_core(size))
    additions = np.log2(size / core) + 1 + core / 4  # one after another; each is off by half a unit in the last place
    assert (np.linalg.norm(got - exact, axis=1) <= additions * 2.0**-24 * np.linalg.norm(exact, axis=1)).all()


def test_a_hadamard_matrix_is_the_one_a_float_unit_vector_shows(kernels):
    wanted = np.rint(multiply(np.eye(48), hadamard_factors(48)) * np.sqrt(48))
    assert np.array_equal(hadamard(kernels, np.eye(48, dtype=F32)), wanted * online_scale(48))


def test_a_row_is_turned_the_same_alone_and_among_others_and_on_any_number_of_threads(kernels):
    x = np.random.default_rng(0).normal(size=(23, 6144)).astype(F32)
    x[5, 7], x[6, 0] = np.nan, np.inf
    threads, together = kernels.pangu_threads(0), hadamard(kernels, x)
    assert np.isnan(together[5]).all()
    assert not np.isfinite(together[6]).any()
    assert np.isfinite(np.delete(together, (5, 6), axis=0)).all()
    try:
        for count in (1, 3):
            kernels.pangu_threads(count)
            assert np.array_equal(hadamard(kernels, x), together, equal_nan=True)
    finally:
        kernels.pangu_threads(threads)
    for row in range(len(x)):
        assert np.array_equal(hadamard(kernels, x[row : row + 1])[0], together[row], equal_nan=True)


def test_a_hadamard_matrix_of_another_size_is_an_error(kernels):
    signs, scale = np.zeros((12, 3), np.uint8), np.ones(1, F32)
    for size in (20, 36, 12 * 5):
        with pytest.raises(AssertionError):
            call(kernels, "PanguHadamard", [np.ones((1, size), F32), signs, scale], (1, size))
    with pytest.raises(AssertionError):
        call(kernels, "PanguHadamard", [np.ones((1, 24), F32), signs[:, :2], scale], (1, 24))


def test_bfloat16_rows_are_widened_exactly_and_the_head_is_their_product(kernels):
    rng = np.random.default_rng(4)
    for rows, hidden, vocab in [(1, 16, 4), (1, 100, 67), (9, 33, 130), (70, 64, 65)]:
        half = rng.integers(0, 1 << 16, (vocab, hidden)).astype(np.uint16) & np.uint16(0xBFFF)  # finite, below 2
        table = (half.astype(np.uint32) << 16).view(F32)
        ids = rng.integers(0, vocab, rows).astype(np.int32)
        assert np.array_equal(call(kernels, "PanguEmbedding", [ids, half], (rows, hidden)), table[ids])
        x = rng.normal(size=(rows, hidden)).astype(F32)
        wanted = x.astype(np.float64) @ table.T.astype(np.float64)
        got = call(kernels, "PanguHead", [x, half], (rows, vocab))
        bound = np.abs(x).astype(np.float64) @ np.abs(table.T).astype(np.float64)
        assert (np.abs(got - wanted) <= 1e-6 * bound).all()


def softmax_attention(query, keys, values, position, scale):
    """One query [heads, dim] of float64 against keys and values [tokens, kv_heads, dim] up to its position."""
    share = query.shape[0] // keys.shape[1]
    out = np.empty_like(query)
    for head in range(len(query)):
        scores = keys[: position + 1, head // share] @ query[head] * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[: position + 1, head // share]
    return out


class Cache:
    """Sequences in shuffled blocks of a cache whose free slots hold NaN, as an earlier request may have left them; of an
    int8 cache, given its grids, the last code."""

    def __init__(self, functions, kv_heads, dim, block_size, blocks=32, grid=None):
        width = -(-dim // 16) * 16
        self.functions, self.dim, self.block_size, self.kv_heads = functions, dim, block_size, kv_heads
        self.grid = np.zeros(1, F32) if grid is None else grid.rows()
        free, dtype = (np.nan, F32) if grid is None else (127, np.int8)
        self.keys = np.full((blocks, kv_heads, dim, block_size), free, dtype)
        self.values = np.full((blocks, kv_heads, block_size, width), free, dtype)

    def attend(self, pieces, tables, contexts):
        """pieces: (query, key, value) of each sequence's new tokens, [new, heads, dim]."""
        lengths = [len(query) for query, _, _ in pieces]
        slots = [
            table[position // self.block_size] * self.block_size + position % self.block_size
            for table, context, length in zip(tables, contexts, lengths, strict=True)
            for position in range(context, context + length)
        ]
        packed = [np.concatenate([piece[i].reshape(len(piece[i]), -1) for piece in pieces]) for i in range(3)]
        integers = [np.array(x, np.int32) for x in (slots, tables, np.add(contexts, lengths), lengths)]
        inputs = [*packed, self.keys, self.values, *integers, np.array([0.3], F32), self.grid]
        out = call(self.functions, "PanguAttention", inputs, packed[0].shape)
        return np.split(out.reshape(len(out), -1, self.dim), np.cumsum(lengths)[:-1])


SIZES = pytest.mark.parametrize(("heads", "kv_heads", "dim", "block"), [(4, 4, 64, 16), (6, 2, 24, 32), (8, 1, 100, 16)])


def grid_of(rng, kv_heads, dim, *, symmetric):
    """Grids of about what normal numbers take, every channel's its own."""
    ends = rng.uniform(1, 5, (4, kv_heads, dim)).astype(F32)
    return QuantizedCache(*(grid_of_range(-ends[i], ends[i + 1], symmetric=symmetric) for i in (0, 2)))


@SIZES
@pytest.mark.parametrize("cache", ["float", "int8", "int8 with zero points"])
def test_attention_is_softmax_in_prefill_in_pieces_and_in_batched_decode(heads, kv_heads, dim, block, cache, kernels):
    """Of an int8 cache: over what the definition of its grid says the numbers become, the new tokens' too."""
    rng = np.random.default_rng(dim)
    lengths = [1, 150, 140]
    needed = [-(-(length + 1) // block) for length in lengths]
    order = rng.permutation(sum(needed)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    tables = [table + [0] * (max(needed) - len(table)) for table in tables]  # padding is never read
    whole = [[rng.normal(size=(n + 1, count, dim)).astype(F32) for count in (heads, kv_heads, kv_heads)] for n in lengths]
    grid = None if cache == "float" else grid_of(rng, kv_heads, dim, symmetric=cache == "int8")

    def held(x, one):
        return (x if grid is None else one.values(one.codes(x))).astype(np.float64)

    key, value = (None, None) if grid is None else (grid.key, grid.value)
    wanted = [
        [softmax_attention(q[p].astype(np.float64), held(k, key), held(v, value), p, 0.3) for p in range(len(q))]
        for q, k, v in whole
    ]
    together = Cache(kernels, kv_heads, dim, block, grid=grid)
    prefill = together.attend([[x[:-1] for x in parts] for parts in whole], tables, [0, 0, 0])
    decode = together.attend([[x[-1:] for x in parts] for parts in whole], tables, lengths)
    for index in range(3):
        assert np.abs(prefill[index] - wanted[index][:-1]).max() < 1e-5
        assert np.abs(decode[index][0] - wanted[index][-1]).max() < 1e-5
    again = Cache(kernels, kv_heads, dim, block, grid=grid)
    pieces, parts = [], whole[1]
    for start in range(0, lengths[1], 40):
        end = min(start + 40, lengths[1])
        pieces += again.attend([[x[start:end] for x in parts]], tables[1:2], [start])
    assert np.array_equal(np.concatenate(pieces), prefill[1]), "a prompt in pieces, alone, has the bits of the batch"
    assert np.array_equal(again.attend([[x[-1:] for x in parts]], tables[1:2], lengths[1:2])[0], decode[1])


@SIZES
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_int8_cache_holds_the_codes_of_the_definition(heads, kv_heads, dim, block, symmetric, kernels):
    rng = np.random.default_rng(block)
    grid = grid_of(rng, kv_heads, dim, symmetric=symmetric)
    count = 3 * block
    query, key, value = (rng.normal(size=(count, n, dim)).astype(F32) * 3 for n in (heads, kv_heads, kv_heads))
    ties = grid.key.values(grid.key.codes(key[:block])) + grid.key.scale / 2  # exact: a scale is a bfloat16 value
    key[:block], key[-1, 0, :3], value[-1, 0, :3] = ties, (1e30, np.inf, -np.inf), (-1e30, np.nan, 0)
    cache, table = Cache(kernels, kv_heads, dim, block, grid=grid), [5, 0, 9]
    cache.attend([[query, key, value]], [table], [0])
    keys = cache.keys[table].transpose(0, 3, 1, 2).reshape(count, kv_heads, dim)
    values = cache.values[table].transpose(0, 2, 1, 3).reshape(count, kv_heads, -1)[:, :, :dim]
    assert np.array_equal(keys, grid.key.codes(key))
    value[-1, 0, 1] = -1e30  # a NaN has no code: it gets the least
    assert np.array_equal(values, grid.value.codes(value))
    untouched = [i for i in range(len(cache.keys)) if i not in table]
    assert (cache.keys[untouched] == 127).all()
    assert (cache.values[untouched] == 127).all()


def test_attention_refuses_lengths_that_do_not_fit_the_cache(kernels):
    one, cache = np.ones((1, 16), F32), np.ones((1, 1, 16, 16), F32)
    for valid, new in ((17, 1), (1, 2), (0, 1), (1, 0)):
        integers = [np.array(x, np.int32) for x in ([0], [[0]], [valid], [new])]
        with pytest.raises(AssertionError):
            call(kernels, "PanguAttention", [one, one, one, cache, cache, *integers, one[0, :1], one[0, :1]], (1, 16))
