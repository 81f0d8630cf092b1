"""A process that cannot take more memory than it is given: by a control group, or by its address space."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def limited(
    command: Sequence[str | Path], nbytes: int
) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Run a program under a hard limit of ``nbytes`` of memory.

    Returns:
        What enforced it (``memory cgroup``, or ``RLIMIT_DATA`` where none can be made), and how it ended.
    """
    with _group(nbytes) as group:
        enter: Callable[[], object]
        if group is None:
            how = "RLIMIT_DATA"

            def enter() -> None:
                resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
        else:
            how = "memory cgroup"

            def enter() -> None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        ran = subprocess.run(
            [str(part) for part in command],
            preexec_fn=enter,
            capture_output=True,
            text=True,
            check=False,
        )
    return how, ran


@contextmanager
def _group(nbytes: int) -> Iterator[Path | None]:
    """A memory control group of version 1 or 2; None where this process may not make one."""
    first = (_ROOT / "memory").is_dir()
    group = (_ROOT / "memory" if first else _ROOT) / f"octavo-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if first else "memory.max"
        (group / limit).write_text(str(nbytes))
    except OSError:
        if group.exists():
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()
