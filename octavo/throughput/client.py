"""A closed loop of streamed requests to one server.

The client shares the machine with what it measures, and its own work delays what it sees. So requests
are written before the clock starts, what comes back is kept as it is, and parsed after the end.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import httpx2

from octavo.errors import OctavoError, one_line
from octavo.throughput.endpoint import Endpoint, tls
from octavo.throughput.results import Request
from octavo.throughput.stream import (
    BrokenStreamError,
    Read,
    StreamError,
    message_of,
    read_completion,
)

# A prompt behind many others may wait for minutes, a connection and the next token may not.
_TIMEOUT = httpx2.Timeout(30.0, read=600.0)
_NO_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


class Trace(NamedTuple):
    """What one load on a server gave.

    Attributes:
        requests: in the order they were sent.
        busy: the client's CPU seconds for each second that passed.
    """

    requests: tuple[Request, ...]
    busy: float


class _Reply(NamedTuple):
    sent: float
    reads: list[Read]


def completion_request(model: str, prompt: Sequence[int], output_len: int) -> bytes:
    """The body of a request for exactly ``output_len`` tokens after ``prompt``."""
    return json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def run_load(
    endpoint: Endpoint,
    requests: Sequence[bytes],
    *,
    warmup: Sequence[bytes] = (),
    concurrency: int,
    on_request: Callable[[], None],
    log: Sequence[str] = (),
) -> Trace:
    """Send requests, ``concurrency`` of them in flight until none is left.

    Args:
        endpoint: where to.
        requests: measured.
        warmup: sent before, in the same way, and forgotten.
        concurrency: requests in flight.
        on_request: called after each request, warm-up included.
        log: the server's last lines, as far as they are known.

    Raises:
        OctavoError: the server is not reachable, refuses a request, or breaks off a stream.
    """
    name = f"The server at {endpoint.url}"
    try:
        begin, replies, busy = asyncio.run(
            _run(endpoint.url, requests, warmup, concurrency, on_request)
        )
        return Trace(tuple(_parse(reply, begin) for reply in replies), busy)
    except BrokenStreamError as error:
        raise OctavoError(f"{name} {error}. {_last_words(log)}") from None
    except StreamError as error:
        raise OctavoError(f"{name} {error}.") from None
    except httpx2.TransportError as error:
        raise OctavoError(
            f"{name} broke off or is not reachable: {one_line(error)}. {_last_words(log)}"
        ) from None


async def _run(
    url: str,
    requests: Sequence[bytes],
    warmup: Sequence[bytes],
    concurrency: int,
    on_request: Callable[[], None],
) -> tuple[float, list[_Reply], float]:
    async with httpx2.AsyncClient(
        base_url=url,
        headers=_HEADERS,
        timeout=_TIMEOUT,
        limits=_NO_LIMITS,
        verify=tls(),
        trust_env=False,
    ) as client:
        await _closed_loop(client, warmup, concurrency, on_request)
        begin, cpu = time.perf_counter(), time.thread_time()
        replies = await _closed_loop(client, requests, concurrency, on_request)
        seconds = time.perf_counter() - begin
        return begin, replies, (time.thread_time() - cpu) / seconds


async def _closed_loop(
    client: httpx2.AsyncClient,
    requests: Iterable[bytes],
    concurrency: int,
    on_request: Callable[[], None],
) -> list[_Reply]:
    """Replies in the order their requests were sent."""
    waiting = iter(requests)
    replies: list[_Reply] = []

    async def user() -> None:
        for request in waiting:
            reply = _Reply(time.perf_counter(), [])
            replies.append(reply)
            await _stream(client, request, reply.reads)
            on_request()

    try:
        async with asyncio.TaskGroup() as users:
            for _ in range(concurrency):
                users.create_task(user())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return replies


async def _stream(client: httpx2.AsyncClient, request: bytes, reads: list[Read]) -> None:
    async with client.stream("POST", "/v1/completions", content=request) as response:
        if response.is_error:
            raise StreamError(_refusal(response.status_code, await response.aread()))
        async for data in response.aiter_raw():
            reads.append((time.perf_counter(), data))


def _refusal(status: int, body: bytes) -> str:
    text = body.decode(errors="replace")
    try:
        said = message_of(json.loads(text))
    except ValueError:
        said = message_of(text)
    return f"refused a request with status {status}: {said}"


def _last_words(log: Sequence[str]) -> str:
    lines = "".join(f"\n  {line}" for line in log)
    return f"Its last lines:{lines}" if lines else "Its log may say why."


def _parse(reply: _Reply, begin: float) -> Request:
    completion = read_completion(reply.reads)
    return Request(
        # Microseconds: the clock is not that exact, and the file of results is long.
        sent=round(reply.sent - begin, 6),
        arrivals=tuple(round(time - reply.sent, 6) for time in completion.arrivals),
        prompt_tokens=completion.prompt_tokens,
        output_tokens=completion.output_tokens,
    )
