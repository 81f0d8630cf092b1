"""Second moments of a linear layer's inputs: the sum of ``xᵀ x`` over all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from octavo.fp8 import Map

# Rows and columns of a part of the matrix that is summed by one thread: a third, but in steps and not too large.
_STEP, _LARGEST = 64, 2048


class SecondMoments:
    """Summed in float32, in the order of the batches, however many threads there are.

    Attributes:
        total: float32 ``[width, width]``; tiles above the diagonal are filled by :meth:`result`.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.total = torch.zeros(width, width, device=device)

    def add(self, batches: Sequence[Tensor], over: Map) -> None:
        """Add the inputs of some batches.

        Args:
            batches: ``[..., width]`` each, any floating dtype.
            over: applied to tiles of the sum.
        """
        width = len(self.total)
        rows = [batch.reshape(-1, width).float() for batch in batches]

        def tile(place: tuple[slice, slice]) -> None:
            top, left = place
            for x in rows:
                self.total[top, left].addmm_(x[:, top].t(), x[:, left])

        with exact_products(batches[0].dtype):
            list(over(tile, _tiles(width)))

    def result(self) -> Tensor:
        """The whole matrix."""
        for top, left in _tiles(len(self.total)):
            # A tile on the diagonal is whole.
            if top != left:
                self.total[left, top] = self.total[top, left].t()
        return self.total


def _tiles(width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the tiles on the diagonal and below."""
    size = min(-(-width // (3 * _STEP)) * _STEP, _LARGEST)
    parts = [slice(start, min(start + size, width)) for start in range(0, width, size)]
    for number, top in enumerate(parts):
        for left in parts[: number + 1]:
            yield top, left


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Have float32 products of what are BF16 numbers computed by BF16 instructions: exactly, and much faster."""
    # PyTorch's types lack it.
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
