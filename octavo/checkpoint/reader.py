"""A Hugging Face checkpoint directory, opened lazily: nothing is read until asked for.

Tensors are read with ``pread`` into memory the caller owns rather than mapped, so that resident
memory is what is in use and no more.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint.safetensors import Entry, read_header
from octavo.errors import OctavoError, one_line

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# A dialect that keeps a file for each rank of a parallel engine: tensors of ``rank0.safetensors`` go
# by names that begin with ``rank0/``.
RANK_NAME = re.compile(r"(rank\d+)/(.+)")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        OctavoError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise OctavoError(
            f"{path} does not exist. Expected a Hugging Face checkpoint directory "
            "with config.json and *.safetensors."
        ) from None
    except OSError as error:
        raise OctavoError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise OctavoError(
            f"{path} is not JSON: {one_line(error)}. Restore the file from the original checkpoint."
        ) from error
    if not isinstance(value, dict):
        raise OctavoError(
            f"{path} holds a JSON {type(value).__name__}, expected an object. "
            "Restore the file from the original checkpoint."
        )
    return value


class Checkpoint:
    """Read access to one checkpoint directory.

    Attributes:
        directory: where it is.
        config: the parsed ``config.json``.
        files: shard paths, in the order of their names.
    """

    def __init__(self, directory: Path) -> None:
        """Open ``directory`` and check every shard's header.

        Raises:
            OctavoError: not a checkpoint directory, a shard is missing, malformed or truncated,
                or the index and the shards disagree.
        """
        if not directory.is_dir():
            raise OctavoError(
                f"{directory} is not a directory. Expected a Hugging Face checkpoint directory "
                "with config.json and *.safetensors."
            )
        self.directory = directory
        self.config = read_json(directory / "config.json")
        self.files = self._shards()
        self._places: dict[str, tuple[Path, Entry]] = {}
        for path in self.files:
            prefix = f"{path.stem}/" if RANK_NAME.fullmatch(f"{path.stem}/x") else ""
            for name, entry in read_header(path).items():
                name = prefix + name
                if name in self._places:
                    raise OctavoError(
                        f"tensor {name!r} is in both {self._places[name][0]} and {path}; "
                        "expected each tensor once. Remove the stale shard."
                    )
                self._places[name] = (path, entry)
        self._check_index()
        self._descriptors: dict[Path, int] = {}
        # Tensors may be read from several threads.
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Entry:
        return self._places[name][1]

    def file_of(self, name: str) -> Path:
        """The shard that holds tensor ``name``."""
        return self._places[name][0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for _, entry in self._places.values())

    def read_bytes(self, name: str, offset: int, target: Tensor) -> None:
        """Fill ``target`` with the bytes of tensor ``name`` from ``offset`` on.

        Args:
            name: a tensor of the checkpoint.
            offset: bytes from the tensor's start.
            target: uint8, one-dimensional, on the CPU, no longer than what is left.

        Raises:
            OctavoError: the file ends early (it changed since it was opened).
        """
        path, entry = self._places[name]
        view = target.numpy().data
        position = entry.start + offset
        while view:
            count = os.preadv(self._descriptor(path), [view], position)
            if count == 0:
                raise OctavoError(
                    f"{path} became shorter while tensor {name!r} was read. "
                    "Leave the checkpoint alone until the run ends, then start again."
                )
            view, position = view[count:], position + count

    def read(self, name: str, buffer: Tensor | None = None) -> Tensor:
        """Tensor ``name``, as stored.

        Args:
            name: a tensor of the checkpoint.
            buffer: uint8 memory of the tensor's size to read into; allocated if absent.
        """
        entry = self[name]
        if buffer is None:
            buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self.read_bytes(name, 0, buffer)
        return buffer.view(entry.dtype).view(entry.shape)

    def read_rows(self, name: str, rows: Iterable[int]) -> Tensor:
        """Some rows of a matrix, shape ``[len(rows), columns]``, without reading the others."""
        entry = self[name]
        indices = list(rows)
        width = entry.nbytes // max(entry.shape[0], 1)
        buffer = torch.empty(len(indices), width, dtype=torch.uint8)
        for target, row in zip(buffer, indices, strict=True):
            self.read_bytes(name, row * width, target)
        return buffer.view(entry.dtype)

    def close(self) -> None:
        """Close the shards."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]

    def _shards(self) -> list[Path]:
        index_path = self.directory / INDEX_NAME
        if not index_path.exists():
            single = self.directory / SINGLE_NAME
            ranks = self._ranks()
            if single.is_file() and ranks:
                raise OctavoError(
                    f"{self.directory} has both {SINGLE_NAME} and {ranks[0].name}: two checkpoints in "
                    "one directory. Move one of them to a directory of its own."
                )
            if not single.is_file() and not ranks:
                raise OctavoError(
                    f"{self.directory} has neither {SINGLE_NAME} nor {INDEX_NAME}. "
                    "Octavo reads safetensors only; convert other weight files with "
                    "`save_pretrained(..., safe_serialization=True)` first."
                )
            return ranks or [single]
        shards = []
        for name in sorted(set(self._weight_map(index_path).values())):
            # A shard is a plain file name: an index must not lead outside its folder.
            if name != os.path.basename(name) or name in {"", ".", ".."}:
                raise OctavoError(
                    f"{index_path} names the shard {name!r}; expected a plain file name "
                    "in the same directory."
                )
            path = self.directory / name
            if not path.is_file():
                raise OctavoError(
                    f"{path} is missing, though {index_path.name} lists it. "
                    "Copy or download the missing shard."
                )
            shards.append(path)
        return shards

    def _ranks(self) -> list[Path]:
        """``rank0.safetensors`` and those after it, none left out."""
        found = {path.stem: path for path in self.directory.glob("rank*.safetensors")}
        ranks = [f"rank{number}" for number in range(len(found))]
        for rank in ranks:
            if rank not in found:
                raise OctavoError(
                    f"{self.directory / rank}.safetensors is missing, though there are {len(found)} files "
                    f"rank*.safetensors; expected {ranks[0]} to {ranks[-1]}. Copy the missing file."
                )
        return [found[rank] for rank in ranks]

    def _weight_map(self, index_path: Path) -> dict[str, str]:
        weight_map = read_json(index_path).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(name, str) for name in weight_map.values())
        ):
            raise OctavoError(
                f"{index_path} has no usable weight_map; expected an object that maps tensor names "
                "to shard names. Restore the file from the original checkpoint."
            )
        return weight_map

    def _check_index(self) -> None:
        index_path = self.directory / INDEX_NAME
        if not index_path.exists():
            return
        weight_map = self._weight_map(index_path)
        for name, shard in weight_map.items():
            if name not in self._places or self.file_of(name).name != shard:
                raise OctavoError(
                    f"{index_path} says tensor {name!r} is in {shard}, but that shard does not hold it. "
                    "Restore the index or the shard from the original checkpoint."
                )
