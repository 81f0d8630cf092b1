"""The hidden states of the model and of its variants, on their way through the decoder together.

They lie in one file, a slot to a variant: memory holds only what is computed, and while there is memory to
spare, the system's page cache makes the file as good as memory.

All computes in float32. What one unit does to the predictions is less than what BF16 does to them: a variant whose
hidden states are rounded to BF16 on the way is as far from the model as those roundings alone make it, ten times as far
as the unit does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from octavo.calibration import BATCH_TOKENS, HiddenShape, HiddenStates, batch_sizes
from octavo.decoder import Decoder

# The slots of the model as it is, and with everything quantized; those of its variants follow.
ORIGINAL, EVERYTHING, FIRST = 0, 1, 2


def variants_shape(decoder: Decoder, slots: int, windows: int, seq_len: int) -> HiddenShape:
    """How the windows go through the model, ``slots`` times, in float32."""
    sizes = batch_sizes(windows, seq_len, BATCH_TOKENS[decoder.device.type])
    return HiddenShape(sizes * slots, seq_len, decoder.config.hidden_size, torch.float32)


class Variants:
    """A context manager: it holds the file, and threads.

    Attributes:
        slots: how many.
        batches: in each slot.
        seq_len: tokens in a window.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: HiddenShape,
        slots: int,
        directory: Path,
        target: Path,
        *,
        workers: int,
        before_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            decoder: whose layers will be run; it computes in float32.
            shape: of :func:`variants_shape`.
            slots: how many.
            directory: where the file is made.
            target: the output it is for, named in errors.
            workers: batches at a time.
            before_batch: called before each.

        Raises:
            WriteError: the disk has no space for all slots.
        """
        self._decoder, self.slots, self.batches = decoder, slots, len(shape.batches) // slots
        self.seq_len, self._before_batch = shape.seq_len, before_batch
        self._kwargs: list[dict[str, Any]] = decoder.call_arguments(shape.seq_len)
        self._states = HiddenStates(directory / "variants", shape, target)
        self._pool = ThreadPoolExecutor(workers, "octavo-variant")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._states.close()

    def embed(self, tokens: Tensor) -> None:
        """Fill the first two slots.

        Args:
            tokens: int64 ``[windows, seq_len]``.

        Raises:
            OctavoError: the embedding holds NaN or infinity.
        """
        batches = torch.split(tokens, list(self._states.shape.batches[: self.batches]))
        for index, hidden in enumerate(self._decoder.embed(batches)):
            for slot in (ORIGINAL, EVERYTHING):
                self._states.write(slot * self.batches + index, hidden.cpu())

    def read(self, slot: int, batch: int) -> Tensor:
        """Hidden states ``[windows of the batch, seq_len, hidden_size]``, on the decoder's device."""
        states = self._states.read(slot * self.batches + batch)
        return states.to(self._decoder.device, non_blocking=True)

    def run(
        self, layer: int, moves: Sequence[tuple[int, int]], on_pass: Callable[[], None]
    ) -> None:
        """Run slots through a decoder layer as it is loaded.

        Args:
            layer: its number.
            moves: from which slot to which.
            on_pass: called after each.
        """
        module, arguments = self._decoder.layers[layer], self._kwargs[layer]
        self.apply(lambda hidden: module(hidden, **arguments), moves, on_pass)

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        moves: Sequence[tuple[int, int]],
        on_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """As :meth:`run`, with ``function`` of the hidden states of a batch."""

        @torch.inference_mode()
        def step(source: int, target: int, batch: int) -> None:
            self._before_batch()
            hidden = function(self.read(source, batch))
            self._states.write(target * self.batches + batch, hidden.cpu())

        every = [(*move, batch) for move in moves for batch in range(self.batches)]
        for done, _ in enumerate(self._pool.map(step, *zip(*every, strict=True)), start=1):
            if done % self.batches == 0:
                on_pass()
