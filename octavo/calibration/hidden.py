"""Hidden states of the calibration samples on disk, a batch at a time.

They lie in a file rather than in memory: memory does not grow with the number of samples, and an interrupted
run finds them again. While there is memory to spare, the system's page cache makes the file as good as memory.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from octavo.checkpoint.disk import explained, sync, write_at
from octavo.errors import OctavoError


class HiddenShape(NamedTuple):
    """How the hidden states of all samples are cut up.

    Attributes:
        batches: samples in each batch.
        seq_len: tokens in each sample.
        width: elements of a token's hidden state.
        dtype: theirs.
        streams: hidden states of each token, side by side: those of one model, or of several.
    """

    batches: tuple[int, ...]
    seq_len: int
    width: int
    dtype: torch.dtype
    streams: int = 1

    def batch(self, index: int) -> tuple[int, ...]:
        """The shape of one batch: ``[streams, samples, seq_len, width]``."""
        return self.streams, self.batches[index], self.seq_len, self.width

    def batch_bytes(self, index: int) -> int:
        """Bytes of one batch."""
        return math.prod(self.batch(index)) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return sum(self.batch_bytes(index) for index in range(len(self.batches)))


def batch_sizes(samples: int, seq_len: int, tokens: int) -> tuple[int, ...]:
    """Samples in each batch, so that none has many more than ``tokens`` tokens.

    A multiple of four batches of equal size, so that no core of a few waits for a last one. Not of the number
    of cores: results should not depend on that.
    """
    batch = max(1, tokens // seq_len)
    count = min(-(-samples // (4 * batch)) * 4, samples)
    return tuple(len(part) for part in torch.tensor_split(torch.arange(samples), count))


class HiddenStates:
    """One file of hidden states."""

    def __init__(self, path: Path, shape: HiddenShape, target: Path) -> None:
        """Open the file, or create it and reserve its space.

        Args:
            path: the file.
            shape: what it holds.
            target: the output it is for, named in errors.

        Raises:
            WriteError: the space is not there.
        """
        self.shape = shape
        self._path, self._target = path, target
        starts = [0]
        for index in range(len(shape.batches)):
            starts.append(starts[-1] + shape.batch_bytes(index))
        self._starts: Sequence[int] = starts
        self._digests: dict[tuple[int, int], str] = {}
        with explained(target, shape.nbytes):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.posix_fallocate(self._descriptor, 0, max(shape.nbytes, 1))
            sync(path.parent)

    def read(self, index: int, stream: int = 0) -> Tensor:
        """Batch ``index`` of a stream: ``[samples, seq_len, width]``."""
        shape = self.shape.batch(index)[1:]
        return self._read(shape, self._start(index, stream))

    def read_all(self, index: int) -> Tensor:
        """Batch ``index`` of all streams: ``[streams, samples, seq_len, width]``."""
        return self._read(self.shape.batch(index), self._starts[index])

    def write(self, index: int, batch: Tensor, stream: int = 0) -> None:
        """Put batch ``index`` of a stream, on the CPU, in its place."""
        data = _bytes(batch.contiguous())
        self._digests[index, stream] = xxhash.xxh3_64_hexdigest(data)
        with explained(self._target, self.shape.nbytes):
            write_at(self._descriptor, data, self._start(index, stream))

    def write_all(self, index: int, batch: Tensor) -> None:
        """Put batch ``index`` of all streams in its place."""
        for stream, one in enumerate(batch):
            self.write(index, one, stream)

    def sync(self) -> None:
        """Bring what has been written so far to the disk."""
        with explained(self._target, self.shape.nbytes):
            os.fdatasync(self._descriptor)

    def digest(self) -> str:
        """A digest of what was written last to each batch, for :meth:`holds`."""
        parts = [self._digests[place] for place in self._places()]
        return xxhash.xxh3_128_hexdigest("".join(parts).encode())

    def holds(self, digest: str) -> bool:
        """Whether the file holds what :meth:`digest` was taken of."""
        for place in self._places():
            self._digests[place] = xxhash.xxh3_64_hexdigest(_bytes(self.read(*place)))
        return self.digest() == digest

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _places(self) -> list[tuple[int, int]]:
        """Every batch of every stream."""
        shape = self.shape
        return list(itertools.product(range(len(shape.batches)), range(shape.streams)))

    def _start(self, index: int, stream: int) -> int:
        return self._starts[index] + stream * self.shape.batch_bytes(index) // self.shape.streams

    def _read(self, shape: tuple[int, ...], position: int) -> Tensor:
        result = torch.empty(shape, dtype=self.shape.dtype)
        view = _bytes(result)
        while view:
            count = os.preadv(self._descriptor, [view], position)
            if not count:
                raise OctavoError(
                    f"{self._path} became shorter while it was in use. Leave {self._path.parent} alone "
                    "until the run ends, then start again."
                )
            view, position = view[count:], position + count
        return result


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return data
