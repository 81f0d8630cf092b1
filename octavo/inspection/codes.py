"""What the E4M3 codes of a weight tell: how often each of the 256 occurs, and the largest of each tile.

Codes are uint8. Without its sign bit a code is ordered like the magnitude it stands for; 0x7F and
0xFF are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from octavo.fp8 import E4M3

# The numbers that the 256 codes stand for, float64.
VALUES: list[float] = torch.arange(256, dtype=torch.uint8).view(E4M3).double().tolist()

NAN_CODES = (0x7F, 0xFF)
# The code of 224: a tensor whose magnitudes stay below uses less than half the range.
HALF_RANGE = VALUES.index(224.0)
# Below 2^-6 numbers are multiples of 2^-9, and no longer precise to three mantissa bits.
_FIRST_NORMAL = 8
_EXPONENTS = range(-6, 9)


@njit(nogil=True, cache=True)
def _tally(codes: Any, tile_rows: Any, tile_columns: Any, counts: Any, largest: Any) -> None:
    for row in range(codes.shape[0]):
        for start in range(0, codes.shape[1], tile_columns):
            run = codes[row, start : start + tile_columns]
            most = np.uint8(0)
            for i in range(run.shape[0]):
                counts[run[i]] += 1
                most = max(most, np.uint8(run[i] & np.uint8(0x7F)))
            place = row // tile_rows, start // tile_columns
            largest[place] = max(largest[place], most)


def tally(codes: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Count the codes of a matrix, and find the largest magnitude of each tile, in one pass.

    Args:
        codes: uint8 ``[rows, columns]``, contiguous, on the CPU.
        tile: rows and columns of a tile; those at the edges may be smaller.

    Returns:
        int64 ``[256]``, and uint8 ``[⌈rows / tile rows⌉, ⌈columns / tile columns⌉]``: codes without
        their sign.
    """
    tile = max(tile[0], 1), max(tile[1], 1)
    rows, columns = (-(-size // step) for size, step in zip(codes.shape, tile, strict=True))
    counts = torch.zeros(256, dtype=torch.int64)
    largest = torch.zeros(rows, columns, dtype=torch.uint8)
    _tally(codes.numpy(), *tile, counts.numpy(), largest.numpy())
    return counts, largest


def largest_value(counts: Sequence[int]) -> float:
    """The largest magnitude among counted codes, NaN left out; 0 if there is none."""
    found = (abs(VALUES[code]) for code, count in enumerate(counts) if count)
    return max((value for value in found if not math.isnan(value)), default=0.0)


def nan_count(counts: Sequence[int]) -> int:
    """How many of the counted codes are NaN."""
    return sum(counts[code] for code in NAN_CODES)


def zero_count(counts: Sequence[int]) -> int:
    """How many are 0 or -0."""
    return counts[0x00] + counts[0x80]


def subnormal_count(counts: Sequence[int]) -> int:
    """How many stand for a number below 2^-6 other than zero."""
    return sum(counts[1:_FIRST_NORMAL]) + sum(counts[0x81 : 0x80 + _FIRST_NORMAL])


def saturated_count(counts: Sequence[int]) -> int:
    """How many stand for ±448."""
    return counts[0x7E] + counts[0xFE]


def by_exponent(counts: Sequence[int]) -> list[tuple[int, int]]:
    """How many of the normal numbers have each exponent: ``(-6, …)`` to ``(8, …)``."""
    found = dict.fromkeys(_EXPONENTS, 0)
    for code, count in enumerate(counts):
        if code & 0x7F >= _FIRST_NORMAL and code not in NAN_CODES:
            found[((code & 0x7F) >> 3) - 7] += count
    return list(found.items())


def expected_sqnr(counts: Sequence[int]) -> float | None:
    """The signal to quantization noise that rounding to these codes costs, in dB, by the usual model:
    errors evenly spread over the step between neighbours, ``step² / 12`` each.

    Where there are several scales, tiles count as if they had the same. None without a number other than
    zero.
    """
    signal = noise = 0.0
    for code, count in enumerate(counts):
        if code not in NAN_CODES:
            exponent = max((code & 0x7F) >> 3, 1) - 7
            signal += count * VALUES[code] ** 2
            noise += count * 4.0 ** (exponent - 3) / 12
    return 10 * math.log10(signal / noise) if signal else None
