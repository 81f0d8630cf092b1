"""Products of strips of rows, with inputs in float32 or in BF16."""

from __future__ import annotations

from typing import Any

from numba import njit

from octavo.bits import JIT
from octavo.engines.torch import dots, vectors
from octavo.engines.torch.vectors import HEIGHTS, load, store

# Rows of numbers that are multiplied at a time.
STRIP = 8
_MOST_ROWS = len(HEIGHTS) - 1


@njit(**JIT)
def multiply(
    at: Any,
    stride: Any,
    nbytes: Any,
    columns: Any,
    scales: Any,
    scale_stride: Any,
    x: Any,
    x_stride: Any,
    x_nbytes: Any,
    rows: Any,
    part: Any,
    sums: Any,
    sums_stride: Any,
    sums_step: Any,
) -> None:
    """Add products of a strip of numbers with rows of inputs, times the strip's scales, to sums.

    Addresses rather than arrays: views of arrays are counted, and threads wait for each other's counting.

    Args:
        at: address of the strip's first row.
        stride: bytes from row to row.
        nbytes: of a number: 1 is E4M3, 2 is BF16.
        columns: of the product, a multiple of :data:`octavo.engines.torch.vectors.LANES`; with inputs in BF16, of
            :data:`octavo.engines.torch.dots.DEPTH`.
        scales: address of the first of ``STRIP`` float32, one for each row of numbers.
        scale_stride: bytes from one to the next; 0 if there is only one.
        x: address of inputs ``[rows, at least columns]``.
        x_stride: bytes from row to row.
        x_nbytes: of an input: 4 is float32, 2 is BF16, which takes :data:`octavo.engines.torch.dots.AVAILABLE`.
        rows: of ``x``.
        part: address of float32 ``[2 * STRIP]``, overwritten.
        sums: address of float32 ``[STRIP, rows]``.
        sums_stride: bytes from row to row of numbers.
        sums_step: bytes from row to row of ``x``.
    """
    for done in range(0, rows, _MOST_ROWS):
        count, x_at = min(rows - done, _MOST_ROWS), x + done * x_stride
        height = HEIGHTS[count]
        for row in range(0, STRIP, height):
            begin = at + row * stride
            if x_nbytes == 2:
                if nbytes == 1:
                    dots.e4m3_tile(count, begin, stride, x_at, x_stride, columns, part)
                else:
                    dots.bf16_tile(count, begin, stride, x_at, x_stride, columns, part)
            elif nbytes == 1:
                vectors.e4m3_tile(count, begin, stride, x_at, x_stride, columns, part)
            else:
                vectors.bf16_tile(count, begin, stride, x_at, x_stride, columns, part)
            for i in range(height):
                scale = load(scales + (row + i) * scale_stride)
                place = sums + (row + i) * sums_stride + done * sums_step
                for j in range(count):
                    product = load(part + (i * count + j) * 4) * scale
                    store(place + j * sums_step, load(place + j * sums_step) + product)
