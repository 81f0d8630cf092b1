"""Attention of many new tokens: keys and values are gathered out of their blocks for PyTorch's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from octavo.engines.torch.gpu import cache
from octavo.engines.torch.gpu.places import Chunk


def prefill_attention(
    queries: Tensor,
    stored: tuple[Tensor, Tensor],
    tables: Tensor,
    chunk: Chunk,
    window: int,
    scales: tuple[float, float],
) -> Tensor:
    """Attention of new tokens to those before them and themselves.

    Args:
        queries: BF16 ``[sequences, count, heads, head_dim]``.
        stored: keys and values of a layer, ``[blocks, kv_heads, BLOCK, head_dim]``.
        tables: int64 ``[sequences, most]``, of these sequences.
        chunk: their tokens.
        window: tokens that each sees, itself included.
        scales: of stored keys and values.

    Returns:
        BF16 ``[sequences, count, heads, head_dim]``.
    """
    _, count, heads, size = queries.shape
    end = chunk.begin + count
    keys, values = (cache.read(one, tables, end) for one in stored)
    # The efficient kernels, which FlashAttention leaves some masks to, take a key head for each query head.
    group = heads // keys.shape[1]
    if group > 1:
        keys, values = (one.repeat_interleave(group, dim=1) for one in (keys, values))
    result = torch.nn.functional.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys,
        values,
        attn_mask=_mask(count, end, window, queries.device),
        # Stored numbers are exact in BF16: their scales belong to the float32 parts.
        scale=scales[0] * size**-0.5,
    ).transpose(1, 2)
    return result if scales[1] == 1 else (result.float() * scales[1]).to(queries.dtype)


def _mask(count: int, end: int, window: int, device: torch.device) -> Any:
    """What the last ``count`` of ``end`` tokens see."""
    if window >= end:
        return causal_lower_right(count, end)
    before = torch.arange(end - count, end, device=device).unsqueeze(1)
    before = before - torch.arange(end, device=device)
    return (before >= 0) & (before < window)
