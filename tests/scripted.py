"""A model that says what it is told to, as slowly as it is told to: for what a real one does too seldom."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

import tiny
from octavo.engines.torch.batch import BLOCK, Batch


class ScriptedCache:
    """Holds nothing."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.nbytes = blocks, 0


class ScriptedModel:
    """In the place of :class:`octavo.engines.torch.batch.Model`.

    What it likes best at place ``p`` of any sequence is the script's token ``p``, over and over again.

    Attributes:
        go: it computes while this is set.
        error: raised by the next step, if set.
    """

    vocab_size = tiny.VOCAB_SIZE

    def __init__(
        self, script: list[int], *, seconds: float = 0.0, max_positions: int = 512
    ) -> None:
        """
        Args:
            script: token ids.
            seconds: of a step.
            max_positions: tokens of a sequence.
        """
        self.max_positions = max_positions
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None
        self._script, self._seconds = torch.tensor(script), seconds

    def new_cache(self, blocks: int) -> ScriptedCache:
        assert blocks * BLOCK > 0
        return ScriptedCache(blocks)

    def forward(self, batch: Batch, cache: object) -> Tensor:
        self.go.wait()
        time.sleep(self._seconds)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return batch.positions[batch.wanted].float().unsqueeze(1)

    def logits(self, hidden: Tensor) -> Tensor:
        following = self._script[(hidden[:, 0].long() + 1) % len(self._script)]
        logits = torch.zeros(len(hidden), self.vocab_size)
        return logits.scatter(1, following.unsqueeze(1), 20.0)

    def close(self) -> None:
        self.go.set()
