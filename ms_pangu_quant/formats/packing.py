"""int4 codes in bytes. Three layouts exist, and confusing two of them serves noise, so each has a name here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack_along_out(codes: NDArray[np.int8]) -> NDArray[np.int8]:
    """Stored layout: codes [out, in] in -8..7 -> bytes int8 [in, out/2].

    Transposed; the low nibble is the even output channel, two's complement (Golden Stick's and MindFormers' qint4x2).
    """
    transposed = np.ascontiguousarray(codes.T).view(np.uint8)
    return ((transposed[:, 0::2] & 0xF) | (transposed[:, 1::2] << 4)).view(np.int8)


def unpack_along_out(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """Inverse of pack_along_out: bytes [in, out/2] -> codes [out, in]."""
    unsigned = packed.view(np.uint8)
    codes = np.empty((packed.shape[1] * 2, packed.shape[0]), np.int8)
    codes[0::2] = _signed(unsigned & 0xF).T
    codes[1::2] = _signed(unsigned >> 4).T
    return codes


def pack_offset_along_in(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Layout of the CPU backend: codes [out, in] in -8..7 -> bytes uint8 [out, in/2].

    The low nibble is the even input, each nibble is code + 8.
    """
    offset = (codes + np.int8(8)).view(np.uint8)
    return (offset[:, 0::2] | (offset[:, 1::2] << 4)).astype(np.uint8, copy=False)


def unpack_offset_along_in(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of pack_offset_along_in: bytes uint8 [out, in/2] -> codes [out, in]."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    codes[:, 0::2] = (packed & 0xF).view(np.int8) - np.int8(8)
    codes[:, 1::2] = (packed >> 4).view(np.int8) - np.int8(8)
    return codes


def _signed(nibbles: NDArray[Any]) -> NDArray[np.int8]:
    return ((nibbles ^ 8).astype(np.int8) - np.int8(8)).astype(np.int8)
