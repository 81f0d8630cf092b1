"""Products of BF16 numbers in pairs: x86's AVX512-BF16, where there is one.

An instruction multiplies 32 numbers with 32 inputs and adds neighbours' products to 16 sums in float32: half as many as
with inputs in float32. E4M3 numbers and their inputs are BF16 numbers too. Their bytes are looked up, 64 at a time
(AVX512-VBMI), which is half the work of computing them.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from llvmlite import binding, ir
from numba.core import cgutils as _untyped

from octavo.engines.torch.vectors import (
    E4M3_UNIT,
    LANES,
    LINE,
    Product,
    absent,
    loaded,
    tiles,
    vector,
)

cgutils: Any = _untyped

# Columns that are multiplied at a time: a line of E4M3 codes.
DEPTH = LINE


class _BFloat(ir.Type):  # type: ignore[misc] # llvmlite has no types
    """LLVM's type for BF16, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BYTE, _HALF_WORD, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_CODES, _PAIRS = ir.VectorType(_BYTE, DEPTH), ir.VectorType(_BFloat(), DEPTH // 2)
_SUMS = vector(ir.FloatType())


def _available() -> bool:
    """Whether this machine has the instructions."""
    features = binding.get_host_cpu_features()
    return platform.machine() == "x86_64" and all(
        features.get(name) for name in ("avx512bf16", "avx512vbmi")
    )


AVAILABLE = _available()


def _tables() -> list[list[list[int]]]:
    """The lower and the upper bytes of the numbers of the codes 0 to 127, times 2⁻⁸, in halves; NaN is not among them."""
    numbers = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / E4M3_UNIT
    numbers[-1] = 0
    both = numbers.bfloat16().view(torch.uint8).view(2, -1, 2)
    tables: list[list[list[int]]] = both.permute(2, 0, 1).tolist()
    return tables


_LOWER, _UPPER = _tables()
# The eighths of a line so that its first half is in the lower halves of its quarters.
_EIGHTHS = [0, 4, 1, 5, 2, 6, 3, 7]
# The lower and the upper halves of quarters of two lines, byte by byte in turn.
_ZIPPED = [
    [
        line * DEPTH + quarter + half + index
        for quarter in range(0, DEPTH, 16)
        for index in range(8)
        for line in (0, 1)
    ]
    for half in (0, 8)
]


def _decoded(builder: Any, address: Any) -> list[Any]:
    """64 E4M3 codes as BF16 numbers, times 2⁻⁸."""

    def constant(element: ir.Type, values: list[int]) -> ir.Constant:
        return ir.Constant(ir.VectorType(element, len(values)), values)

    eighths = loaded(builder, address, ir.VectorType(_LONG, 8))
    moved = builder.shuffle_vector(eighths, eighths, constant(_WORD, _EIGHTHS))
    codes = builder.bitcast(moved, _CODES)
    name, kind = "llvm.x86.avx512.vpermi2var.qi.512", ir.FunctionType(_CODES, [_CODES] * 3)
    look_up = cgutils.get_or_insert_function(builder.module, kind, name)
    lower, upper = (
        builder.call(look_up, [constant(_BYTE, first), codes, constant(_BYTE, second)])
        for first, second in (_LOWER, _UPPER)
    )
    signed = builder.or_(upper, builder.and_(codes, constant(_BYTE, [0x80] * DEPTH)))
    return [
        builder.bitcast(builder.shuffle_vector(lower, signed, constant(_WORD, order)), _PAIRS)
        for order in _ZIPPED
    ]


def _line(builder: Any, address: Any) -> list[Any]:
    """32 BF16 numbers."""
    kind = ir.VectorType(_HALF_WORD, DEPTH // 2)
    return [builder.bitcast(loaded(builder, address, kind), _PAIRS)]


def _two_lines(builder: Any, address: Any) -> list[Any]:
    """64 BF16 numbers."""
    return [*_line(builder, address), *_line(builder, builder.add(address, _LONG(LINE)))]


def _add(builder: Any, one: Any, other: Any, total: Any) -> Any:
    kind = ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    dot = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(dot, [total, one, other])


# Like those of octavo.engines.torch.vectors, but inputs are BF16.
e4m3_tile, bf16_tile = (
    tiles(product) if AVAILABLE else absent
    for product in (
        Product(DEPTH, 1, 2, _decoded, _two_lines, _add),
        Product(DEPTH // 2, 2, 2, _line, _line, _add),
    )
)
