"""A checkpoint directory that exists whole or not at all.

All names, dtypes and shapes are known before the first byte is written, so the shards are laid
out first, their space is reserved, and every tensor is then written to its own place, in any order.
Everything goes into a directory beside the target, which is synced and renamed at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from octavo.checkpoint.reader import INDEX_NAME, RANK_NAME, SINGLE_NAME
from octavo.checkpoint.safetensors import Entry, build_header
from octavo.errors import OctavoError

Layout = Mapping[str, Tensor]
"""What will be written: for each name a tensor on the meta device, in the model's order."""


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


class CheckpointWriter:
    """Writes the shards, index and small files of one checkpoint; a context manager.

    Leaving the context without :meth:`commit` removes everything.
    """

    def __init__(
        self,
        target: Path,
        layout: Layout,
        *,
        shard_size: int,
        overwrite: bool = False,
    ) -> None:
        """
        Args:
            target: the directory to create.
            layout: every tensor that will be written.
            shard_size: bytes of tensors in one file, at most (unless one tensor is larger).
            overwrite: replace ``target`` if it exists.

        Raises:
            OctavoError: ``target`` exists, or cannot be created.
        """
        self._overwrite = overwrite
        self.target = target
        self._refuse_existing()
        self.partial = target.parent / f".{target.name}.partial-{os.getpid()}"
        self.nbytes = 0
        self._places: dict[str, tuple[int, Entry]] = {}
        self._pending = set(layout)
        # Tensors of several layers may arrive from several threads.
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._new_parents = [path for path in target.parents if not path.exists()]
        with self._explained():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.partial.mkdir()
        try:
            with self._explained():
                self._create_shards(layout, shard_size)
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abandon()

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
        view = data.numpy().data
        position = place.start + offset
        if position + len(view) > place.end:
            raise ValueError(f"{name}: write beyond the tensor's {place.nbytes} bytes")
        with self._explained():
            while view:
                count = os.pwritev(descriptor, [view], position)
                view, position = view[count:], position + count

    def finish(self, name: str) -> None:
        """Declare that every byte of tensor ``name`` has been written."""
        with self._lock:
            self._pending.remove(name)

    def sync(self) -> None:
        """Bring what has been written so far to the disk."""
        with self._explained():
            for descriptor in self._descriptors:
                os.fdatasync(descriptor)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON file beside the shards."""
        with self._explained():
            (self.partial / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, source: Path) -> None:
        """Copy a small file, keeping its name."""
        with self._explained():
            shutil.copyfile(source, self.partial / source.name)

    def commit(self) -> None:
        """Sync everything to disk and move it into the target's place."""
        if self._pending:
            raise RuntimeError(f"tensors never written: {sorted(self._pending)[:3]} …")
        with self._explained():
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            self._close()
            for path in self.partial.iterdir():
                _sync(path)
            _sync(self.partial)
            self._swap()
            _sync(self.target.parent)

    def abandon(self) -> None:
        """Remove what has not been committed."""
        self._close()
        shutil.rmtree(self.partial, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty ends it
            for path in self._new_parents:
                path.rmdir()

    def _swap(self) -> None:
        """Rename into place; what was there before is removed only after that succeeded."""
        self._refuse_existing()
        old = self.target.parent / f".{self.target.name}.old-{os.getpid()}"
        with suppress(FileNotFoundError):
            self.target.rename(old)
        try:
            self.partial.rename(self.target)
        except BaseException:
            with suppress(FileNotFoundError):
                old.rename(self.target)
            raise
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            # A link is replaced, what it leads to stays.
            old.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target) and not self._overwrite:
            raise OctavoError(
                f"{self.target} already exists. Choose another output directory, "
                "or pass --overwrite to replace it."
            )

    def _create_shards(self, layout: Layout, shard_size: int) -> None:
        files = name_shards(layout, shard_size)
        plans: list[tuple[Path, bytes, dict[str, Entry]]] = []
        for file, names in files.items():
            # Wide dtypes first, so that every tensor is aligned to its element size.
            ordered = sorted(names, key=lambda name: -layout[name].itemsize)
            header, entries = build_header(
                (name_in_file(name), layout[name].dtype, tuple(layout[name].shape))
                for name in ordered
            )
            places = dict(zip(ordered, entries.values(), strict=True))
            plans.append((self.partial / file, header, places))
        self.nbytes = sum(
            max((entry.end for entry in entries.values()), default=len(header))
            for _, header, entries in plans
        )
        for path, header, entries in plans:
            self._create_shard(path, header, entries)
        weight_map = {name: file for file, names in files.items() for name in names}
        if len(files) > 1 and all(name_in_file(name) == name for name in layout):
            total = sum(tensor.nbytes for tensor in layout.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: weight_map[name] for name in layout},
            }
            self.write_json(INDEX_NAME, index)

    def _create_shard(self, path: Path, header: bytes, entries: Mapping[str, Entry]) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        size = max((entry.end for entry in entries.values()), default=len(header))
        # Reserving the space now turns a disk that is too small into an error at the start.
        os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, header, 0)
        self._places |= {name: (descriptor, entry) for name, entry in entries.items()}

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the operating system's refusals into errors a user can act on."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.abandon()
                where = next(path for path in self.target.absolute().parents if path.exists())
                raise OctavoError(
                    f"The disk that holds {where} is full: {self.target} needs {self.nbytes:,} bytes, "
                    f"{shutil.disk_usage(where).free:,} are free now. The partial output has been "
                    "removed. Free some space, or choose an output on another disk."
                ) from error
            raise OctavoError(
                f"Cannot write {self.target}: {error.strerror or error} "
                f"({error.filename or self.target.parent}). Choose an output directory that can be written."
            ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
