"""Products of bfloat16: by the kernels and without them, whatever lies how in memory and on however many threads."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ms_pangu_quant.kernels.library import PATHS, SETTING, library
from ms_pangu_quant.quantizers.products import Rows, add_product, product, rounded

BEST = library()
FAST = BEST is not None and BEST.bfloat16
SHAPES = [(0, 3, 5), (3, 5, 0), (1, 1, 1), (6, 2, 64), (7, 33, 65), (101, 301, 203), (200, 64, 1), (193, 257, 513)]


@pytest.fixture(params=["kernels", "off"])
def path(request, monkeypatch):
    if request.param == "kernels" and not FAST:
        pytest.skip("no AVX512-BF16")
    monkeypatch.setenv(SETTING, "auto" if request.param == "kernels" else "off")


def matrices(m, k, n, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(m, k)).astype(np.float32), generator.normal(size=(k, n)).astype(np.float32)


def exactly(a, b):
    """And what float32 sums of so many terms may be off by."""
    a, b = (x.astype(ml_dtypes.bfloat16).astype(np.float64) for x in (a, b))
    return a @ b, 1e-6 * np.abs(a) @ np.abs(b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_is_that_of_the_rounded_numbers(shape, turned, path):
    a, b = matrices(*shape)
    wanted, allowed = exactly(a, b)
    a, b = (np.asfortranarray(x) if turn else x for x, turn in zip((a, b), turned, strict=True))
    assert (np.abs(product(a, b, bfloat16=True) - wanted) <= allowed).all()
    total = np.full(wanted.shape, 3, np.float32)
    add_product(total, a, b, bfloat16=True)
    assert (np.abs(total - 3 - wanted) <= allowed + 1e-5).all()


@pytest.mark.parametrize("size", [5, 300, 1100])
def test_with_lower_all_on_and_below_the_diagonal_is_there(size, path):
    a, _ = matrices(size, 40, 1)
    wanted, allowed = exactly(a, a.T)
    total = np.zeros((size, size), np.float32)
    add_product(total, a, a.T, bfloat16=True, lower=True)
    assert np.tril(np.abs(total - wanted) <= allowed).sum() == size * (size + 1) // 2


@pytest.mark.parametrize("height", [96, 97, 40])
@pytest.mark.parametrize("width", [64, 33, 200])
def test_a_matrix_that_grows_from_its_end_is_multiplied_as_the_whole_one(height, width, path):
    a, b = matrices(11, height, width)
    rows = Rows(height, width, bfloat16=True)
    for stop in range(height, 0, -32):
        begin = max(stop - 32, 0)
        wanted, allowed = exactly(a[:, stop:], b[stop:])
        assert (np.abs(rows.times(a[:, stop:], stop) - wanted) <= allowed).all()
        rows.put(begin, b[begin:stop])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_a_number_stays_none(path):
    a, b = matrices(7, 9, 70)
    a[3, 4], a[5, 1] = np.nan, np.inf
    found = product(a, b, bfloat16=True)
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[5]).any()
    assert np.isfinite(np.delete(found, (3, 5), axis=0)).all()


def test_rounding_is_to_nearest_even():
    values = np.random.default_rng(1).normal(size=(300, 7)).astype(np.float32)
    assert np.array_equal(rounded(values), values.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_the_bits_do_not_depend_on_the_number_of_threads(bfloat16, lower):
    x, d = matrices(300, 1500, 300)[0].T, matrices(300, 1500, 300, 1)[0].T  # [tokens, in]
    left, functions = x if lower else d, BEST.functions if BEST else None
    before, found = functions.pangu_threads(0) if functions else 0, []
    try:
        for threads in (1, 2, 3):
            if functions:
                functions.pangu_threads(threads)
            with threadpool_limits(threads):
                total = np.zeros((300, 300), np.float32)
                add_product(total, left.T, x, bfloat16=bfloat16, lower=lower)
                found.append(np.tril(total))
    finally:
        if functions:
            functions.pangu_threads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_lesser_path_is_asked_for_by_name(monkeypatch):
    if BEST is None:
        pytest.skip("no compiler")
    for name in PATHS[: PATHS.index(BEST.best)]:
        monkeypatch.setenv(SETTING, name)
        assert not library().bfloat16
    monkeypatch.undo()
    library()
