"""What goes through the model at once: tokens of several sequences, each with a place in the cache.

A sequence's keys and values lie in blocks of :data:`BLOCK` tokens, listed in order in its row of a table:
token ``p`` of sequence ``s`` is at ``p % BLOCK`` of block ``tables[s, p // BLOCK]``. Sequences may share blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

# Tokens of a cache block.
BLOCK = 16


class Batch(NamedTuple):
    """Tokens to compute; those of a sequence are consecutive, and follow those that the cache has.

    Attributes:
        tokens: int64 ``[n]``, on the CPU, like all of these.
        positions: int64 ``[n]``: the place of each in its sequence, from 0.
        starts: int64 ``[sequences + 1]``: sequence ``s`` has the tokens ``starts[s]`` to ``starts[s + 1]``.
        tables: int64 ``[sequences, most]``: the cache blocks of each; a row's unused end is 0.
        wanted: int64 ``[m]``: which tokens' hidden states are wanted, as indices, ascending.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    tables: Tensor
    wanted: Tensor


class Cache(Protocol):
    """Keys and values of all layers, in blocks; a model takes those it made."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        ...

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        ...


class Model(Protocol):
    """A decoder that knows token ids only.

    Attributes:
        vocab_size: token ids are below.
        max_positions: tokens of a sequence, at most.
    """

    vocab_size: int
    max_positions: int

    def new_cache(self, blocks: int) -> Cache:
        """An empty cache for ``blocks * BLOCK`` tokens."""
        ...

    def forward(self, batch: Batch, cache: Any) -> Tensor:
        """Compute tokens and put their keys and values into the cache.

        Returns:
            The wanted last hidden states, behind the final norm: ``[m, hidden_size]``, the model's dtype.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[m, vocab_size]`` of hidden states, in the model's dtype."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...
