"""Keys and values of all layers, in blocks on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.engines.torch.batch import BLOCK
from octavo.engines.torch.weights import Shape

if TYPE_CHECKING:
    from octavo.engines.torch.gpu.steps import Step


class BlockCache:
    """A :class:`octavo.engines.torch.batch.Cache`: E4M3 codes if the checkpoint has scales for them, else BF16.

    Attributes:
        keys: ``[layers, blocks + 1, kv_heads, BLOCK, head_dim]``; rows that only fill a batch write to the last block.
        values: likewise.
        steps: CUDA graphs that read and write it, by their size.
    """

    def __init__(self, shape: Shape, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes = (shape.layers, blocks + 1, shape.kv_heads, BLOCK, shape.head_dim)
        # Zeros: what was never written may be read, and weighted with nothing.
        self.keys, self.values = (torch.zeros(sizes, dtype=dtype, device=device) for _ in range(2))
        self.steps: dict[int, Step] = {}

    @property
    def blocks(self) -> int:
        """How many there are for sequences."""
        return self.keys.shape[1] - 1

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return self.keys.nbytes + self.values.nbytes


def cached_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Of a token's keys and values in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


def read(stored: Tensor, tables: Tensor, end: int) -> Tensor:
    """The first tokens of sequences, out of their blocks.

    Args:
        stored: keys or values of a layer, ``[blocks, kv_heads, BLOCK, head_dim]``.
        tables: int64 ``[sequences, most]``.
        end: how many tokens of each.

    Returns:
        BF16 ``[sequences, kv_heads, end, head_dim]``, on the scale of what is stored.
    """
    blocks = tables[:, : -(-end // BLOCK)]
    found = stored.view(_bits(stored))[blocks].transpose(1, 2).flatten(2, 3)[:, :, :end]
    return found.view(stored.dtype).to(torch.bfloat16)


def write(stored: Tensor, blocks: Tensor, places: Tensor, rows: Tensor, scale: float) -> None:
    """Put keys or values of a layer where they belong.

    Args:
        stored: ``[blocks, kv_heads, BLOCK, head_dim]``.
        blocks: int64 ``[tokens]``: the block of each.
        places: int64 ``[tokens]``: its place in the block.
        rows: BF16 ``[tokens, kv_heads, head_dim]``.
        scale: of what is stored.
    """
    if stored.dtype != rows.dtype:
        limit = torch.finfo(stored.dtype).max
        rows = (rows.float() / scale).clamp_(-limit, limit).to(stored.dtype)
    bits = _bits(stored)
    stored.view(bits)[blocks, :, places] = rows.view(bits)


def _bits(stored: Tensor) -> torch.dtype:
    """Indexing takes integers on every device, E4M3 not on all."""
    return torch.uint8 if stored.dtype.itemsize == 1 else torch.int16
