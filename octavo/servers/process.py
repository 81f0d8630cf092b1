"""A server as a process: started, waited for, and ended with everything it started itself."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx2

from octavo.errors import OctavoError, one_line
from octavo.servers import keeper
from octavo.servers.keeper import ESCALATION
from octavo.servers.server import Build, ServerCommand

_CLEANING_SECONDS = 5.0
_POLL_SECONDS = 0.2
_LAST_LINES = 20

OnLine = Callable[[str], None]


class Server:
    """An engine that serves an edition; a context manager.

    Leaving it ends the engine and its process group: SIGINT, SIGTERM, SIGKILL, some seconds apart. So
    does the end of this process, whatever ends it.

    Attributes:
        url: where it answers.
    """

    def __init__(
        self, command: ServerCommand, *, on_line: OnLine, start_timeout: float = 1800
    ) -> None:
        """
        Args:
            command: what to start.
            on_line: called with each line of the engine's output, from another thread.
            start_timeout: seconds until it has to be healthy.
        """
        self.url = command.url
        self._command, self._on_line, self._start_timeout = command, on_line, start_timeout
        self._program: _Program | None = None

    def __enter__(self) -> Self:
        """Start the engine and wait until it is healthy.

        Raises:
            OctavoError: it is not installed, its address is not to be had, it ended before it was
                healthy, or it was not healthy in time.
        """
        command = self._command
        program = _find(command.argv[0], f"Install it with {command.install}.")
        _refuse_taken_address(command.url)
        if command.build is not None and not command.build.output.exists():
            self._build(command.build)
        started = _Program((program, *command.argv[1:]), command.env, self._on_line)
        healthy = False
        try:
            healthy = self._becomes_healthy(started)
            code = started.poll()
        finally:
            if not healthy:
                started.end()
        if not healthy:
            raise OctavoError(
                f"{command.name} was not healthy after {self._start_timeout:g} s and has been stopped. "
                f"Allow more with --start-timeout. {started.said()}"
                if code is None
                else f"{command.name} ended with {_describe(code)} before it was healthy at "
                f"{command.url}. {started.said()}"
            )
        self._program = started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._program is not None:
            self._program.end()

    def wait(self) -> int:
        """Wait until the engine ends.

        Returns:
            Its exit code; 128 + N if signal N ended it.
        """
        assert self._program is not None, "not started"
        return self._program.wait()

    def send_signal(self, signum: int) -> None:
        """Send the engine's main process a signal; nothing if it has ended."""
        assert self._program is not None, "not started"
        self._program.send_signal(signum)

    def _build(self, build: Build) -> None:
        """Run a build into a directory beside its output's, and rename it when it is done."""
        program = _find(build.argv[0], build.missing)
        partial = build.output.with_name(f".{build.output.name}.partial-{os.getpid()}")
        partial.mkdir()
        try:
            # Programs like this one leave caches in the directory they run in.
            building = _Program(
                (program, *build.argv[1:], str(partial)), {}, self._on_line, directory=partial
            )
            try:
                code = building.wait()
            finally:
                building.end()
            if code:
                raise OctavoError(
                    f"{build.argv[0]} ended with {_describe(code)}. {building.said()}"
                )
            partial.rename(build.output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _becomes_healthy(self, program: _Program) -> bool:
        """Wait until the engine is healthy; False if it ends or takes too long."""
        deadline = time.monotonic() + self._start_timeout
        # No proxy of the environment's stands between two programs of one machine.
        with httpx2.Client(trust_env=False, timeout=5) as client:
            while not _is_healthy(client, self.url + self._command.health):
                if program.poll() is not None or time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
        return True


class _Program:
    """A running program in a process group of its own, its output read line by line.

    The group's leader is :mod:`octavo.servers.keeper`: it is there for as long as the group's number
    is in use here.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        on_line: OnLine,
        *,
        directory: Path | None = None,
    ) -> None:
        on_line(f"$ {shlex.join(argv)}")
        self._on_line = on_line
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            self._process = subprocess.Popen(
                argv,
                env={**os.environ, **env},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                # So that a terminal's Ctrl-C reaches it through us only, and its children with it.
                process_group=self._keeper.pid,
            )
        except BaseException:
            self._keeper.kill()
            self._keeper.communicate()
            raise
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        code = self._process.poll()
        return None if code is None else _shell_code(code)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return _shell_code(self._process.wait())

    def send_signal(self, signum: int) -> None:
        self._process.send_signal(signum)

    def end(self) -> None:
        """End the process group, once. Interrupted, it ends it without further delay."""
        try:
            for signum, seconds in ESCALATION:
                os.killpg(self._keeper.pid, signum)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(seconds)
                    # What it started may have to clean up after it, as multiprocessing's resource
                    # trackers do with shared memory, and holds its output open meanwhile.
                    self._reader.join(_CLEANING_SECONDS)
                    break
        finally:
            os.killpg(self._keeper.pid, signal.SIGKILL)
            self._process.wait()
            self._reader.join(timeout=1)
            self._keeper.communicate()

    def said(self) -> str:
        """Its last lines, for an error message."""
        lines = "\n".join(f"  {line}" for line in self._last_lines)
        return f"Its last lines:\n{lines}" if lines else "It printed nothing."

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last_lines.append(line.rstrip())
            # Where the log goes may be gone; a full pipe would stop the program.
            with suppress(OSError):
                self._on_line(line.rstrip())


def find_program(name: str) -> str | None:
    """The program ``name``: beside this Python, or else on the PATH; None if it is in neither."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=places)


def _find(name: str, missing: str) -> str:
    found = find_program(name)
    if found is None:
        raise OctavoError(f"{name} is neither beside {sys.executable} nor on the PATH. {missing}")
    return found


def _refuse_taken_address(url: str) -> None:
    """Raise if no server can listen at ``url``."""
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port
    failures = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OctavoError(f"--host {host} is no address: {one_line(error)}.") from error
    for family, kind, _, _, address in addresses:
        with socket.socket(family, kind) as probe:
            # As servers do: connections of an earlier one that linger are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                failures.append(error)
    if any(failure.errno == errno.EADDRINUSE for failure in failures):
        raise OctavoError(
            f"Port {port} of {host} is in use by another program. Choose another with --port."
        )
    if len(failures) == len(addresses):
        raise OctavoError(
            f"Nothing can listen on port {port} of {host}: {failures[0].strerror}. Choose another "
            "--host or --port."
        )


def _is_healthy(client: httpx2.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx2.codes.OK
    except httpx2.TransportError:
        return False


def _shell_code(returncode: int) -> int:
    """An exit code as shells give it: 128 + N if signal N ended the program."""
    return 128 - returncode if returncode < 0 else returncode


def _describe(code: int) -> str:
    if code - 128 in set(signal.Signals):
        return f"exit code {code} ({signal.Signals(code - 128).name})"
    return f"exit code {code}"
