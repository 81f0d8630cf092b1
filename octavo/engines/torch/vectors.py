"""What Numba's loops cannot say: products in full vectors, barriers, and addresses.

A *tile* is the product of 2 to 8 rows of numbers in memory, E4M3 or BF16, with 1 to 8 rows of inputs: as many as there
are registers for, so that a number is decoded once for all of them. Explicit vectors of 16 lanes keep LLVM from choosing half of that.

E4M3 is decoded by way of FP16: its seven low bits, shifted into place there, are the number times 2⁻⁸, its subnormals
included. (As bits of a float32 they would be numbers below 2⁻¹¹⁷, and subnormals, which cost a hundred cycles each.)
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils as _untyped
from numba.extending import intrinsic

from octavo.bits import JIT

# Has no types.
cgutils: Any = _untyped

LANES = 16
# Bytes of a cache line.
LINE = 64
# Bytes from the next strip to what is fetched meanwhile: some 0.6 µs of reading.
_AHEAD = 8192
# A decoded E4M3 number times this is the number.
E4M3_UNIT = 256.0
# By how many rows of inputs there are in a tile, from none on: its rows of numbers.
HEIGHTS = (0, 8, 8, 4, 4, 2, 2, 2, 2)

_BYTE, _HALF_WORD, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()


def vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _splat(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(vector(element), [value] * LANES)


def _decode_e4m3(builder: Any, codes: Any) -> Any:
    """``<16 x i8>`` codes to float32, times 2⁻⁸."""
    wide = builder.shl(builder.sext(codes, vector(_HALF_WORD)), _splat(_HALF_WORD, 7))
    half = builder.bitcast(builder.and_(wide, _splat(_HALF_WORD, 0xBF80)), vector(ir.HalfType()))
    return builder.fpext(half, vector(_FLOAT))


def _decode_bf16(builder: Any, bits: Any) -> Any:
    """``<16 x i16>`` to float32."""
    wide = builder.shl(builder.zext(bits, vector(_WORD)), _splat(_WORD, 16))
    return builder.bitcast(wide, vector(_FLOAT))


class Format(NamedTuple):
    """How numbers lie in memory."""

    element: ir.Type
    nbytes: int
    decode: Callable[[Any, Any], Any]


E4M3 = Format(_BYTE, 1, _decode_e4m3)
_BF16 = Format(_HALF_WORD, 2, _decode_bf16)


def fetch(builder: Any, address: Any) -> None:
    """Fetch a line into the second-level cache."""
    pointer = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), _WORD(0), _WORD(2), _WORD(1)])


class Product(NamedTuple):
    """How numbers and inputs become vectors, and what is added to sums of 16 lanes.

    Attributes:
        columns: that are multiplied at a time.
        nbytes: of a number.
        x_nbytes: of an input.
        numbers: the vectors of ``columns`` numbers at an address.
        inputs: those of as many inputs.
        add: vectors of numbers and of inputs, multiplied, added to a sum.
    """

    columns: int
    nbytes: int
    x_nbytes: int
    numbers: Callable[[Any, Any], list[Any]]
    inputs: Callable[[Any, Any], list[Any]]
    add: Callable[[Any, Any, Any, Any], Any]


def loaded(builder: Any, address: Any, kind: ir.Type) -> Any:
    """A vector at an address."""
    return builder.load(builder.inttoptr(address, ir.PointerType(kind)), align=1)


def _fma(builder: Any, one: Any, other: Any, total: Any) -> Any:
    kind = ir.FunctionType(vector(_FLOAT), [vector(_FLOAT)] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [one, other, total])


def _with_float32(numbers: Format) -> Product:
    """Numbers by inputs in float32."""

    def decoded(builder: Any, address: Any) -> list[Any]:
        return [numbers.decode(builder, loaded(builder, address, vector(numbers.element)))]

    def inputs(builder: Any, address: Any) -> list[Any]:
        return [loaded(builder, address, vector(_FLOAT))]

    return Product(LANES, numbers.nbytes, 4, decoded, inputs, _fma)


def _tile(builder: Any, product: Product, rows: int, arguments: Any) -> None:
    """A tile of ``rows`` rows of inputs; see :func:`tiles`."""
    at, stride, x, x_stride, columns, out = arguments
    height = HEIGHTS[rows]
    number = [builder.add(at, builder.mul(stride, _LONG(row))) for row in range(height)]
    factor = [builder.add(x, builder.mul(x_stride, _LONG(row))) for row in range(rows)]
    entry = builder.block
    body, after = (builder.append_basic_block(name) for name in ("tile", "after"))
    builder.branch(body)

    builder.position_at_end(body)
    column = builder.phi(_LONG)
    sums = [[builder.phi(vector(_FLOAT)) for _ in factor] for _ in number]
    offset, x_offset = (
        builder.mul(column, _LONG(size)) for size in (product.nbytes, product.x_nbytes)
    )
    # Rows behind these, in the order they lie in: read in strips, they come too late by themselves.
    ahead = builder.add(
        builder.add(at, builder.mul(stride, _LONG(height))), builder.mul(offset, _LONG(height))
    )
    for line in range(0, height * product.columns * product.nbytes, LINE):
        fetch(builder, builder.add(ahead, _LONG(_AHEAD + line)))
    right = [product.inputs(builder, builder.add(one, x_offset)) for one in factor]
    added = []
    for one, totals in zip(number, sums, strict=True):
        left = product.numbers(builder, builder.add(one, offset))
        results = []
        for others, total in zip(right, totals, strict=True):
            result = total
            for part, other in zip(left, others, strict=True):
                result = product.add(builder, part, other, result)
            results.append(result)
        added.append(results)
    following = builder.add(column, _LONG(product.columns))
    column.add_incoming(_LONG(0), entry)
    column.add_incoming(following, body)
    for totals, results in zip(sums, added, strict=True):
        for total, result in zip(totals, results, strict=True):
            total.add_incoming(_splat(_FLOAT, 0.0), entry)
            total.add_incoming(result, body)
    builder.cbranch(builder.icmp_signed("<", following, columns), body, after)

    builder.position_at_end(after)
    kind = ir.FunctionType(_FLOAT, [_FLOAT, vector(_FLOAT)])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    reduce = cgutils.get_or_insert_function(builder.module, kind, name)
    for index, result in enumerate(result for results in added for result in results):
        total = builder.call(reduce, [_FLOAT(0.0), result], fastmath=("reassoc",))
        place = builder.inttoptr(builder.add(out, _LONG(4 * index)), ir.PointerType(_FLOAT))
        builder.store(total, place)


def tiles(product: Product) -> Any:
    """``tile(rows, at, stride, x, x_stride, columns, out)``: rows of numbers by ``rows`` rows of inputs.

    All are int64: 1 to 8 rows, addresses, bytes from a row to the next, and columns, a multiple of the product's. There are
    ``HEIGHTS[rows]`` rows of numbers, and ``out`` gets as many of float32 ``[rows]``.
    """

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        rows, *rest = arguments
        end = builder.append_basic_block("end")
        choice = builder.switch(rows, end)
        for count in range(1, len(HEIGHTS)):
            block = builder.append_basic_block(f"rows.{count}")
            choice.add_case(_LONG(count), block)
            builder.position_at_end(block)
            _tile(builder, product, count, rest)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    def tile(
        _: Any, rows: Any, at: Any, stride: Any, x: Any, x_stride: Any, columns: Any, out: Any
    ) -> Any:
        return types.void(*[types.int64] * 7), codegen

    return intrinsic(tile)


@njit(**JIT)
def absent(*arguments: Any) -> None:
    """In the place of what this machine does not have, and nobody calls."""


e4m3_tile, bf16_tile = tiles(_with_float32(E4M3)), tiles(_with_float32(_BF16))


def _prefetch_codegen(_: Any, address: Any) -> Any:
    """Have a cache line fetched from an address, which need not be anybody's."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        fetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


prefetch: Any = intrinsic(_prefetch_codegen)


def _load_codegen(_: Any, address: Any) -> Any:
    """The float32 at an address."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.PointerType(_FLOAT)), align=4)

    return types.float32(types.int64), codegen


def _store_codegen(_: Any, address: Any, value: Any) -> Any:
    """Put a float32 at an address."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, value = arguments
        builder.store(value, builder.inttoptr(address, ir.PointerType(_FLOAT)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


load: Any = intrinsic(_load_codegen)
store: Any = intrinsic(_store_codegen)


def _mixture(numbers: Format, rows: int) -> Any:
    """``mix(at, stride, count, shares, shares_stride, out, out_stride)``: mixtures of rows of numbers.

    All are int64. :data:`LANES` columns of ``count`` rows of numbers at an address, each times its share, are added to
    ``rows`` rows of float32; shares are float32 ``[rows, count]``.
    """

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        at, stride, count, shares, shares_stride, out, out_stride = arguments

        def pointer(base: Any, offset: Any, element: ir.Type) -> Any:
            return builder.inttoptr(builder.add(base, offset), ir.PointerType(element))

        places = [
            pointer(out, builder.mul(out_stride, _LONG(row)), vector(_FLOAT)) for row in range(rows)
        ]
        before = [builder.load(place, align=4) for place in places]
        entry = builder.block
        body, after = (builder.append_basic_block(name) for name in ("mix", "after"))
        builder.branch(body)

        builder.position_at_end(body)
        index = builder.phi(_LONG)
        sums = [builder.phi(vector(_FLOAT)) for _ in places]
        stored = builder.add(at, builder.mul(stride, index))
        value = numbers.decode(builder, loaded(builder, stored, vector(numbers.element)))
        added = []
        for row, total in enumerate(sums):
            offset = builder.add(
                builder.mul(shares_stride, _LONG(row)), builder.mul(index, _LONG(4))
            )
            share = builder.load(pointer(shares, offset, _FLOAT), align=4)
            first = builder.insert_element(ir.Constant(vector(_FLOAT), None), share, _WORD(0))
            everywhere = builder.shuffle_vector(first, first, _splat(_WORD, 0))
            added.append(_fma(builder, value, everywhere, total))
        following = builder.add(index, _LONG(1))
        index.add_incoming(_LONG(0), entry)
        index.add_incoming(following, body)
        for total, begin, result in zip(sums, before, added, strict=True):
            total.add_incoming(begin, entry)
            total.add_incoming(result, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)

        builder.position_at_end(after)
        for place, result in zip(places, added, strict=True):
            builder.store(result, place, align=4)
        return context.get_dummy_value()

    def mix(
        _: Any,
        at: Any,
        stride: Any,
        count: Any,
        shares: Any,
        shares_stride: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        return types.void(*[types.int64] * 7), codegen

    return intrinsic(mix)


_mix_e4, _mix_e1 = (_mixture(E4M3, rows) for rows in (4, 1))
_mix_b4, _mix_b1 = (_mixture(_BF16, rows) for rows in (4, 1))


@njit(**JIT)
def mix(
    at: Any,
    stride: Any,
    nbytes: Any,
    columns: Any,
    count: Any,
    shares: Any,
    shares_stride: Any,
    rows: Any,
    out: Any,
    out_stride: Any,
) -> None:
    """Add rows of numbers, each times its share, to ``rows`` rows of float32, which have shares of their own.

    Args:
        at: address of the first row of numbers.
        stride: bytes from row to row.
        nbytes: of a number: 1 is E4M3, times 2⁻⁸; 2 is BF16.
        columns: a multiple of :data:`LANES`.
        count: rows of numbers, at least one.
        shares: address of float32 ``[rows, count]``.
        shares_stride: bytes from row to row.
        rows: of ``out``.
        out: address of float32 ``[rows, columns]``.
        out_stride: bytes from row to row.
    """
    row = 0
    while row < rows:
        four = rows - row >= 4
        own, target = shares + row * shares_stride, out + row * out_stride
        for column in range(0, columns, LANES):
            begin, place = at + column * nbytes, target + column * 4
            if nbytes == 1:
                if four:
                    _mix_e4(begin, stride, count, own, shares_stride, place, out_stride)
                else:
                    _mix_e1(begin, stride, count, own, shares_stride, place, out_stride)
            elif four:
                _mix_b4(begin, stride, count, own, shares_stride, place, out_stride)
            else:
                _mix_b1(begin, stride, count, own, shares_stride, place, out_stride)
        row += 4 if four else 1


def _decoded_codegen(_: Any, code: Any) -> Any:
    """An E4M3 code, uint8, as float32 times 2⁻⁸; vectorizes."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.shl(builder.sext(arguments[0], _HALF_WORD), _HALF_WORD(7))
        half = builder.bitcast(builder.and_(wide, _HALF_WORD(0xBF80)), ir.HalfType())
        return builder.fpext(half, _FLOAT)

    return types.float32(types.uint8), codegen


decoded: Any = intrinsic(_decoded_codegen)


def _to_bf16_codegen(_: Any, at: Any, count: Any, out: Any) -> Any:
    """``count`` E4M3 codes at an address, a multiple of :data:`LANES`, as the BF16 numbers they are."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        at, count, out = arguments
        entry = builder.block
        body, after = (builder.append_basic_block(name) for name in ("decode", "after"))
        builder.branch(body)

        builder.position_at_end(body)
        index = builder.phi(_LONG)
        codes = loaded(builder, builder.add(at, index), vector(_BYTE))
        number = builder.fmul(_decode_e4m3(builder, codes), _splat(_FLOAT, E4M3_UNIT))
        # Exact: an E4M3 number has fewer bits than a BF16 one.
        upper = builder.lshr(builder.bitcast(number, vector(_WORD)), _splat(_WORD, 16))
        target = builder.add(out, builder.mul(index, _LONG(2)))
        builder.store(
            builder.trunc(upper, vector(_HALF_WORD)),
            builder.inttoptr(target, ir.PointerType(vector(_HALF_WORD))),
            align=2,
        )
        following = builder.add(index, _LONG(LANES))
        index.add_incoming(_LONG(0), entry)
        index.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


_to_bf16: Any = intrinsic(_to_bf16_codegen)


@njit(**JIT)
def decode_codes(at: Any, count: Any, out: Any) -> None:
    """E4M3 codes as the BF16 numbers they are; NaN is not among them.

    Args:
        at: their address.
        count: how many, a multiple of :data:`LANES`.
        out: address of as many BF16.
    """
    if count > 0:
        _to_bf16(at, count, out)


def _without_counts(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    members = getattr(kind, "types", None)
    if members is not None:
        parts = [
            _without_counts(context, builder, one, builder.extract_value(value, index))
            for index, one in enumerate(members)
        ]
        return context.make_tuple(builder, kind, parts)
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    for field in ("meminfo", "parent"):
        setattr(array, field, ir.Constant(getattr(array, field).type, None))
    return array._getvalue()


def _uncounted_codegen(_: Any, value: Any) -> Any:
    """A tuple whose arrays do not count who uses them: the caller keeps them alive.

    Every view of an array in compiled code counts it, with an atomic addition that the other threads wait for.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_counts(context, builder, signature.args[0], arguments[0])

    return value(value), codegen


uncounted: Any = intrinsic(_uncounted_codegen)


def _atomic_add_codegen(_: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an element of an int64 array, seen by all threads; the value before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


def _atomic_load_codegen(_: Any, array: Any, index: Any) -> Any:
    """An element of an int64 array as other threads left it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(builder.gep(data, [arguments[1]]), "acquire", 8)

    return types.int64(array, types.int64), codegen


def _pause_codegen(_: Any) -> Any:
    """Let the core's other thread go first, where cores have two."""

    def codegen(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


_pause: Any = intrinsic(_pause_codegen)
_atomic_add: Any = intrinsic(_atomic_add_codegen)
_atomic_load: Any = intrinsic(_atomic_load_codegen)
_sched_yield = types.ExternalFunction("sched_yield", types.int32())

# A barrier: who has arrived, how often all had, and whether it is broken; far enough apart for caches.
_ARRIVED, _ROUND, _BROKEN = 0, 16, 32
BARRIER_SIZE = 48
# Looks at the barrier before the core is offered to others.
_SPINS = 500


@njit(**JIT)
def wait(barrier: Any, threads: Any) -> None:
    """Wait until all threads are here, or one has broken the barrier.

    Args:
        barrier: int64 ``[BARRIER_SIZE]``, zeros at first.
        threads: how many there are.
    """
    now = _atomic_load(barrier, _ROUND)
    if _atomic_add(barrier, _ARRIVED, 1) == threads - 1:
        _atomic_add(barrier, _ARRIVED, -threads)
        _atomic_add(barrier, _ROUND, 1)
        return
    spins = 0
    while _atomic_load(barrier, _ROUND) == now and _atomic_load(barrier, _BROKEN) == 0:
        spins += 1
        _pause()
        if spins > _SPINS:
            _sched_yield()


def new_barrier() -> np.ndarray[Any, np.dtype[np.int64]]:
    """A barrier that nobody waits at."""
    return np.zeros(BARRIER_SIZE, dtype=np.int64)


def break_barrier(barrier: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Let all pass who wait or will."""
    barrier[_BROKEN] = 1
