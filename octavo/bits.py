"""BF16 and E4M3 numbers inside compiled loops, on their bits.

Everything here is inlined into Numba kernels, and vectorizes there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

JIT: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    # Sums may be reordered and products fused, as any vectorized kernel does; NaN and infinity
    # keep their meaning.
    "fastmath": {"reassoc", "contract"},
}


def _bits_codegen(_: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""
    signature = types.uint32(types.float32)
    return signature, lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


def _float_codegen(_: Any, value: Any) -> Any:
    """The float32 whose bits a uint32 holds."""
    signature = types.float32(types.uint32)
    return signature, lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


bits_of: Any = intrinsic(_bits_codegen)
float_of: Any = intrinsic(_float_codegen)


@njit(inline="always")
def widen(bits: Any) -> Any:
    """BF16 bits to float32."""
    return float_of(np.uint32(bits) << np.uint32(16))


@njit(inline="always")
def to_bf16(value: Any) -> Any:
    """Float32 to BF16 bits, to nearest even. NaN stays NaN: its quiet bit is in the upper half."""
    bits = bits_of(value)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@njit(inline="always")
def exp(x: Any) -> Any:
    """e^x in float32 within 2 units in the last place, for a loop the compiler can vectorize.

    Range reduction to [-ln 2 / 2, ln 2 / 2] and the Taylor polynomial of degree 6.
    """
    # Within these bounds the exponent field below neither under- nor overflows.
    y = min(max(x, np.float32(-87.0)), np.float32(88.722))
    n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
    r = y - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    result = float_of(np.uint32(np.int32(bits_of(p)) + (np.int32(n) << np.int32(23))))
    return result if x <= np.float32(88.722) else np.float32(np.inf)


@njit(inline="always")
def nearest_e4m3(value: Any) -> Any:
    """The E4M3 number nearest to a float32, to even, saturated at ±448; NaN becomes ±448."""
    bits = bits_of(value)
    sign = np.uint32(bits & np.uint32(0x80000000))
    # The bits of 448.
    magnitude = np.uint32(min(np.uint32(bits & np.uint32(0x7FFFFFFF)), np.uint32(0x43E00000)))
    # Normal numbers keep 3 of 23 mantissa bits; below 2^-6 the unit is 2^-9.
    odd = (magnitude >> np.uint32(20)) & np.uint32(1)
    normal = np.uint32((magnitude + np.uint32(0x7FFFF) + odd) & np.uint32(0xFFF00000))
    subnormal = bits_of(
        np.float32(np.rint(float_of(magnitude) * np.float32(512)) * np.float32(2**-9))
    )
    return float_of(sign | (normal if magnitude >= np.uint32(0x3C800000) else subnormal))


@njit(inline="always")
def code_of(nearest: Any) -> Any:
    """The E4M3 code of a float32 that is an E4M3 number."""
    bits = bits_of(nearest)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # Of the 8 exponent and 23 mantissa bits E4M3 has the low 4, less the bias, and the top 3; a subnormal
    # number is a count of units of 2^-9.
    normal = np.uint32((magnitude >> np.uint32(20)) - np.uint32(960))
    subnormal = np.uint32(np.int32(float_of(magnitude) * np.float32(512)))
    code = normal if magnitude >= np.uint32(0x3C800000) else subnormal
    return np.uint8(((bits >> np.uint32(24)) & np.uint32(0x80)) | code)
