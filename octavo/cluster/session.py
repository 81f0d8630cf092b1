"""Ray itself: connected, asked for places, and its errors in plain words."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from octavo.errors import OctavoError, WriteError, one_line

# How often a worker may die. One that cannot live at all should not be tried for ever.
RESTARTS = 10

# How long to wait for a cluster to answer.
_KNOCK_SECONDS = 10.0

# What Ray would do otherwise: send statistics home, tell on stdout of every worker and machine that dies, and
# leave workers on this machine what other programs do not use.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"^(Task Worker\.|A worker died|Raylet is|The node with)|low on memory",
    "RAY_worker_niceness": "0",
}


@contextmanager
def connected(address: str | None, cores: int) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address``, or to one of so many cores on this machine."""
    if importlib.util.find_spec("ray") is None:
        raise OctavoError(
            "--workers needs Ray, which is not installed. Install it with `pip install 'octavo[cluster]'`."
        )
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": cores}
    try:
        if address is not None:
            _knock(address)
        with _own_signals():
            ray.init(address=address or "local", **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise OctavoError(
            f"No Ray cluster can be used at {address or 'this machine'}: {one_line(error)}. Start one with `ray start "
            "--head`, and pass its address (with RAY_AUTH_MODE=token set, if the cluster asks for a token), or "
            "leave --cluster out to use this machine alone."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise if nothing listens at HOST:PORT. Ray would go on trying for a quarter of an hour."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=_KNOCK_SECONDS).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the program's way of taking SIGTERM, which Ray would replace by its own."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def plain_errors(ray: Any) -> Iterator[None]:
    """Workers' own errors, and what handlers of signals raise, without Ray's wrapping."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None or isinstance(error.__cause__, Exception):
            raise
        raise error.__cause__ from None
    except ray.exceptions.RayError as error:
        cause = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, (OctavoError, OSError)):
            raise cause from None
        if isinstance(cause, ray.exceptions.RayActorError):
            raise _given_up(str(cause)) from error
        if isinstance(cause, ray.exceptions.RayError):
            raise WriteError(
                f"The Ray cluster failed: {one_line(cause)}. Look at Ray's logs."
            ) from error
        raise


def _given_up(text: str) -> OctavoError:
    """What to say of a worker that Ray does not start again, from what Ray says."""
    found = re.search(r"\bip[:=] ?([\w.:]+)", text)
    place = f" on {found[1]}" if found else ""
    if "creation task" in text:
        return OctavoError(
            f"A worker{place} could not be started: {text.splitlines()[-1].strip()}. Install the same version of "
            "Octavo on every machine of the cluster."
        )
    return WriteError(
        f"A worker{place} died more than {RESTARTS} times. If the system ended it for want of memory, which the "
        "kernel's log would tell, pass a smaller --max-memory; otherwise look at Ray's logs there."
    )
