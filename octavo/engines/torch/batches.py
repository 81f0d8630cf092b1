"""Sequences of different lengths, in batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def by_length(lengths: Sequence[int], extra: int, budget: int) -> Iterator[list[int]]:
    """Indices of sequences in batches, the longest first, so that little is padding.

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


def pad(sequences: Sequence[Tensor], side: str, device: torch.device) -> Tensor:
    """Sequences as one int64 matrix ``[sequences, longest]``, padded with token 0."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_side=side).to(
        device
    )
