"""Attention as ``transformers`` computes it, with keys and values passing through the block's cache.

Registered with ``transformers`` under the name :data:`ATTENTION`; a model built with it runs the
library's SDPA attention, and its attention blocks may have a module ``kv_cache`` that keys and values
go through on the way, after rotary embedding, where an engine's cache would take them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ATTENTION = "octavo"

# PyTorch's CPU kernel takes this many keys at a time and skips none but whole blocks, so that causal
# attention over up to so many tokens computes the full square.
_KEY_BLOCK = 512
_SLICE = 128


class KeyValueCache(nn.Module):
    """What a cache does to keys and values: here nothing. Forward hooks may look at them."""

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Args: key and value, each ``[batch, kv_heads, tokens, head_dim]``."""
        return key, value


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA attention behind the block's ``kv_cache``, in ``transformers``' calling convention."""
    if hasattr(module, "kv_cache"):
        key, value = module.kv_cache(key, value)
    tokens = query.shape[2]
    if (
        attention_mask is None
        and query.device.type == "cpu"
        and _SLICE < tokens == key.shape[2] <= _KEY_BLOCK
    ):
        return _sliced_attention(query, key, value, kwargs.get("scaling")), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _sliced_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention, bit for bit PyTorch's, a slice of queries at a time on the keys it may see."""
    slices = []
    for start in range(0, query.shape[2], _SLICE):
        stop = min(start + _SLICE, query.shape[2])
        slices.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, :stop],
                value[:, :, :stop],
                attn_mask=_causal_mask(start, stop, query.dtype) if start else None,
                is_causal=not start,
                scale=scale,
                enable_gqa=True,
            ).transpose(1, 2)
        )
    return torch.cat(slices, dim=1)


@functools.cache
def _causal_mask(start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """What queries ``start`` to ``stop`` add to their scores with keys 0 to ``stop``."""
    # Kept beyond the call, for others that may take gradients.
    with torch.inference_mode(False):
        return torch.full((stop - start, stop), -torch.inf).triu(start + 1).to(dtype)
