"""Sequences of different lengths, in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def packed(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences in batches without padding, in order.

    Args:
        lengths: of the sequences, in tokens.
        budget: tokens in a batch; a longer sequence goes alone.
    """
    batch: list[int] = []
    filled = 0
    for index, length in enumerate(lengths):
        if batch and filled + length > budget:
            yield batch
            batch, filled = [], 0
        batch.append(index)
        filled += length
    if batch:
        yield batch


def padded(lengths: Sequence[int], extra: int, budget: int) -> Iterator[list[int]]:
    """Indices of sequences in padded batches, the longest first, so that little is padding.

    Args:
        lengths: of the sequences, in tokens.
        extra: tokens that each sequence takes besides its own.
        budget: tokens in a batch, padding and ``extra`` included; a longer sequence goes alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        # The first is the longest: all others are padded to it.
        size = max(1, budget // (lengths[order[0]] + extra))
        yield order[:size]
        order = order[size:]


def pad_left(sequences: Sequence[Tensor]) -> Tensor:
    """Sequences as one int64 matrix ``[sequences, longest]``, token 0 before the shorter ones."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_side="left")
