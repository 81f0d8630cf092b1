"""Products of many tokens by a CPU's matrix unit: Intel's AMX, where there is one.

It multiplies 16 rows of 32 BF16 numbers by 32 x 16 at a time and sums in float32. Weights lie in memory as it takes
them; E4M3 codes are decoded into a buffer first. What it takes from the right are the inputs of 16 tokens in pairs of
channels: ``[channels / 2, 16, 2]``.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils as _untyped
from numba.extending import intrinsic

from octavo.bits import JIT, to_bf16
from octavo.engines.torch.vectors import LINE, absent, fetch, loaded

cgutils: Any = _untyped

# Rows of weights, and tokens, of a tile; and its channels.
SIDE = 16
DEPTH = 32

# A process asks Linux for the tiles' registers: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18

_BYTE, _HALF_WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 64))
_POINTER = _BYTE.as_pointer()


def _available() -> bool:
    """Whether this machine has the unit and lets this process use it."""
    if platform.machine() != "x86_64" or not binding.get_host_cpu_features().get("amx-bf16"):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0)


AVAILABLE = _available()

# Codes that are decoded at a time, and the bits of 0 to 7 times 2^-17 in BF16.
_LANES = 32
_SUBNORMAL = (np.arange(8, dtype=np.float32) * np.float32(2**-17)).view(np.uint32) >> 16

# Sums that a product is split into. They are in the first registers; the others take weights and inputs by turns.
CHAINS = 4
_WEIGHTS, _INPUTS = (4, 5), (6, 7)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    """Call one of LLVM's AMX intrinsics."""
    kind = ir.FunctionType(ir.VoidType(), [one.type for one in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, arguments)


def _configure_codegen(_: Any, at: Any) -> Any:
    """Lay the calling thread's tiles out, by the 64 bytes of a configuration at an address."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", builder.inttoptr(arguments[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _release_codegen(_: Any) -> Any:
    """Give the calling thread's tiles back."""

    def codegen(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


def _product_codegen(_: Any, at: Any, stride: Any, columns: Any, x: Any, out: Any) -> Any:
    """Sixteen rows of BF16 at an address, ``stride`` bytes apart, by the inputs of sixteen tokens.

    The result is the sum of float32 ``[CHAINS, 16, 16]``: a product takes three times as long as it takes until the unit can
    begin with another, but not with one that is added to the same tile.
    """

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        at, stride, columns, x, out = arguments

        def pointer(base: Any, offset: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), _POINTER)

        def multiply(column: Any, chain: int) -> None:
            """Add :data:`DEPTH` columns to a chain."""
            offset = builder.mul(column, _LONG(2))
            # Behind these rows lie the next ones, in order.
            ahead = builder.add(
                builder.add(at, builder.mul(stride, _LONG(SIDE))), builder.mul(offset, _LONG(SIDE))
            )
            for line in range(0, SIDE * DEPTH * 2, LINE):
                fetch(builder, builder.add(ahead, _LONG(line)))
            weights, inputs = (_BYTE(one[chain % 2]) for one in (_WEIGHTS, _INPUTS))
            _call(builder, "tileloadd64", weights, pointer(at, offset), stride)
            place = pointer(x, builder.mul(column, _LONG(2 * SIDE)))
            _call(builder, "tileloadd64", inputs, place, _LONG(4 * SIDE))
            _call(builder, "tdpbf16ps", _BYTE(chain), weights, inputs)

        def loop(name: str, begin: Any, end: Any, chains: int) -> None:
            """As many chains side by side, from column to column."""
            entry = builder.block
            head, body, after = (
                builder.append_basic_block(f"{name}.{part}") for part in ("head", "body", "after")
            )
            builder.branch(head)
            builder.position_at_end(head)
            column = builder.phi(_LONG)
            column.add_incoming(begin, entry)
            builder.cbranch(builder.icmp_signed("<", column, end), body, after)
            builder.position_at_end(body)
            for chain in range(chains):
                multiply(builder.add(column, _LONG(chain * DEPTH)), chain)
            column.add_incoming(builder.add(column, _LONG(chains * DEPTH)), body)
            builder.branch(head)
            builder.position_at_end(after)

        for chain in range(CHAINS):
            _call(builder, "tilezero", _BYTE(chain))
        whole = builder.and_(columns, _LONG(-CHAINS * DEPTH))
        loop("chains", _LONG(0), whole, CHAINS)
        loop("rest", whole, columns, 1)
        for chain in range(CHAINS):
            place = pointer(out, _LONG(chain * SIDE * SIDE * 4))
            _call(builder, "tilestored64", _BYTE(chain), place, _LONG(4 * SIDE))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _decode_codegen(_: Any, at: Any, count: Any, out: Any) -> Any:
    """``count`` E4M3 codes at an address as BF16 numbers, times 2⁻⁸: a multiple of 64, and fetch as many behind them."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        at, count, out = arguments
        entry = builder.block
        body, after = (builder.append_basic_block(name) for name in ("decode", "after"))
        builder.branch(body)

        builder.position_at_end(body)
        index = builder.phi(_LONG)
        begin = builder.add(at, index)
        fetch(builder, builder.add(begin, count))
        for part in range(0, LINE, _LANES):
            place = builder.add(begin, _LONG(part))
            codes = loaded(builder, place, ir.VectorType(_BYTE, _LANES))
            numbers = _bf16_of(builder, codes)
            target = builder.add(out, builder.mul(builder.add(index, _LONG(part)), _LONG(2)))
            builder.store(numbers, builder.inttoptr(target, ir.PointerType(numbers.type)), align=2)
        following = builder.add(index, _LONG(LINE))
        index.add_incoming(_LONG(0), entry)
        index.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _bf16_of(builder: Any, codes: Any) -> Any:
    """``<32 x i8>`` E4M3 codes as ``<32 x i16>`` BF16 numbers, times 2⁻⁸.

    Other than by way of FP16, this keeps to the two units that move bytes around half as often.
    """
    kind = ir.VectorType(_HALF_WORD, _LANES)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(kind, [value] * _LANES)

    wide = builder.zext(codes, kind)
    magnitude = builder.and_(wide, constant(0x7F))
    # Exponent and mantissa in their places, and the bias from 7 to 127 - 8.
    normal = builder.add(builder.shl(magnitude, constant(4)), constant((120 - 8) << 7))
    # The eight numbers below are looked up.
    table = ir.Constant(kind, [int(_SUBNORMAL[index % 8]) for index in range(_LANES)])
    look_up = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind, kind]), "llvm.x86.avx512.permvar.hi.512"
    )
    subnormal = builder.call(look_up, [table, magnitude])
    number = builder.select(builder.icmp_unsigned("<", magnitude, constant(8)), subnormal, normal)
    return builder.or_(number, builder.shl(builder.and_(wide, constant(0x80)), constant(8)))


configure, release, product, decode = (
    intrinsic(codegen) if AVAILABLE else absent
    for codegen in (_configure_codegen, _release_codegen, _product_codegen, _decode_codegen)
)


def configuration() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """For :data:`configure`: all tiles of 16 rows of 64 bytes."""
    layout = np.zeros(64, np.uint8)
    layout[0] = 1
    layout[16:32:2] = 64
    layout[48:56] = SIDE
    return layout


@njit(**JIT)
def pair(x: Any, token: Any, out: Any) -> None:
    """Put a token's inputs, float32 that are BF16 numbers, into their column: BF16 ``[channels / 2, 16, 2]``."""
    for i in range(x.shape[0]):
        out[i // 2, token, i % 2] = to_bf16(x[i])
