"""``python -m octavo.api CHECKPOINT``: the server as a program.

It answers as soon as it can, with 503 until the model is loaded. SIGTERM or SIGINT drains it: what it has taken
is finished, and it exits with 0; the second one ends it at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import uvicorn

from octavo.allocator import keep_freed_memory, quick_imports
from octavo.errors import OctavoError
from octavo.units import parse_bytes

with quick_imports():
    from octavo.api.app import create_app
    from octavo.api.served import Served, load_served
    from octavo.api.service import Service

# Connections of clients that keep them: longer than theirs, so that none is closed as it is used again.
_KEEP_ALIVE_SECONDS = 75
# For a client that does not read the rest of its answer, once the engine is drained.
_LAST_SECONDS = 30


class Server(uvicorn.Server):
    """Uvicorn, with another meaning of signals: it listens until the engine is drained."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal, signum)
        yield

    def _on_signal(self, signum: int) -> None:
        if self._draining is not None:
            os._exit(128 + signum)
        print("draining: what is in flight is finished; the same signal again ends it", flush=True)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True


def main() -> None:
    """The program."""
    options = _parse()
    name = options.served_model_name or options.model.resolve().name
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    service = Service(name, partial(_load, name, options), _announce, fail)
    config = uvicorn.Config(
        create_app(service),
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = Server(config, service)
    keep_freed_memory()
    server.run()
    _leave(failures)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m octavo.api", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint directory, BF16 or FP8")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", help="what clients call it; the directory's name")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--kv-cache-memory", help="of keys and values, such as 4GiB")
    parser.add_argument(
        "--max-running", type=int, help="sequences computed at a time: 64, on a GPU 256"
    )
    parser.add_argument(
        "--max-batch-tokens", type=int, help="tokens computed at a time: 512, on a GPU 4096"
    )
    parser.add_argument("--max-waiting", type=int, default=1024, help="requests in the line")
    return parser.parse_args()


def _load(name: str, options: argparse.Namespace) -> Served:
    with quick_imports():
        from octavo.engines.torch import open_runner
    memory = options.kv_cache_memory
    runner = open_runner(
        options.model,
        options.device,
        kv_cache_memory=None if memory is None else parse_bytes(memory),
        max_running=options.max_running,
        max_tokens=options.max_batch_tokens,
        max_waiting=options.max_waiting,
    )
    return load_served(name, options.model, runner)


def _announce(served: Served) -> None:
    print(f"{served.name} is loaded: up to {served.max_positions:,} tokens a sequence", flush=True)


def _leave(failures: list[Exception]) -> None:
    """End the program without waiting for threads, with what kept it from serving."""
    for error in failures:
        if not isinstance(error, OctavoError):
            raise error
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if failures else 0)


if __name__ == "__main__":
    main()
