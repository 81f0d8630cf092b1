"""The files of a checkpoint, written in any order.

All names, dtypes and shapes are known before the first byte is written, so the shards are laid
out first, their space is reserved, and every tensor is then written to its own place.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import xxhash
from torch import Tensor

from octavo.checkpoint.disk import explained, sync, write_at, write_file
from octavo.checkpoint.reader import INDEX_NAME, RANK_NAME, SINGLE_NAME
from octavo.checkpoint.safetensors import Entry, build_header

Layout = Mapping[str, Tensor]
"""What will be written: for each name a tensor on the meta device, in the model's order."""

_PIECE = 4 << 20

# Written at most before it is brought to the disk: the system is slow with more.
_SYNC = 512 << 20


def split_into_shards(layout: Layout, shard_size: int) -> list[list[str]]:
    """Consecutive names, as many to a shard as fit into ``shard_size`` bytes (at least one)."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in layout.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


def name_in_file(name: str) -> str:
    """The name a tensor has inside its file: a rank's prefix is the file's name."""
    ranked = RANK_NAME.fullmatch(name)
    return ranked[2] if ranked else name


def name_shards(layout: Layout, shard_size: int) -> dict[str, list[str]]:
    """The names that go to each file: one for each rank, or as many as ``shard_size`` makes."""
    ranks: dict[str, list[str]] = {}
    for name in layout:
        if ranked := RANK_NAME.fullmatch(name):
            ranks.setdefault(f"{ranked[1]}.safetensors", []).append(name)
    if ranks:
        return ranks
    shards = split_into_shards(layout, shard_size)
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


class _Shard(NamedTuple):
    """A file: its size, its header, and where its tensors go, by their names in the layout."""

    size: int
    header: bytes
    entries: dict[str, Entry]


class Place(NamedTuple):
    """Where a checkpoint is written.

    Attributes:
        target: where it will be in the end, named in errors.
        edition: the directory that gets its files.
        resumed: whether they may be there already.
    """

    target: Path
    edition: Path
    resumed: bool


class CheckpointWriter:
    """Writes the shards, index and small files of one checkpoint; a context manager.

    Attributes:
        nbytes: bytes of all shards.
        digests: the xxh3_128 of each finished tensor's bytes, in hexadecimal, where it was asked for.
    """

    def __init__(
        self, place: Place, layout: Layout, *, shard_size: int, digest: bool = False
    ) -> None:
        """Create the shards and reserve their space, or open those of an interrupted run.

        Args:
            place: where.
            layout: every tensor that will be written.
            shard_size: bytes of tensors in one file, at most (unless one tensor is larger).
            digest: keep digests, for which each tensor must be written from its start to its end.

        Raises:
            WriteError: the space is not there, or nothing can be written here.
        """
        self._place = place
        self._places: dict[str, tuple[int, Entry]] = {}
        self._pending = set(layout)
        self._unsynced = 0
        self.digests: dict[str, str] = {}
        self._hashers: dict[str, Any] | None = {} if digest else None
        # Tensors of several layers may arrive from several threads.
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        plans = _plan_shards(layout, shard_size)
        self.nbytes = sum(size for size, _, _ in plans.values())
        with self._explained():
            try:
                for file, plan in plans.items():
                    self._create_shard(place.edition / file, *plan)
                self._write_index(layout, plans)
                sync(place.edition)
            except BaseException:
                self._close()
                if not place.resumed:
                    # Before the error tells how much is free.
                    for file in plans:
                        (place.edition / file).unlink(missing_ok=True)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor.

        Args:
            name: a name of the layout.
            tensor: of the dtype and shape laid out, on the CPU.
        """
        place = self._places[name][1]
        if tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, laid out as {place}"
            )
        self.write_bytes(name, 0, tensor.contiguous().reshape(-1).view(torch.uint8))
        self.finish(name)

    def write_bytes(self, name: str, offset: int, data: Tensor) -> None:
        """Write part of a tensor: uint8 ``data``, ``offset`` bytes from the tensor's start."""
        descriptor, place = self._places[name]
        position = place.start + offset
        if position + len(data) > place.end:
            raise ValueError(f"{name}: write beyond the tensor's {place.nbytes} bytes")
        with self._explained():
            write_at(descriptor, data.numpy().data, position)
        with self._lock:
            self._unsynced += len(data)
            due = self._unsynced >= _SYNC
        if due:
            self.sync()
        if self._hashers is not None:
            self._hashers.setdefault(name, xxhash.xxh3_128()).update(data.numpy().data)

    def finish(self, name: str) -> None:
        """Declare that every byte of tensor ``name`` has been written."""
        with self._lock:
            self._pending.discard(name)
            if self._hashers is not None:
                self.digests[name] = self._hashers.pop(name, xxhash.xxh3_128()).hexdigest()

    def accept(self, names: Iterable[str]) -> None:
        """Declare tensors finished that another process has written to the same files."""
        with self._lock:
            self._pending.difference_update(names)

    def read_bytes(self, name: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes of tensor ``name`` from byte ``offset`` on, as they are on disk."""
        descriptor, place = self._places[name]
        return os.pread(descriptor, max(min(size, place.nbytes - offset), 0), place.start + offset)

    def holds(self, name: str, digest: str) -> bool:
        """Whether tensor ``name`` is on disk with this digest; if so, it is finished."""
        hasher, offset = xxhash.xxh3_128(), 0
        while piece := self.read_bytes(name, offset, _PIECE):
            hasher.update(piece)
            offset += len(piece)
        if hasher.hexdigest() != digest:
            return False
        with self._lock:
            self._pending.discard(name)
        return True

    def sync(self) -> None:
        """Bring what has been written so far to the disk."""
        self._unsynced = 0
        with self._explained():
            for descriptor in self._descriptors:
                os.fdatasync(descriptor)
                # Nobody reads it again soon, and a cache that grows costs more than the writing.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON file beside the shards."""
        content = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        with self._explained():
            write_file(self._place.edition / name, content.encode())

    def copy(self, source: Path) -> None:
        """Copy a small file, keeping its name."""
        with self._explained():
            shutil.copyfile(source, self._place.edition / source.name)

    def seal(self) -> None:
        """Bring all files to the disk.

        Raises:
            RuntimeError: a tensor was never written.
        """
        if self._pending:
            raise RuntimeError(f"tensors never written: {sorted(self._pending)[:3]} …")
        self._close()
        with self._explained():
            for path in self._place.edition.iterdir():
                sync(path)

    def _create_shard(
        self, path: Path, size: int, header: bytes, entries: Mapping[str, Entry]
    ) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        # Reserving the space now turns a disk that is too small into an error at the start.
        os.posix_fallocate(descriptor, 0, size)
        os.ftruncate(descriptor, size)
        write_at(descriptor, memoryview(header), 0)
        self._places |= {name: (descriptor, entry) for name, entry in entries.items()}

    def _write_index(self, layout: Layout, plans: Mapping[str, _Shard]) -> None:
        if len(plans) == 1 or any(name_in_file(name) != name for name in layout):
            return
        files = {name: file for file, shard in plans.items() for name in shard.entries}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in layout.values())},
            "weight_map": {name: files[name] for name in layout},
        }
        self.write_json(INDEX_NAME, index)

    def _close(self) -> None:
        while self._descriptors:
            with suppress(OSError):  # what matters has been synced, and fails there
                os.close(self._descriptors.pop())

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self._place.target, self.nbytes)


def _plan_shards(layout: Layout, shard_size: int) -> dict[str, _Shard]:
    """What goes to each file."""
    plans: dict[str, _Shard] = {}
    for file, names in name_shards(layout, shard_size).items():
        # Wide dtypes first, so that every tensor is aligned to its element size.
        ordered = sorted(names, key=lambda name: -layout[name].itemsize)
        header, entries = build_header(
            (name_in_file(name), layout[name].dtype, tuple(layout[name].shape)) for name in ordered
        )
        places = dict(zip(ordered, entries.values(), strict=True))
        size = max((entry.end for entry in places.values()), default=len(header))
        plans[file] = _Shard(size, header, places)
    return plans
