"""Continuations of one prefix, packed into one sequence.

The keys and values of the prefix are computed once. Its continuations then go through the model as one
sequence without padding; only attention treats each by itself, behind the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from octavo.attention import attention

ATTENTION = "octavo-packed"


class Prefix(Cache):
    """What attention keeps of a prefix. It never grows: what follows is attended to and forgotten.

    Hence any number of threads may use the same one.

    Attributes:
        tokens: in the prefix.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        """Read a prefix.

        Args:
            model: a base model, without a head.
            ids: int64 ``[tokens]``, on its device; none is a prefix too.
        """
        # Without a config: every layer keeps all of it, those with sliding attention too.
        filled = DynamicCache()
        if len(ids):
            model(input_ids=ids.unsqueeze(0), past_key_values=filled, use_cache=True)
        super().__init__(layers=filled.layers)
        self.tokens = len(ids)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as they came, for attention to put behind the prefix's."""
        return key_states, value_states

    def extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values ``[1, kv_heads, tokens, head_dim]`` behind those of the prefix."""
        if not self.tokens:
            return key, value
        own: Any = self.layers[layer]
        return torch.cat([own.keys, key], dim=-2), torch.cat([own.values, value], dim=-2)


class Packed:
    """Continuations of a prefix as one sequence.

    Attributes:
        prefix: theirs.
        ids: int64 ``[1, tokens]``.
        positions: int64 ``[1, tokens]``: each continuation's begin behind the prefix.
        lengths: tokens of each.
    """

    def __init__(self, prefix: Prefix, sequences: Sequence[Tensor], dtype: torch.dtype) -> None:
        """
        Args:
            prefix: read already.
            sequences: int64, one-dimensional, each of at least one token, on the model's device.
            dtype: the model's.
        """
        self.prefix, self._dtype = prefix, dtype
        self.lengths = [len(one) for one in sequences]
        self.ids = torch.cat(list(sequences)).unsqueeze(0)
        places = [torch.arange(length) + prefix.tokens for length in self.lengths]
        self.positions = torch.cat(places).unsqueeze(0).to(self.ids.device)
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, length: int, window: int | None) -> Tensor | None:
        """What a continuation of ``length`` tokens does not see, as ``-inf``: ``[length, all tokens]``.

        None is plain causal attention. Made once for all layers.

        Args:
            length: tokens of the continuation.
            window: tokens that a token sees, itself included, in a layer with sliding attention.
        """
        end = self.prefix.tokens + length
        if window is not None and window >= end:
            window = None
        if not self.prefix.tokens and window is None:
            return None
        if (length, window) not in self._masks:
            place = torch.arange(end, device=self.ids.device)
            ahead = place - place[self.prefix.tokens :, None]
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device)
            self._masks[length, window] = mask.masked_fill_(hidden, -torch.inf)
        return self._masks[length, window]


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Octavo's attention, and for packed sequences SDPA one by one, in ``transformers``' convention."""
    if packed is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    results = []
    parts = [torch.split(states, packed.lengths, dim=2) for states in (query, key, value)]
    for one, own_key, own_value in zip(*parts, strict=True):
        mask = packed.mask(one.shape[2], kwargs.get("sliding_window"))
        result = torch.nn.functional.scaled_dot_product_attention(
            one,
            *packed.prefix.extended(module.layer_idx, own_key, own_value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=kwargs.get("scaling"),
            # Faster on a CPU than heads repeated first, as `transformers` does beside a mask.
            enable_gqa=True,
        )
        results.append(result.transpose(1, 2))
    return torch.cat(results, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def last_states(model: Any, packed: Packed) -> Tensor:
    """The hidden states ``[continuations, hidden_size]`` of the last tokens.

    Args:
        model: a base model whose attention is :data:`ATTENTION`.
        packed: what to read.
    """
    states = model(
        input_ids=packed.ids,
        position_ids=packed.positions,
        past_key_values=packed.prefix,
        use_cache=True,
        # Four dimensions: not to be made. Attention has its own.
        attention_mask=torch.empty(1, 1, 0, 0),
        packed=packed,
    ).last_hidden_state[0]
    ends = torch.tensor(packed.lengths).cumsum(0) - 1
    last: Tensor = states[ends.to(states.device)]
    return last
