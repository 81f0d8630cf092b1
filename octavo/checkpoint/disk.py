"""Writing that either reaches the disk or says why not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.errors import WriteError


@contextmanager
def explained(target: Path, nbytes: int) -> Iterator[None]:
    """Turn the operating system's refusals into errors a user can act on.

    Args:
        target: the directory that is being made.
        nbytes: what it needs on disk; 0 if that is not what matters.

    Raises:
        WriteError: in the place of OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = next(path for path in target.absolute().parents if path.exists())
            needed = f"{nbytes:,}" if nbytes else "more"
            raise WriteError(
                f"The disk that holds {where} is full: {target} needs {needed} bytes, "
                f"{shutil.disk_usage(where).free:,} are free now. Free some space, or choose an output on "
                "another disk."
            ) from error
        raise WriteError(
            f"Cannot write {target}: {error.strerror or error} "
            f"({error.filename or target.parent}). Choose an output directory that can be written."
        ) from error


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of ``data`` to an open file from byte ``position`` on."""
    while data:
        count = os.pwritev(descriptor, [data], position)
        data, position = data[count:], position + count


def write_file(path: Path, content: bytes) -> None:
    """Make ``path`` a file of this content."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_at(descriptor, memoryview(content), 0)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file, or the list of a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
