"""Engines that serve an edition over HTTP, as programs of their own.

A server is a module with a function ``command(edition_dir, *, host, port, extra)`` and a line in
:data:`SERVERS`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from octavo.errors import OctavoError
from octavo.servers.process import Server, find_program
from octavo.servers.server import Build, ServerCommand

SERVERS = {
    "vllm": "octavo.servers.vllm",
    "tensorrt-llm": "octavo.servers.tensorrt_llm",
    "torch": "octavo.servers.torch",
}


def choose_engine() -> tuple[str, str | None]:
    """What serves where the user does not say: vLLM, or where it is not installed the embedded engine.

    Returns:
        A key of :data:`SERVERS`, and what the user should know about it, a sentence.
    """
    if find_program("vllm") is not None:
        return "vllm", None
    return (
        "torch",
        "vLLM is not installed here, so the checkpoint is served by Octavo's own engine (--engine torch).",
    )


def server_command(
    engine: str,
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra: Sequence[str] = (),
) -> ServerCommand:
    """How an engine is started on an edition. Starts nothing.

    Args:
        engine: a key of :data:`SERVERS`.
        model: the checkpoint directory, BF16 or FP8.
        host: the address it listens on.
        port: likewise.
        extra: flags of the engine's own; they win over ours.

    Raises:
        OctavoError: no such engine, or it cannot read the checkpoint.
    """
    if engine not in SERVERS:
        raise OctavoError(f"Unknown engine {engine!r}. Expected one of {', '.join(SERVERS)}.")
    # The engine may run elsewhere, and the directory's name is what it calls the model.
    directory = Path(os.path.abspath(model))
    command: ServerCommand = import_module(SERVERS[engine]).command(
        directory, host=host, port=port, extra=extra
    )
    return command


__all__ = ["SERVERS", "Build", "Server", "ServerCommand", "choose_engine", "server_command"]
