"""``octavo.serve``: an edition behind an OpenAI-compatible API, by the engine it was made for."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from octavo.checkpoint.hub import resolve_model
from octavo.servers import Server, ServerCommand, choose_engine, server_command

# Signals that ask a program to end, and signals that it may give a meaning of its own.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_OTHERS = (signal.SIGUSR1, signal.SIGUSR2)


def log(line: str) -> None:
    """Write a line of the engine's output to standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def serve(
    model: str | Path,
    *,
    engine: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra: Sequence[str] = (),
    start_timeout: float = 1800,
    on_line: Callable[[str], None] = log,
    on_note: Callable[[str], None] = log,
    on_ready: Callable[[ServerCommand], None] = lambda _: None,
) -> int:
    """Serve a checkpoint until the engine ends.

    The engine gets the flags that its dialect needs. In the main thread, signals are passed on to it:
    SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2. One that asks to end, sent again or before
    the engine is healthy, ends the engine here: with SIGINT, SIGTERM and SIGKILL, some seconds apart,
    and with SIGKILL at once if another comes.

    Args:
        model: a checkpoint, BF16 or FP8: a directory, or a hub id.
        engine: a key of :data:`octavo.servers.SERVERS`. By default vLLM, or where it is not installed
            Octavo's own.
        host: the address to listen on.
        port: likewise.
        extra: flags of the engine's own; they win over ours.
        start_timeout: seconds until it has to be healthy.
        on_line: called with each line of the engine's output, from another thread.
        on_note: called with each sentence the user should know, before anything is started.
        on_ready: called once the engine is healthy.

    Returns:
        The engine's exit code; 128 + N if signal N ended it.

    Raises:
        OctavoError: the engine cannot read the checkpoint, is not installed, ends before it is
            healthy or is not healthy in time; or the port is in use.
        KeyboardInterrupt: SIGINT, under the conditions above.
        SystemExit: another signal, likewise, with 128 + N.
    """
    if engine is None:
        engine, note = choose_engine()
        if note is not None:
            on_note(note)
    command = server_command(engine, resolve_model(model), host=host, port=port, extra=extra)
    for note in command.notes:
        on_note(note)
    server = Server(command, on_line=on_line, start_timeout=start_timeout)
    with _signals_to(server) as running, server:
        running.set()
        on_ready(command)
        return server.wait()


@contextmanager
def _signals_to(server: Server) -> Iterator[threading.Event]:
    """Pass signals on to a server while the event is set."""
    running, seen = threading.Event(), set()

    def handle(signum: int, _: FrameType | None) -> None:
        if not running.is_set() or (signum in _ENDING and signum in seen):
            raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
        seen.add(signum)
        server.send_signal(signum)

    if threading.current_thread() is not threading.main_thread():
        yield running
        return
    # A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    before = {
        signum: handler
        for signum in (*_ENDING, *_OTHERS)
        if (handler := signal.getsignal(signum)) not in (signal.SIG_IGN, None)
    }
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield running
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
