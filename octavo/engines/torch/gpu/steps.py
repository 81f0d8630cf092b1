"""One token of each of many sequences: batches of few sizes, each captured as one CUDA graph.

Launching some hundred kernels takes a processor longer than a GPU takes to run them on few tokens. A graph is launched
once. It computes with the tensors it was captured with, so batches are copied into those, and filled up to the next
size with rows that read and write a block of the cache that no sequence has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.engines.torch.batch import BLOCK, Batch
from octavo.engines.torch.gpu.places import Places, places_of

# Sequences of the largest batch that is captured, and between which sizes: powers of two, then multiples.
MOST = 512
_STRIDE = 32


def size_for(count: int) -> int:
    """The size that a batch of so many sequences is filled up to, up to :data:`MOST`."""
    if count < _STRIDE:
        return 1 << (count - 1).bit_length()
    return -(-count // _STRIDE) * _STRIDE


def filled(batch: Batch, size: int, spare: int) -> Batch:
    """A batch of single tokens with further rows.

    Args:
        batch: a token of each sequence.
        size: of the result.
        spare: the cache block that the further rows use.
    """
    missing = size - len(batch.tokens)
    row = torch.full((missing, batch.tables.shape[1]), spare)
    zeros = torch.zeros(missing, dtype=torch.int64)
    return Batch(
        tokens=torch.cat([batch.tokens, zeros]),
        positions=torch.cat([batch.positions, zeros]),
        starts=torch.arange(size + 1),
        tables=torch.cat([batch.tables, row]),
        wanted=batch.wanted,
    )


class Step:
    """All layers for so many single tokens, as one CUDA graph."""

    def __init__(
        self,
        run: Callable[[Places], Tensor],
        size: int,
        positions: int,
        spare: int,
        device: torch.device,
        pool: Any,
    ) -> None:
        """
        Args:
            run: what is captured; it gives hidden states ``[size, hidden]`` and waits for nothing.
            size: tokens.
            positions: of a sequence, at most.
            spare: a cache block that may be written to.
            device: a GPU.
            pool: memory that the graphs of one decoder share; no two run at a time.
        """
        none = torch.zeros(0, dtype=torch.int64)
        tables = torch.zeros(0, -(-positions // BLOCK), dtype=torch.int64)
        self._places = places_of(filled(Batch(none, none, none, tables, none), size, spare), device)
        new: Any = torch.cuda.Stream  # has no types
        stream = new(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Kernels are compiled and chosen the first time.
            for _ in range(2):
                run(self._places)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._hidden = run(self._places)

    def __call__(self, places: Places) -> Tensor:
        """Hidden states of a batch of this size; valid until the next call."""
        own = self._places
        own.tokens.copy_(places.tokens)
        own.positions.copy_(places.positions)
        own.tables[:, : places.tables.shape[1]].copy_(places.tables)
        self._graph.replay()
        return self._hidden
