"""Runs of the ``octavo`` program that are killed, stopped, or refused something at a chosen system call.

A server, this file run as a program, imports everything once; each run is a process forked from it, so that
it begins in a moment. In the run, the calls of :mod:`os` that touch what lies beside the output are counted
and written to a log, and a :class:`Fault` strikes at one of them.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

# Longer than all that can be done meanwhile takes.
LATE_SECONDS = 0.5

# Arguments of those calls that write, for one that writes half.
HALVES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "pwritev": lambda fd, data, position: (fd, [data[0][: len(data[0]) // 2]], position),
    "sendfile": lambda out, source, offset, count: (out, source, offset, 50),
}


class Site(NamedTuple):
    """A kind of call on one file; ``file`` is relative to the directory that holds the output."""

    call: str
    file: str


class Fault(NamedTuple):
    """What happens at a call.

    Attributes:
        site: the call.
        nth: which of those there, from 1.
        effect: ``kill`` before it; ``late``, killed when everything else has gone on as far as it can without
            it; ``tear``, killed after half of a write; ``power``, killed, and what is left of the directory
            without power is copied to ``disk`` in the log's; the name of a signal the process sends itself;
            or that of an error the call ends in.
    """

    site: Site
    nth: int
    effect: str

    def __str__(self) -> str:
        return f"{self.effect} at {self.site.call} {self.site.file} #{self.nth}"


class Ended(NamedTuple):
    """A run that is over.

    Attributes:
        code: exit code, or minus the number of the signal that killed it.
        stderr: what it printed there.
        calls: those that were begun, in order.
        calibrated: passes of calibration that were completed.
        quantized: layers whose quantization was begun.
        struck: whether the fault was met.
    """

    code: int
    stderr: str
    calls: list[Site]
    calibrated: list[int]
    quantized: list[int]
    struck: bool


class Server:
    """Starts runs; a context manager. May be used from several threads."""

    def __init__(self, *warm_up: object) -> None:
        """
        Args:
            warm_up: arguments of a run of the program, after which everything is imported and compiled.
        """
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, warm_up)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()
        self._running: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._running:
            os.kill(process, signal.SIGKILL)
        self._process.communicate()

    def start(
        self, arguments: Sequence[object], log: Path, root: Path, fault: Fault | None = None
    ) -> Run:
        """Begin a run.

        Args:
            arguments: of the program.
            log: directory for its log, which is made.
            root: calls on what lies in this directory are counted.
            fault: what happens to it.
        """
        log.mkdir()
        for file in ("calls", "stderr"):
            # It may be killed before it opens them.
            (log / file).touch()
        given = [str(argument) for argument in arguments]
        process = self._ask(arguments=given, log=str(log), root=str(root), fault=fault)
        self._running.add(process)
        return Run(self, process, log)

    def reap(self, process: int) -> int:
        """The exit code of a run that is over, or minus the number of the signal that killed it."""
        code = self._ask(reap=process)
        self._running.remove(process)
        return code

    def _ask(self, **request: object) -> int:
        """Send a request, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())


class Run:
    """A run that was started."""

    def __init__(self, server: Server, process: int, log: Path) -> None:
        self._server, self.process, self._log = server, process, log

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process, number)

    def wait_until_stopped(self) -> None:
        """Wait until it has stopped itself, or is over."""
        while Path(f"/proc/{self.process}/stat").read_text().split(") ")[1][0] not in "TZ":
            time.sleep(0.005)

    def wait(self, timeout: float = 60) -> Ended:
        """Wait until it is over, at most ``timeout`` seconds, and kill it then."""
        descriptor = os.pidfd_open(self.process)
        try:
            if not select.select([descriptor], [], [], timeout)[0]:
                self.signal(signal.SIGKILL)
        finally:
            os.close(descriptor)
        code = self._server.reap(self.process)
        lines = [line.split() for line in (self._log / "calls").read_text().splitlines()]

        def numbers(kind: str) -> list[int]:
            return [int(line[1]) for line in lines if line[0] == kind]

        return Ended(
            code,
            (self._log / "stderr").read_text(),
            [Site(*line[1:]) for line in lines if line[0] == "call"],
            numbers("calibrated"),
            numbers("quantized"),
            ["struck"] in lines,
        )


class Saboteur:
    """Counts and logs the calls of this process, and lets a fault strike."""

    def __init__(self, root: Path, log: Path, fault: Fault | None) -> None:
        """
        Args:
            root: calls on what lies in this directory are counted.
            log: directory of the log, outside of it.
            fault: what strikes where.
        """
        self._root, self._directory, self._fault = root, log, fault
        self._log = os.open(log / "calls", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self._counts: Counter[Site] = Counter()
        self._counting = threading.Lock()
        self._disk = Disk(root) if fault and fault.effect == "power" else None
        for name, find in CALLS.items():
            setattr(os, name, partial(self._call, name, getattr(os, name), find))

    def log(self, *words: object) -> None:
        """Write a line to the log, which survives the process."""
        os.write(self._log, (" ".join(map(str, words)) + "\n").encode())

    def _call(
        self,
        name: str,
        original: Callable[..., Any],
        find: Callable[..., str],
        *args: Any,
        **options: Any,
    ) -> Any:
        path = find(*args, **options)
        if not Path(path).is_relative_to(self._root):
            return original(*args, **options)
        site = Site(name, os.path.relpath(path, self._root))
        with self._counting:
            self.log("call", *site)
            self._counts[site] += 1
            nth = self._counts[site]
        # What has reached the disk must be known at the moment the power fails.
        with self._disk.lock if self._disk else nullcontext():
            if self._fault and site == self._fault.site and nth == self._fault.nth:
                self._strike(self._fault, partial(original, **options), args)
            if self._disk:
                self._disk.before(name, path, *args)
            result = original(*args, **options)
            if self._disk and name == "fsync":
                self._disk.synced(path)
            return result

    def _strike(self, fault: Fault, original: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.log("struck")
        if hasattr(errno, fault.effect):
            number = getattr(errno, fault.effect)
            raise OSError(number, os.strerror(number))
        if fault.effect == "late":
            time.sleep(LATE_SECONDS)
        if fault.effect == "tear":
            original(*HALVES[fault.site.call](*args))
        if self._disk:
            self._disk.save(self._directory / "disk")
        os.kill(os.getpid(), getattr(signal, fault.effect, signal.SIGKILL))


class Disk:
    """What of a directory would still be there if the power failed.

    A file has the content it had when it was last synced, and is there once its directory has been synced.
    Renames and removals happen in order and at once, as on any file system with a journal.
    """

    def __init__(self, root: Path) -> None:
        self.lock = threading.RLock()
        self._root = root
        self._contents: dict[int, bytes] = {}
        self._entries: dict[int, set[str]] = {}
        for directory, _, files in os.walk(root):
            self.synced(directory)
            for file in files:
                self.synced(os.path.join(directory, file))

    def before(self, name: str, path: str, *args: Any) -> None:
        """To be called before a call on ``path``."""
        if name in ("fsync", "fdatasync") and os.path.isfile(path):
            # Nothing that is written after a sync began need be there when it ends.
            self.synced(path)
        if name in ("unlink", "rmdir") and os.path.lexists(path):
            # Whatever is created next may get its number.
            self._contents.pop(number := os.lstat(path).st_ino, None)
            self._entries.pop(number, None)
        if name == "rename" and os.path.lexists(path):
            (source, old), (target, new) = (
                (Path(p).parent.stat().st_ino, Path(p).name) for p in args
            )
            if old in self._entries.get(source, ()):
                self._entries.setdefault(target, set()).add(new)

    def synced(self, path: str) -> None:
        """``path`` as it is now stays."""
        number = os.stat(path).st_ino
        if os.path.isdir(path):
            self._entries[number] = set(os.listdir(path))
        else:
            self._contents[number] = Path(path).read_bytes()

    def save(self, to: Path, directory: Path | None = None) -> None:
        """Copy what would still be there to the new directory ``to``."""
        to.mkdir()
        with os.scandir(directory or self._root) as entries:
            for entry in entries:
                if entry.name not in self._entries.get(os.stat(directory or self._root).st_ino, ()):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    self.save(to / entry.name, Path(entry.path))
                else:
                    (to / entry.name).write_bytes(self._contents.get(entry.inode(), b""))


def _path_of(descriptor: int | str, *_: Any) -> str:
    """The path of an open file."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _path_named(path: int | str | os.PathLike[str], *_: Any, **options: Any) -> str:
    """The path that a call names, or that of an open file."""
    if isinstance(path, int):
        return _path_of(path)
    directory = options.get("dir_fd")
    return os.path.abspath(
        path if directory is None else f"{_path_of(directory)}/{os.fspath(path)}"
    )


# What changes files, and how to find out which.
CALLS: dict[str, Callable[..., str]] = {
    **dict.fromkeys(
        ("pwritev", "posix_fallocate", "ftruncate", "fsync", "fdatasync", "sendfile"), _path_of
    ),
    **dict.fromkeys(
        ("open", "mkdir", "rename", "truncate", "pwrite", "unlink", "rmdir"), _path_named
    ),
}


def _serve(warm_up: list[str]) -> None:
    """Warm up, then fork runs and tell how they ended, request by request."""
    import gc

    import torch
    from typer.testing import CliRunner

    from octavo import cli

    # With more, PyTorch starts threads of its own, and none may be left when a run is forked.
    torch.set_num_threads(1)
    result = CliRunner().invoke(cli.app, warm_up)
    assert result.exit_code == 0, result.stderr
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if not answer:
                _run(**request)
        print(answer, flush=True)


def _run(arguments: list[str], root: str, log: str, fault: list[Any] | None) -> NoReturn:
    """Be the program."""
    from octavo import canonical, cli
    from octavo.calibration import CalibrationStream

    for descriptor, name in enumerate(("/dev/null", f"{log}/stdout", f"{log}/stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        os.dup2(os.open(name, flags), descriptor)
    saboteur = Saboteur(
        Path(root), Path(log), Fault(Site(*fault[0]), fault[1], fault[2]) if fault else None
    )
    calibrate, weight_amax = CalibrationStream.run, canonical.weight_amax

    def calibrated(self: CalibrationStream, place: int, *args: Any, **options: Any) -> Any:
        result = calibrate(self, place, *args, **options)
        saboteur.log("calibrated", place)
        return result

    def quantized(linears: Sequence[str], *args: Any) -> Any:
        saboteur.log("quantized", linears[0].split(".")[2])
        return weight_amax(linears, *args)

    CalibrationStream.run = calibrated  # type: ignore[method-assign]
    canonical.weight_amax = quantized  # type: ignore[assignment]
    sys.argv = ["octavo", *arguments]
    cli.main()
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _serve(sys.argv[1:])
