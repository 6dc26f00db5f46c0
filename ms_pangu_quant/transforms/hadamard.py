"""Hadamard matrices (entries +-1, H H^T = n I) of the sizes that occur, and their product with rows.

A size n is m * 2^k with a Hadamard matrix of order m known. Orders m > 2 come from Paley's two constructions (1933) over a
finite field of q elements, q prime or the square of a prime: m = q + 1 for q = 3 mod 4, m = 2 (q + 1) for q = 1 mod 4.
That gives 12 (1536 = 12 * 128, 6144 = 12 * 512), 20, 28, 36, 44, 52, 60, 100 (12800 = 100 * 128, from the field of 49) and
many more; powers of two are Sylvester's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from math import isqrt, log2, sqrt

import numpy as np
from numpy.typing import NDArray

from ms_pangu_quant.errors import RecipeError

_LARGEST_FACTOR = 64  # powers of two are split into factors of at most this order: fewer multiplications


@cache
def hadamard_factors(size: int) -> tuple[NDArray[np.int8], ...]:
    """Hadamard matrices whose Kronecker product has order `size`. Raises RecipeError if no construction here gives one."""
    two = size & -size  # the largest power of two in size
    core, power = size // two, two.bit_length() - 1
    if core == 1:
        return _sylvester(power)
    for exponent in range(2, power + 1):
        matrix = _paley(core << exponent)
        if matrix is not None:
            return (matrix, *_sylvester(power - exponent))
    raise RecipeError(
        f"rotate: no Hadamard matrix of order {size} is known here (it is {core} * 2^{power}); leave out the rotation"
    )


def hadamard_core(size: int) -> NDArray[np.int8]:
    """Order a multiple of 4: the matrix of hadamard_factors is the Kronecker product of it and of Sylvester's of the rest.

    Raises RecipeError like hadamard_factors, and for sizes below 4.
    """
    if size < 4:
        raise RecipeError(f"rotate: a Hadamard matrix of order {size}, wanted 4 or more")
    return hadamard_factors(4 if size & (size - 1) == 0 else size)[0]


def multiply(rows: NDArray[np.float64], factors: Sequence[NDArray[np.int8]]) -> NDArray[np.float64]:
    """rows [count, n] times the orthogonal matrix H / sqrt(n), H the Kronecker product of `factors`."""
    count, size = rows.shape
    value = rows.reshape(count, *(len(factor) for factor in factors))
    for axis, factor in enumerate(factors, start=1):
        value = np.moveaxis(np.moveaxis(value, axis, -1) @ factor.astype(np.float64), -1, axis)
    return np.ascontiguousarray(value).reshape(count, size) / sqrt(size)


def online_scale(size: int) -> float:
    """The power of two next to 1 / sqrt(size): H times it has exact entries in every float type."""
    return float(2.0 ** -round(log2(size) / 2))


def _sylvester(power: int) -> tuple[NDArray[np.int8], ...]:
    """Factors of the Hadamard matrix of order 2^power, each of order _LARGEST_FACTOR at most."""
    step = _LARGEST_FACTOR.bit_length() - 1
    two = np.array([[1, 1], [1, -1]], np.int8)
    sizes = [step] * (power // step) + ([power % step] if power % step else [])
    return tuple(np.asarray(reduce(np.kron, [two] * exponent), np.int8) for exponent in sizes) or (
        np.ones((1, 1), np.int8),
    )


def _paley(order: int) -> NDArray[np.int8] | None:
    """Paley's matrix of this order, of his first construction if there is one, else of the second."""
    if order % 4:
        return None
    eye, half = np.eye(order, dtype=np.int8), order // 2
    if (character := _quadratic_character(order - 1)) is not None:  # order - 1 is 3 mod 4: the matrix is skew
        return np.asarray(_bordered(character, -1) + eye, np.int8)
    if half % 4 == 2 and (character := _quadratic_character(half - 1)) is not None:  # half - 1 is 1 mod 4: symmetric
        block, diagonal = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.asarray(np.kron(_bordered(character, 1), block) + np.kron(eye[:half, :half], diagonal), np.int8)
    return None


def _bordered(character: NDArray[np.int8], sign: int) -> NDArray[np.int8]:
    """Paley's conference matrix: a row of ones above, a column of `sign` to the left, zero in the corner."""
    matrix = np.zeros((len(character) + 1, len(character) + 1), np.int8)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, sign, character
    return matrix


def _quadratic_character(q: int) -> NDArray[np.int8] | None:
    """[q, q], for elements a, b of the field of q: 1 if a - b is a square, -1 if not, 0 if zero. None if there is none."""
    prime = q if _is_prime(q) else isqrt(q)
    if q < 3 or prime * prime not in (q, q * q) or not _is_prime(prime) or prime == 2:
        return None
    if prime == q:
        squares = {a * a % q for a in range(1, q)}
        differences = np.subtract.outer(np.arange(q), np.arange(q)) % q
        return np.asarray(np.array([0] + [1 if d in squares else -1 for d in range(1, q)], np.int8)[differences])
    # The field of prime^2: a + b r with r^2 = the smallest number that is no square modulo the prime.
    no_square = min(set(range(prime)) - {a * a % prime for a in range(prime)})
    elements = [(a, b) for a in range(prime) for b in range(prime)]
    squares_2 = {((a * a + b * b * no_square) % prime, 2 * a * b % prime) for a, b in elements if (a, b) != (0, 0)}
    values = {e: 0 if e == (0, 0) else 1 if e in squares_2 else -1 for e in elements}
    return np.array([[values[(a - c) % prime, (b - d) % prime] for c, d in elements] for a, b in elements], np.int8)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
