"""A tensor of an edition read some rows at a time, so that memory does not grow with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.edition import Edition
from octavo.formats.dialect import Piece
from octavo.scheme import BLOCK

# Elements of a strip, unless 128 rows are more: tensors of one shape come in the same strips.
_STRIP_ELEMENTS = 1 << 20


def strips(edition: Edition, name: str) -> Iterator[tuple[int, Tensor]]:
    """The tensor with the canonical name ``name``, as stored, strip by strip.

    Yields:
        The strip's first row, a multiple of 128 (so that a strip never cuts a block's rows), and its
        rows. A tensor without rows or elements comes whole.
    """
    info = edition[name]
    if not info.shape:
        yield 0, edition.checkpoint.read(edition.stored(name).pieces[0].name)
        return
    if not math.prod(info.shape):
        yield 0, torch.empty(info.shape, dtype=info.dtype)
        return
    step = _rows(info.shape)
    for first in range(0, info.shape[0], step):
        yield first, _read_rows(edition, name, first, min(first + step, info.shape[0]))


def strips_of(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The same strips of a tensor in memory that has rows and elements."""
    step = _rows(tuple(tensor.shape))
    for first in range(0, len(tensor), step):
        yield first, tensor[first : first + step]


def _rows(shape: tuple[int, ...]) -> int:
    return max(_STRIP_ELEMENTS // math.prod(shape[1:]) // BLOCK, 1) * BLOCK


def _read_rows(edition: Edition, name: str, first: int, last: int) -> Tensor:
    """Rows ``[first, last)`` of a tensor, put together from the pieces it is stored in."""
    stored = edition.stored(name)
    if stored.axis:
        parts = [_read_piece(edition, piece, first, last) for piece in stored.pieces]
        return torch.cat(parts, dim=stored.axis)
    parts, begin = [], 0
    for piece in stored.pieces:
        end = begin + _height(edition, piece)
        if begin < last and first < end:
            parts.append(
                _read_piece(edition, piece, max(first, begin) - begin, min(last, end) - begin)
            )
        begin = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _height(edition: Edition, piece: Piece) -> int:
    begin, end = piece.rows or (0, edition.checkpoint[piece.name].shape[0])
    return end - begin


def _read_piece(edition: Edition, piece: Piece, first: int, last: int) -> Tensor:
    """Rows ``[first, last)`` of a piece."""
    entry = edition.checkpoint[piece.name]
    width = entry.nbytes // max(entry.shape[0], 1)
    begin = piece.rows[0] if piece.rows else 0
    buffer = torch.empty((last - first) * width, dtype=torch.uint8)
    edition.checkpoint.read_bytes(piece.name, (begin + first) * width, buffer)
    return buffer.view(entry.dtype).view(last - first, *entry.shape[1:])
