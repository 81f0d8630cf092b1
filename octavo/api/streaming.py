"""Answers over HTTP: a stream of server-sent events, or one JSON object."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from octavo.api.answers import Answer
from octavo.api.choices import Choice
from octavo.api.errors import error_body, error_response
from octavo.api.exchange import Exchange

_log = logging.getLogger(__name__)

# What nginx logs for a client that did not wait; nobody reads it.
_CLIENT_GONE = 499


class EventStream(StreamingResponse):
    """Server-sent events. The exchange that they come from knows when the client goes away."""

    def __init__(self, events: AsyncGenerator[bytes], done: Callable[[], None]) -> None:
        """
        Args:
            events: what the client gets, as it comes.
            done: called at the end, whatever it is.
        """
        super().__init__(events, media_type="text/event-stream")
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            await self._events.aclose()
            self._done()


async def events(
    exchange: Exchange, answer: Answer, choices: list[Choice]
) -> AsyncGenerator[bytes]:
    """What a client that asked for a stream gets: all that is there, at a time.

    Args:
        exchange: what goes on in the engine.
        answer: how it is written.
        choices: the continuations.
    """
    try:
        async for batch in exchange.pieces():
            yield "".join([answer.chunk(piece) for piece in batch]).encode()
        if not exchange.gone:
            yield answer.ending(choices).encode()
    except Exception as error:
        _log.exception("the engine failed")
        yield f"data: {json.dumps(error_body(500, _failure(error)))}\n\n".encode()


async def whole(exchange: Exchange, answer: Answer, choices: list[Choice]) -> Response:
    """The answer of a client that waits for all of it; see :func:`events`."""
    try:
        async for batch in exchange.pieces():
            for piece in batch:
                answer.keep(piece)
    except Exception as error:
        _log.exception("the engine failed")
        return error_response(500, _failure(error))
    if exchange.gone:
        return Response(status_code=_CLIENT_GONE)
    return JSONResponse(answer.whole(choices))


def _failure(error: Exception) -> str:
    return f"The engine failed at this request ({type(error).__name__}); the server's log has the details."
