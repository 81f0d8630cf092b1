"""A streamed completion, taken apart after it has ended.

While a load runs, the client notes when it read which bytes and no more. What they mean is found out
here, when nothing is left to be delayed by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

# Bytes of a stream, and when they were read.
Read = tuple[float, bytes]

_DONE = b"[DONE]"


class StreamError(Exception):
    """A stream that is not what was asked for. The message goes on where "The server" left off, and
    ends without a full stop."""


class BrokenStreamError(StreamError):
    """A stream that ends before its end, most likely with its server."""


class Completion(NamedTuple):
    """A completion.

    Attributes:
        arrivals: when each chunk with tokens was read, on the clock of the reads.
        prompt_tokens: by the server's count.
        output_tokens: likewise.
    """

    arrivals: list[float]
    prompt_tokens: int
    output_tokens: int


class _Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(BaseModel):
    choices: list[Any] = []
    usage: _Usage | None = None
    error: Any = None


def read_completion(reads: Iterable[Read]) -> Completion:
    """The completion that a server streamed.

    Args:
        reads: the body's bytes in order, cut anywhere.

    Raises:
        StreamError: it reports an error, ends early, or lacks tokens or usage.
    """
    arrivals: list[float] = []
    usage: _Usage | None = None
    done = False
    for time, data in _events(reads):
        if data == _DONE:
            done = True
            continue
        chunk = _chunk(data)
        if chunk.error is not None:
            raise StreamError(f"refused a request: {message_of(chunk.error)}")
        if chunk.choices:
            # Its text may be empty: the token's character may not be complete yet.
            arrivals.append(time)
        usage = chunk.usage or usage
    if not done:
        raise BrokenStreamError(
            f"ended a stream early, after {len(arrivals)} chunks and without [DONE]"
        )
    if usage is None:
        raise StreamError(
            "sent no usage with a stream, so its tokens cannot be counted. Expected an "
            "OpenAI-compatible server that honours stream_options.include_usage"
        )
    if not arrivals or not usage.completion_tokens:
        raise StreamError("generated no token")
    # A chunk more than tokens is a closing one that holds none.
    return Completion(
        arrivals[: usage.completion_tokens], usage.prompt_tokens, usage.completion_tokens
    )


def message_of(error: object) -> str:
    """What a server's error object says, in one line of at most 500 characters."""
    if isinstance(error, dict):
        for key in ("error", "message", "detail"):
            if key in error:
                return message_of(error[key])
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 500 else f"{text[:500]} …"


def _events(reads: Iterable[Read]) -> Iterator[Read]:
    """The data of each server-sent event, and when its last byte was read."""
    pending, time = b"", 0.0
    for time, data in reads:
        *lines, pending = (pending + data).split(b"\n")
        yield from ((time, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    if pending.startswith(b"data:"):
        yield time, pending[5:].strip()


def _chunk(data: bytes) -> _Chunk:
    try:
        return _Chunk.model_validate_json(data)
    except ValidationError:
        shown = data[:200].decode(errors="replace")
        raise StreamError(
            f"sent {shown!r}, expected a chunk of a completion as OpenAI-compatible servers send it"
        ) from None
