"""A rotation of a model's hidden states: orthogonal within blocks of channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Channels that are rotated among each other, at most: all of a small model's. What a rotation wins falls slowly with
# fewer (SmolLM2, of 576: noise 0.78, with 192 0.84, with 96 0.86), what it takes to find falls with their square.
_WIDEST = 576


def blocks_of(width: int) -> int:
    """Channels in each block: the most that divide ``width``."""
    return next(size for size in range(min(width, _WIDEST), 0, -1) if width % size == 0)


def inverses(matrices: Tensor) -> Tensor:
    """Of each of ``[count, size, size]``."""
    # One at a time: of several, PyTorch gives threads one each, and MKL then finds wrong pivots (PyTorch issues 141358, 142815).
    return torch.stack([torch.linalg.inv(one) for one in matrices])


class Rotation(NamedTuple):
    """An orthogonal matrix Q.

    Attributes:
        order: the channels, those of a block side by side, int64 ``[width]``.
        blocks: what is done to the channels of each block, orthogonal, float32 ``[blocks, size, size]``.
    """

    order: Tensor
    blocks: Tensor

    def of_rows(self, rows: Tensor) -> Tensor:
        """``rows Qᵀ``: rows are hidden states, or those of a weight that reads them, ``[rows, width]``; float32."""
        count, size, _ = self.blocks.shape
        parts = rows.float()[:, self.order].view(-1, count, size).transpose(0, 1)
        turned = torch.bmm(parts, self.blocks.mT).transpose(0, 1).reshape(len(rows), -1)
        result = torch.empty_like(turned)
        result[:, self.order] = turned
        return result

    def of_columns(self, weight: Tensor) -> Tensor:
        """``Q weight``, of a weight that writes hidden states, ``[width, in]``, or its bias ``[width]``; in its dtype."""
        result = torch.empty_like(weight)
        for channels, block in zip(self.order.view(len(self.blocks), -1), self.blocks, strict=True):
            # One block at a time: in float32 a whole weight may be gigabytes.
            result[channels] = (block @ weight[channels].float()).to(weight.dtype)
        return result
