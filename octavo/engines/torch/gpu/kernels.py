"""What lies between the matrix products, in Triton: see :mod:`octavo.engines.torch.gpu.reference` for what each computes.

A program has one row, or one head of keys; numbers are BF16, E4M3 codes or integers in memory and float32 between.
Products and sums are rounded to BF16 where the reference rounds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.engines.torch.batch import BLOCK
from octavo.fp8 import E4M3, E4M3_MAX

# Keys that a program of decode attention takes at a time.
_KEYS = 64
# Programs that keep a large GPU busy: a sequence's keys are split until there are so many.
_PROGRAMS = 512
_MOST_SPLITS = 32
# Rows of a tile that tensor cores multiply, at least.
_ROWS = 16

_jit: Any = triton.jit


@_jit
def _as_stored(x: tl.tensor, scale: tl.tensor, limit: tl.constexpr) -> tl.tensor:
    """float32 as E4M3 numbers on a scale, to nearest even: casts have nothing left to round, which not all do alike."""
    x = tl.div_rn(x, scale)
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2^-6 the step is 2^-9, that of float32 at 2^14.
    shifted = (x + 24576.0) - 24576.0
    rounded = tl.where(tl.abs(x) < 0.015625, shifted, bits.to(tl.float32, bitcast=True))
    # NaN stays what it is.
    return tl.where(x == x, rounded, x)


@_jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """float32 as BF16 numbers, to nearest even: the cast has nothing left to round."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@_jit
def _quantize(
    x: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    limit: tl.constexpr,
    width: tl.constexpr,
) -> None:
    at = tl.program_id(0) * width + tl.arange(0, width)
    value = tl.load(x + at, mask=at < count).to(tl.float32)
    codes = _as_stored(value, tl.load(scale), limit)
    tl.store(out + at, codes.to(out.dtype.element_ty), mask=at < count)


@_jit
def _add_rms_norm(
    hidden: tl.tensor,
    update: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    adds: tl.constexpr,
    quantizes: tl.constexpr,
    limit: tl.constexpr,
    width: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * channels
    at = tl.arange(0, width)
    inside = at < channels
    x = tl.load(hidden + row + at, mask=inside, other=0.0).to(tl.float32)
    if adds:
        x = _rounded(x + tl.load(update + row + at, mask=inside, other=0.0).to(tl.float32))
        tl.store(hidden + row + at, x.to(tl.bfloat16), mask=inside)
    normal = _rounded(x * tl.rsqrt(tl.sum(x * x, axis=0) / channels + eps))
    y = _rounded(normal * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32))
    if quantizes:
        y = _as_stored(y, tl.load(scale), limit)
    tl.store(out + row + at, y.to(out.dtype.element_ty), mask=inside)


@_jit
def _silu_mul(
    gate: tl.tensor,
    up: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    quantizes: tl.constexpr,
    limit: tl.constexpr,
    width: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    activated = _rounded(tl.div_rn(x, 1.0 + tl.exp(-x)))
    y = _rounded(activated * tl.load(up + at, mask=inside, other=0.0).to(tl.float32))
    if quantizes:
        y = _as_stored(y, tl.load(scale), limit)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@_jit
def _rotate_and_store(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    stored_keys: tl.tensor,
    stored_values: tl.tensor,
    tables: tl.tensor,
    sequences: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    most: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
    quantizes: tl.constexpr,
    limit: tl.constexpr,
    width: tl.constexpr,
) -> None:
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = size // 2
    at = tl.arange(0, width)
    inside = at < half
    position = tl.load(positions + token)
    c = tl.load(cos + position * half + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + position * half + at, mask=inside, other=0.0).to(tl.float32)
    if head < heads:
        row = queries + (token * heads + head) * size
    else:
        row = keys + (token * kv_heads + head - heads) * size
    low = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(row + half + at, mask=inside, other=0.0).to(tl.float32)
    first = _rounded(_rounded(low * c) - _rounded(high * s))
    second = _rounded(_rounded(high * c) + _rounded(low * s))
    if head < heads:
        target = out + (token * heads + head) * size
        tl.store(target + at, first.to(tl.bfloat16), mask=inside)
        tl.store(target + half + at, second.to(tl.bfloat16), mask=inside)
    else:
        sequence = tl.load(sequences + token)
        number = tl.load(tables + sequence * most + position // block)
        place = ((number * kv_heads + head - heads) * block + position % block) * size
        source = values + (token * kv_heads + head - heads) * size
        v_low = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        v_high = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
        if quantizes:
            first = _as_stored(first, key_scale, limit)
            second = _as_stored(second, key_scale, limit)
            v_low = _as_stored(v_low, value_scale, limit)
            v_high = _as_stored(v_high, value_scale, limit)
        kind: tl.constexpr = stored_keys.dtype.element_ty
        tl.store(stored_keys + place + at, first.to(kind), mask=inside)
        tl.store(stored_keys + place + half + at, second.to(kind), mask=inside)
        tl.store(stored_values + place + at, v_low.to(kind), mask=inside)
        tl.store(stored_values + place + half + at, v_high.to(kind), mask=inside)


@_jit
def _attend(
    queries: tl.tensor,
    stored_keys: tl.tensor,
    stored_values: tl.tensor,
    tables: tl.tensor,
    positions: tl.tensor,
    partial: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    factor: tl.tensor,
    most: tl.tensor,
    window: tl.tensor,
    kv_heads: tl.tensor,
    group: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
    operand: tl.constexpr,
) -> None:
    """One split of a sequence's keys, for the queries that share a head of keys (flash decoding)."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + sequence)
    first = tl.maximum(position + 1 - window, 0) // tile
    tiles = position // tile + 1 - first
    share = (tiles + splits - 1) // splits
    begin = first + split * share
    end = tl.minimum(begin + share, first + tiles)
    at, row, key = tl.arange(0, width), tl.arange(0, rows), tl.arange(0, tile)
    inside = at < size
    query = (sequence * kv_heads + head) * group + row
    q = tl.load(
        queries + query[:, None] * size + at[None, :],
        mask=(row < group)[:, None] & inside[None, :],
        other=0.0,
    ).to(operand)
    largest = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    found = tl.zeros([rows, width], tl.float32)
    for number in range(begin, end):
        place = number * tile + key
        seen = (place <= position) & (place > position - window)
        blocks = tl.load(tables + sequence * most + place // block, mask=seen, other=0)
        start = ((blocks * kv_heads + head) * block + place % block) * size
        where = start[:, None] + at[None, :]
        there = seen[:, None] & inside[None, :]
        k = tl.load(stored_keys + where, mask=there, other=0.0).to(operand)
        scores = tl.dot(q, tl.trans(k)) * factor
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        kept = tl.exp(largest - higher)
        v = tl.load(stored_values + where, mask=there, other=0.0).to(operand)
        found = found * kept[:, None] + tl.dot(weights.to(operand), v)
        total = total * kept + tl.sum(weights, axis=1)
        largest = higher
    to = query * splits + split
    tl.store(maxima + to, largest, mask=row < group)
    tl.store(sums + to, total, mask=row < group)
    tl.store(
        partial + to[:, None] * size + at[None, :],
        found,
        mask=(row < group)[:, None] & inside[None, :],
    )


@_jit
def _combine(
    partial: tl.tensor,
    maxima: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    factor: tl.tensor,
    size: tl.constexpr,
    width: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """The splits of a query put together."""
    query = tl.program_id(0).to(tl.int64)
    at, split = tl.arange(0, width), tl.arange(0, splits)
    inside = at < size
    largest = tl.load(maxima + query * splits + split)
    weights = tl.exp(largest - tl.max(largest, axis=0))
    total = tl.sum(weights * tl.load(sums + query * splits + split), axis=0)
    parts = tl.load(
        partial + (query * splits + split)[:, None] * size + at[None, :],
        mask=inside[None, :],
        other=0.0,
    )
    result = tl.sum(parts * weights[:, None], axis=0) / total * factor
    tl.store(out + query * size + at, _rounded(result).to(tl.bfloat16), mask=inside)


def quantize(x: Tensor, scale: Tensor | None) -> Tensor:
    """See :func:`octavo.engines.torch.gpu.reference.quantize`."""
    if scale is None:
        return x
    x = x.contiguous()
    out = torch.empty_like(x, dtype=E4M3)
    width = 1024
    _quantize[(triton.cdiv(x.numel(), width),)](x, scale, out, x.numel(), E4M3_MAX, width)
    return out


def add_rms_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, scale: Tensor | None
) -> Tensor:
    """See :func:`octavo.engines.torch.gpu.reference.add_rms_norm`."""
    tokens, channels = hidden.shape
    out = torch.empty_like(hidden, dtype=hidden.dtype if scale is None else E4M3)
    width = triton.next_power_of_2(channels)
    _add_rms_norm[(tokens,)](
        hidden,
        hidden if update is None else update,
        weight,
        weight if scale is None else scale,
        out,
        channels,
        eps,
        update is not None,
        scale is not None,
        E4M3_MAX,
        width,
        num_warps=min(max(width // 512, 1), 16),
    )
    return out


def silu_mul(gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """See :func:`octavo.engines.torch.gpu.reference.silu_mul`."""
    out = torch.empty_like(gate, dtype=gate.dtype if scale is None else E4M3)
    width = 1024
    _silu_mul[(triton.cdiv(gate.numel(), width),)](
        gate,
        up,
        gate if scale is None else scale,
        out,
        gate.numel(),
        scale is not None,
        E4M3_MAX,
        width,
    )
    return out


def rotate_and_store(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    stored: tuple[Tensor, Tensor],
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    scales: tuple[float, float],
) -> Tensor:
    """See :func:`octavo.engines.torch.gpu.reference.rotate_and_store`."""
    tokens, heads, size = queries.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    _rotate_and_store[(tokens, heads + kv_heads)](
        *(queries.contiguous(), keys.contiguous(), values.contiguous(), cos, sin, *stored),
        *(tables, sequences, positions, out, *scales, tables.shape[1], heads, kv_heads),
        size=size,
        block=BLOCK,
        quantizes=stored[0].dtype == E4M3,
        limit=E4M3_MAX,
        width=triton.next_power_of_2(size // 2),
        num_warps=1,
    )
    return out


def decode_attention(
    queries: Tensor,
    stored: tuple[Tensor, Tensor],
    tables: Tensor,
    positions: Tensor,
    window: int,
    scales: tuple[float, float],
) -> Tensor:
    """See :func:`octavo.engines.torch.gpu.reference.decode_attention`."""
    count, heads, size = queries.shape
    kv_heads = stored[0].shape[1]
    group = heads // kv_heads
    longest = triton.cdiv(tables.shape[1] * BLOCK, _KEYS)
    splits = max(1, min(_PROGRAMS // (count * kv_heads), longest, _MOST_SPLITS))
    # A power of two: each number of splits is compiled by itself.
    splits = 1 << (splits.bit_length() - 1)
    width = triton.next_power_of_2(size)
    partial = torch.empty(count, heads, splits, size, dtype=torch.float32, device=queries.device)
    maxima, sums = (
        torch.empty_like(partial[..., 0], memory_format=torch.contiguous_format) for _ in range(2)
    )
    _attend[(count, kv_heads, splits)](
        *(queries.contiguous(), *stored, tables, positions, partial, maxima, sums),
        *(scales[0] * size**-0.5, tables.shape[1], window, kv_heads),
        group=group,
        size=size,
        block=BLOCK,
        rows=max(triton.next_power_of_2(group), _ROWS),
        width=width,
        tile=_KEYS,
        splits=splits,
        # Triton's interpreter, which runs it on CPUs, multiplies no BF16.
        operand=tl.float32 if queries.device.type == "cpu" else tl.bfloat16,
    )
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    _combine[(count * heads,)](
        *(partial, maxima, sums, out, scales[1]),
        size=size,
        width=width,
        splits=splits,
        num_warps=1,
    )
    return out
