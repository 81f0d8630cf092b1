"""One prefix's keys and values under a whole batch of continuations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class SharedPrefix(Cache):
    """A cache that every sequence of any batch begins with, and that never grows.

    What is fed after the prefix is attended to and forgotten, so that any number of batches, in any
    number of threads, may use the same one. Only the layer at work holds a copy of the prefix for
    each sequence of its batch.
    """

    def __init__(self, filled: Cache) -> None:
        """
        Args:
            filled: by one sequence. Its layers must keep all of it, those with sliding attention
                too, whose mask then does the rest.
        """
        super().__init__(layers=filled.layers)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The prefix and what follows it: keys and values ``[batch, heads, all tokens, head_dim]``."""
        layer: Any = self.layers[layer_idx]
        return _after(layer.keys, key_states), _after(layer.values, value_states)


def _after(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=-2)
