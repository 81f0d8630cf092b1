"""Where the tokens of a batch belong, on a device, and which of them go through attention together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.engines.torch.batch import Batch


class Chunk(NamedTuple):
    """New tokens of sequences that have as many of them, at the same positions.

    Attributes:
        rows: int64 ``[sequences]``, of the table.
        tokens: int64 ``[sequences, count]``, places in the batch.
        begin: position of the first.
    """

    rows: Tensor
    tokens: Tensor
    begin: int


class Places(NamedTuple):
    """A batch on the device.

    Attributes:
        tokens: int64 ``[n]``.
        positions: int64 ``[n]``.
        sequences: int64 ``[n]``: the row of the table for each token.
        tables: int64 ``[sequences, most]``.
        singles: int64 ``[m]``: places of tokens that are their sequence's only new one.
        chunks: all others.
    """

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    tables: Tensor
    singles: Tensor
    chunks: list[Chunk]


def places_of(batch: Batch, device: torch.device) -> Places:
    """Sort a batch's sequences by what they need of attention, and bring it to the device."""
    counts = batch.starts.diff()
    sequences = torch.repeat_interleave(counts)
    alike: dict[tuple[int, int], list[int]] = {}
    begins = batch.positions[batch.starts[:-1]].tolist()
    for row, (count, begin) in enumerate(zip(counts.tolist(), begins, strict=True)):
        if count > 1:
            alike.setdefault((count, begin), []).append(row)
    chunks = []
    for (count, begin), members in alike.items():
        rows = torch.tensor(members)
        tokens = batch.starts[rows].unsqueeze(1) + torch.arange(count)
        chunks.append(Chunk(rows.to(device), tokens.to(device), begin))
    singles = batch.starts[:-1][counts == 1]
    return Places(
        tokens=batch.tokens.to(device),
        positions=batch.positions.to(device),
        sequences=sequences.to(device),
        tables=batch.tables.to(device),
        singles=singles.to(device),
        chunks=chunks,
    )
