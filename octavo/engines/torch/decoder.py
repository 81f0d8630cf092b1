"""The decoder on a CPU: a cache in blocks, and two ways through the layers, for few tokens and for many."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.engines.torch import step
from octavo.engines.torch.batch import BLOCK, Batch
from octavo.engines.torch.prefill import Prefill
from octavo.engines.torch.step import Work
from octavo.engines.torch.team import Team
from octavo.engines.torch.weights import Array, Weights, load_weights

# Tokens up to which reading weights takes longer than computing with them.
FEW = 64


class CpuCache(NamedTuple):
    """Keys and values in blocks: E4M3 codes (uint8) if the checkpoint has scales for them, else BF16 (uint16).

    Attributes:
        keys: ``[layers, blocks, kv_heads, BLOCK, head_dim]``.
        values: likewise.
    """

    keys: Array
    values: Array

    @property
    def blocks(self) -> int:
        """How many there are."""
        return int(self.keys.shape[1])

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return self.keys.nbytes + self.values.nbytes


class _Tokens(NamedTuple):
    """A batch as compiled code takes it."""

    tokens: Array
    positions: Array
    starts: Array
    tables: Array


class CpuDecoder:
    """A :class:`octavo.engines.torch.batch.Model`. Not for several threads at a time.

    Attributes:
        vocab_size: token ids are below.
        max_positions: tokens of a sequence, at most.
        cached_bytes: of a token's keys and values in all layers.
        device: the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, weights: Weights, threads: int) -> None:
        self._weights, self._team = weights, Team(threads)
        shape = weights.shape
        self.vocab_size, self.max_positions = shape.vocab, shape.positions
        self._cache_dtype = np.uint8 if len(weights.cache_scales) else np.uint16
        self.cached_bytes = (
            2
            * shape.layers
            * shape.kv_heads
            * shape.head_dim
            * np.dtype(self._cache_dtype).itemsize
        )
        self._work = Work.new(shape, FEW, threads, BLOCK)
        self._own = [self._work.own() for _ in range(threads)]
        self._prefill = Prefill(weights, self._team)

    def new_cache(self, blocks: int) -> CpuCache:
        """See :meth:`octavo.engines.torch.batch.Model.new_cache`."""
        shape = self._weights.shape
        sizes = (shape.layers, blocks, shape.kv_heads, BLOCK, shape.head_dim)
        # Zeros, so that memory is taken as it is used.
        return CpuCache(np.zeros(sizes, self._cache_dtype), np.zeros(sizes, self._cache_dtype))

    def forward(self, batch: Batch, cache: CpuCache) -> Tensor:
        """See :meth:`octavo.engines.torch.batch.Model.forward`."""
        tokens = _Tokens(*(one.numpy() for one in batch[:4]))
        count = len(tokens.tokens)
        longest = int(tokens.positions.max()) + 1
        self._make_room(longest)
        if count > FEW:
            hidden = self._prefill.forward(tokens, cache, self._work)
        else:
            team, weights, works = self._team, self._weights, self._works(count)
            team.run(
                lambda thread: step.step(
                    thread, team.size, team.barrier, weights, works[thread], tokens, cache
                )
            )
            hidden = self._work.hidden
        wanted = hidden[batch.wanted.numpy()]
        for row in wanted:
            step.normalize(
                row, self._weights.final_norm[0], np.float32(self._weights.shape.eps), row
            )
        return torch.from_numpy(wanted).view(torch.bfloat16)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`octavo.engines.torch.batch.Model.logits`."""
        if len(hidden) > FEW:
            return self._prefill.logits(hidden)
        logits = torch.empty(len(hidden), self.vocab_size, dtype=torch.bfloat16)
        rows, out = hidden.view(torch.uint16).numpy(), logits.view(torch.uint16).numpy()
        team, weights, works = self._team, self._weights, self._works(len(hidden))
        team.run(
            lambda thread: step.head(
                thread, team.size, team.barrier, weights, works[thread], rows, out
            )
        )
        return logits

    def close(self) -> None:
        """End its threads."""
        self._team.close()

    def _make_room(self, longest: int) -> None:
        threads, group, room = self._work.scores.shape
        # Whole strips are computed.
        if longest + BLOCK > room:
            scores = np.zeros((threads, group, 2 * longest + BLOCK), np.float32)
            self._work = self._work._replace(scores=scores)
            self._own = [own._replace(scores=scores) for own in self._own]

    def _works(self, tokens: int) -> list[Work]:
        """The memory that each thread works in."""
        return self._own if tokens == 1 else [self._work] * self._team.size


def open_decoder(directory: Path, threads: int | None = None) -> CpuDecoder:
    """Read a checkpoint for the CPU.

    Args:
        directory: BF16 or FP8, in any dialect.
        threads: that compute; one to a core by default.

    Raises:
        OctavoError: not a model the embedded engine computes.
    """
    checkpoint = Checkpoint(directory)
    try:
        weights = load_weights(Edition(checkpoint))
    finally:
        checkpoint.close()
    return CpuDecoder(weights, threads or torch.get_num_threads())
