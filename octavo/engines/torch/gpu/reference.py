"""What lies between the matrix products, in plain PyTorch: what the kernels compute, and what runs without them.

BF16 is rounded to where ``transformers`` rounds to it. A result that goes into FP8 products may be asked for as E4M3
codes, on the static scale of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import fp8
from octavo.engines.torch.batch import BLOCK
from octavo.engines.torch.gpu import cache


def quantize(x: Tensor, scale: Tensor | None) -> Tensor:
    """BF16 as E4M3 codes on a scale, or as it is without one."""
    if scale is None:
        return x
    return (x.float() / scale).clamp_(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) of BF16 ``[..., channels]``."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def add_rms_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, scale: Tensor | None
) -> Tensor:
    """Add ``update`` to ``hidden``, in place, and normalize.

    Args:
        hidden: BF16 ``[tokens, channels]``.
        update: likewise, or None.
        weight: BF16 ``[channels]``.
        eps: what RMSNorm adds.
        scale: see :func:`quantize`.
    """
    if update is not None:
        hidden += update
    return quantize(rms_norm(hidden, weight, eps), scale)


def silu_mul(gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """``silu(gate) · up`` of BF16 ``[tokens, channels]``; see :func:`quantize`."""
    return quantize(torch.nn.functional.silu(gate) * up, scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of heads.

    Args:
        x: BF16 ``[tokens, heads, head_dim]``.
        cos: BF16 ``[tokens, head_dim / 2]``.
        sin: likewise.
    """
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


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
    """Rotate queries and keys, and put keys and values into the cache.

    Args:
        queries: BF16 ``[tokens, heads, head_dim]``.
        keys: BF16 ``[tokens, kv_heads, head_dim]``.
        values: likewise.
        cos: BF16 ``[positions, head_dim / 2]``.
        sin: likewise.
        stored: keys and values of a layer, ``[blocks, kv_heads, BLOCK, head_dim]``.
        tables: int64 ``[sequences, most]``.
        sequences: int64 ``[tokens]``: the row of the table for each.
        positions: int64 ``[tokens]``.
        scales: of stored keys and values.

    Returns:
        The rotated queries.
    """
    blocks, places = tables[sequences, positions // BLOCK], positions % BLOCK
    cos, sin = cos[positions], sin[positions]
    cache.write(stored[0], blocks, places, rotate(keys, cos, sin), scales[0])
    cache.write(stored[1], blocks, places, values, scales[1])
    return rotate(queries, cos, sin)


def decode_attention(
    queries: Tensor,
    stored: tuple[Tensor, Tensor],
    tables: Tensor,
    positions: Tensor,
    window: int,
    scales: tuple[float, float],
) -> Tensor:
    """Attention of one token of each of many sequences to those before it and itself.

    Args:
        queries: BF16 ``[sequences, heads, head_dim]``.
        stored: keys and values of a layer, ``[blocks, kv_heads, BLOCK, head_dim]``.
        tables: int64 ``[sequences, most]``.
        positions: int64 ``[sequences]``, of the queries.
        window: tokens that each sees, itself included.
        scales: of stored keys and values.

    Returns:
        BF16 ``[sequences, heads, head_dim]``.
    """
    count, heads, size = queries.shape
    kv_heads, end = stored[0].shape[1], tables.shape[1] * BLOCK
    keys, values = (cache.read(one, tables, end).float() for one in stored)
    grouped = queries.float().view(count, kv_heads, heads // kv_heads, size)
    scores = grouped @ keys.transpose(-1, -2) * (scales[0] * size**-0.5)
    places = torch.arange(end, device=queries.device)
    before = positions.unsqueeze(1) - places
    seen = ((before >= 0) & (before < window))[:, None, None]
    # What a block held before may be anything, also NaN.
    values = values.masked_fill(~seen.transpose(-1, -2), 0)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return (weights @ values * scales[1]).view(count, heads, size).to(queries.dtype)
