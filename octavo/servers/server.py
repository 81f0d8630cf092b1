"""What serving an edition takes: an engine's command line, and where it will answer."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from octavo.errors import OctavoError
from octavo.scheme import Scheme
from octavo.servers.reads import Reads

# Addresses that mean every interface, and where this machine reaches such a server.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}

# Flags of the engines with which they do not speak plain HTTP on a port.
_NOT_HTTP = {"--grpc", "--headless", "--ssl-certfile", "--ssl-keyfile", "--uds"}


class Build(NamedTuple):
    """What is made of a checkpoint before an engine can serve it.

    Attributes:
        argv: a program and its arguments; the directory to create goes behind them.
        output: that directory. It is not there yet, and appears whole.
        missing: what to do where the program is not installed, a sentence.
    """

    argv: tuple[str, ...]
    output: Path
    missing: str


class ServerCommand(NamedTuple):
    """How an engine is started on an edition.

    Attributes:
        name: the engine's, in prose.
        argv: the program, by its bare name or where it is, and its arguments.
        env: environment variables it gets besides ours.
        url: where it answers, for a client on this machine: ``http://127.0.0.1:8000``.
        health: the path below ``url`` that gives status 200 once the model is loaded.
        install: how the engine is installed.
        model: what requests call the model.
        notes: what the user should know, a sentence each.
        build: what has to be done first, if anything.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    url: str
    health: str
    install: str
    model: str
    notes: tuple[str, ...] = ()
    build: Build | None = None


class Flags:
    """Our flags of an engine and the user's, who has the last word."""

    def __init__(self, ours: Mapping[str, str], extra: Sequence[str]) -> None:
        """
        Args:
            ours: values by flag, spelled with dashes.
            extra: the user's arguments, as typed.
        """
        self._extra = tuple(extra)
        self._given = _given(extra)
        self._ours = {flag: value for flag, value in ours.items() if flag not in self._given}

    def get(self, flag: str, default: str = "") -> str:
        """The value of a flag, the user's before ours."""
        return self._given.get(flag, self._ours.get(flag, default))

    def added(self, flag: str) -> bool:
        """Whether it is in the command line by our choice."""
        return flag in self._ours

    def words(self) -> tuple[str, ...]:
        """For the command line: ours, then the user's."""
        return (*(word for item in self._ours.items() for word in item), *self._extra)

    def url(self) -> str:
        """Where a server with these flags answers, for a client on this machine.

        Raises:
            OctavoError: ``--port`` is not a port, or a flag makes it answer in another way.
        """
        host, port = self.get("--host"), self.get("--port")
        host = _EVERYWHERE.get(host, host)
        if not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise OctavoError(f"--port {port} is not a port. Expected a number from 1 to 65535.")
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if elsewhere := _NOT_HTTP & self._given.keys():
            raise OctavoError(
                f"With {min(elsewhere)} the engine does not answer at {url}, where Octavo waits for it. "
                "Drop the flag, or start the engine without Octavo."
            )
        return url


def refuse_unreadable(
    engine: str, reads: Reads, directory: Path, dialect: str | None, scheme: Scheme | None
) -> None:
    """Raise if an engine cannot read an edition, with the command that helps.

    Args:
        engine: its name.
        reads: what it reads besides checkpoints that are not quantized.
        directory: the edition's.
        dialect: None if it is not quantized.
        scheme: likewise.

    Raises:
        OctavoError: it cannot.
    """
    if dialect is None or scheme is None or scheme.kind in reads.get(dialect, ()):
        return
    target = next((name for name, kinds in reads.items() if scheme.kind in kinds), None)
    raise OctavoError(
        f"{engine} does not read {directory}, which is of the dialect {dialect} with the scheme "
        f"{scheme.kind}. "
        + (
            f"Convert it: `{convert_command(directory, target)}`."
            if target
            else f"No dialect that {engine} reads ({', '.join(reads)}) has that scheme: quantize the "
            "original checkpoint with another one."
        )
    )


def convert_command(directory: Path, dialect: str) -> str:
    """What a user types to convert an edition."""
    output = f"{directory}-{dialect}"
    return shlex.join(["octavo", "convert", str(directory), "-o", output, "--to", dialect])


def model_name(directory: Path) -> str:
    """What a model is called: the directory's name, or the hub id of one in the hub's cache.

    There a model is ``models--ORG--NAME/snapshots/COMMIT``.
    """
    if directory.parent.name == "snapshots":
        return directory.parents[1].name.removeprefix("models--").replace("--", "/")
    return directory.name


def _given(extra: Sequence[str]) -> dict[str, str]:
    """Values by flag, of arguments like ``--flag value`` and ``--flag=value``.

    Engines take underscores for dashes.
    """
    values = {}
    for word, following in itertools.pairwise([*extra, ""]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            values[flag.replace("_", "-")] = value if equals else following
    return values
