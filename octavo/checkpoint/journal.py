"""What a run has finished, line by line: enough to go on from after any interruption.

A line is ``CHECKSUM JSON`` (xxh3_64 of the JSON, in hexadecimal), appended whole and synced before the run
goes on. Reading stops at the first line that is torn or altered, and cuts the file there.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from octavo.checkpoint.disk import explained, sync, write_at


class Journal:
    """An append-only file of records; a context manager.

    Attributes:
        records: all of them, in order.
    """

    def __init__(self, path: Path, target: Path) -> None:
        """Open or begin the journal at ``path`` of the output ``target``.

        Raises:
            WriteError: it cannot be read or written.
        """
        self._target = target
        self._lock = threading.Lock()
        self.records: list[dict[str, Any]] = []
        with explained(target, 0):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._end = 0
            for line in path.read_bytes().splitlines(keepends=True):
                record = _parse(line)
                if record is None:
                    break
                self.records.append(record)
                self._end += len(line)
            os.ftruncate(self._descriptor, self._end)
            sync(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record of JSON values; it is on disk when this returns.

        Raises:
            WriteError: it cannot be written.
        """
        text = json.dumps(record).encode()
        line = b"%s %s\n" % (_checksum(text), text)
        with self._lock, explained(self._target, 0):
            try:
                write_at(self._descriptor, memoryview(line), self._end)
                os.fdatasync(self._descriptor)
            except OSError:
                # The system may show what it could not bring to the disk.
                os.ftruncate(self._descriptor, self._end)
                raise
            self._end += len(line)
            self.records.append(dict(record))


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or checksum != _checksum(text[:-1]):
        return None
    record: dict[str, Any] = json.loads(text)
    return record
