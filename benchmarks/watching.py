"""What a process takes while it runs: time, memory and disk, its children included."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_INTERVAL = 0.1


class Usage(NamedTuple):
    """What a finished process took.

    Attributes:
        code: its exit code.
        seconds: wall-clock time from start to exit.
        cpu_seconds: of all cores, in programs and the system.
        peak_memory: resident bytes, of all its processes together.
        peak_anonymous: of those, at most so many that are not pages of files, which the system could drop.
        peak_disk: bytes in its directory.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak_memory: int
    peak_anonymous: int
    peak_disk: int


def watch(
    command: Sequence[str | Path], directory: Path, log: Path, variables: Mapping[str, str]
) -> Usage:
    """Run a process to its end.

    Args:
        command: what to run.
        directory: where it writes whatever it writes.
        log: takes its output.
        variables: its environment.
    """
    memory = anonymous = disk = 0
    begin, cpu_before = time.perf_counter(), _children_cpu()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env=variables
        )
        try:
            while not _ended(process):
                resident, without_files = _memory(process.pid)
                memory, anonymous = max(memory, resident), max(anonymous, without_files)
                disk = max(disk, bytes_in(directory))
        except BaseException:  # interrupted: nothing is left running
            process.kill()
            raise
    seconds = time.perf_counter() - begin
    disk = max(disk, bytes_in(directory))
    cpu = _children_cpu() - cpu_before
    return Usage(process.returncode, seconds, cpu, memory, anonymous, disk)


def bytes_in(directory: Path) -> int:
    """Bytes that a directory's files have on the disk; links count nothing."""
    total = 0
    # Files come and go meanwhile.
    for path in directory.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


def _children_cpu() -> float:
    """Seconds that all children that have ended took of cores."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process ends within the interval."""
    try:
        process.wait(_INTERVAL)
    except subprocess.TimeoutExpired:
        return False
    return True


def _memory(process: int) -> tuple[int, int]:
    """Resident bytes of a process and its descendants, and those of them that are not files' pages.

    A single process's own high-water mark is exact. It is not what ``wait4`` reports, which begins with
    that of the process it was started from.
    """
    found = [fields for pid in _tree(process) if (fields := _status(pid))]
    if len(found) == 1:
        return found[0]["VmHWM"], found[0]["RssAnon"]
    return sum(one["VmRSS"] for one in found), sum(one["RssAnon"] for one in found)


def _tree(process: int) -> Iterator[int]:
    yield process
    with suppress(OSError):
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            for child in path.read_text().split():
                yield from _tree(int(child))


def _status(process: int) -> dict[str, int]:
    """The memory fields of a process's status in bytes; empty when it has ended."""
    fields = {}
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.endswith(" kB"):
                name, value, _ = line.split()
                fields[name.rstrip(":")] = int(value) * 1024
    return fields if "VmHWM" in fields else {}
