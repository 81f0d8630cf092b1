"""A Ray cluster of two machines: this one, and one that has a network, a file system and a name of its own.

The second is a Ray node in namespaces of Linux: its network is joined to this one by a virtual cable, and one
directory is another than here. Making them takes privileges. Where these are missing, the second node is a plain
one beside the first.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# Of each machine.
CPUS = 2

OTHER = "other-machine"


class Machines(NamedTuple):
    """Two machines with a Ray node on each.

    Attributes:
        address: of the cluster.
        private: a directory that is another one on the other machine.
        other: the root of the other machine's files, as this one sees them; None where there is no such machine.
        why: what kept it from being made.
    """

    address: str
    private: Path
    other: Path | None
    why: str

    def there(self, path: Path) -> Path:
        """The path here of what lies at ``path`` on the other machine."""
        assert self.other is not None
        return self.other / path.relative_to("/")


@contextmanager
def two_machines(directory: Path) -> Iterator[Machines]:
    """Start them, with what they need in an empty directory; end them at the end."""
    private = directory / "private"
    private.mkdir()
    with ExitStack() as stack:
        here, there, enter, why = "127.0.0.1", "127.0.0.1", list[str](), ""
        try:
            here, there, enter = stack.enter_context(_cable(private))
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip()
        head = ["--head", "--port=0", "--include-dashboard=false", f"--node-ip-address={here}"]
        stack.enter_context(_node(head, directory / "head.log"))
        address = _wait_for(r"(?<=--address=')[^']+", directory / "head.log")
        join = [f"--address={address}", f"--node-ip-address={there}"]
        process = stack.enter_context(_node(join, directory / "other.log", enter))
        _wait_for("Ray runtime started", directory / "other.log")
        yield Machines(address, private, None if why else Path(f"/proc/{process.pid}/root"), why)


@contextmanager
def _cable(private: Path) -> Iterator[tuple[str, str, list[str]]]:
    """A network for the other machine.

    Yields:
        This machine's address in it, the other's, and what to put before a command to run it there.
    """
    number = random.SystemRandom().randrange(1 << 14)
    name, ours, theirs = f"octavo-{number}", f"octavo{number}a", f"octavo{number}b"
    # Four addresses of those set aside for trying out networks.
    network, first = f"198.18.{number // 64}", number % 64 * 4
    here, there = f"{network}.{first + 1}", f"{network}.{first + 2}"

    def ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)

    own = f'hostname {OTHER} && mount -t tmpfs octavo {shlex.quote(str(private))} && exec "$@"'
    enter = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-c", own, "sh"]
    ip(f"netns add {name}")
    try:
        ip(f"link add {ours} type veth peer name {theirs} netns {name}")
        ip(f"addr add {here}/30 dev {ours}")
        ip(f"link set {ours} up")
        ip(f"-n {name} addr add {there}/30 dev {theirs}")
        ip(f"-n {name} link set {theirs} up")
        ip(f"-n {name} link set lo up")
        subprocess.run([*enter, "true"], check=True, capture_output=True, text=True)
        yield here, there, enter
    finally:
        ip(f"netns delete {name}")


@contextmanager
def _node(
    options: list[str], log: Path, enter: list[str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A Ray node, until the context is left."""
    start = ["-m", "ray.scripts.scripts", "start", "--block", "--log-style=record"]
    store = f"--object-store-memory={100 << 20}"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*(enter or []), sys.executable, *start, f"--num-cpus={CPUS}", store, *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(pattern: str, log: Path) -> str:
    """What a pattern matches in a log, once it does."""
    deadline = time.monotonic() + 300
    while not (found := re.search(pattern, log.read_text())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {pattern!r} in {log}: {log.read_text()}")
        time.sleep(0.1)
    return found[0]
