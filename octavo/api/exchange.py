"""A client's request while the engine works on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Self

from starlette.types import Receive

from octavo.api.choices import Choice, Piece
from octavo.api.metrics import Metrics
from octavo.api.relay import Relay
from octavo.engines.torch.request import Output, Request
from octavo.engines.torch.runner import Runner, Ticket


class Exchange:
    """The continuations of one request, and the client who may go away before they are done.

    Everything but the engine's own calls happens in the event loop.

    Attributes:
        gone: whether the client went away. Nothing comes any more then.
    """

    def __init__(
        self,
        runner: Runner,
        relay: Relay[Output | Exception],
        metrics: Metrics,
        choices: Sequence[Choice],
    ) -> None:
        self.gone = False
        self._runner, self._relay, self._metrics = runner, relay, metrics
        self._choices = choices
        self._tickets: list[Ticket] = []
        self._outputs: list[tuple[int, Output]] = []
        self._begin = time.perf_counter()
        self._last: list[float | None] = [None] * len(choices)
        self._error: Exception | None = None
        self._arrival = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    def begin(self, requests: Sequence[Request], receive: Receive) -> Self:
        """Hand requests to the engine, one for each choice, and watch the client's connection.

        Raises:
            QueueFullError: the engine has no place for all of them. None of them stays in it then.
            DrainingError: it takes no more.
            OctavoError: one could never be computed.
        """
        try:
            for place, request in enumerate(requests):
                take = partial(self._take, place)
                self._tickets.append(self._runner.submit(request, partial(self._relay.put, take)))
        except BaseException:
            self.close()
            raise
        self._watcher = asyncio.create_task(self._watch(receive))
        return self

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What has come since the last time, until all continuations are done or the client is gone.

        Raises:
            Exception: what the engine failed with.
        """
        while not self._done():
            await self._arrival.wait()
            self._arrival.clear()
            if self.gone:
                return
            if self._error is not None:
                raise self._error
            outputs, self._outputs = self._outputs, []
            if batch := [one for place, output in outputs for one in self._add(place, output)]:
                yield batch

    def close(self) -> None:
        """Have the engine forget what is not done."""
        self._cancel()
        if self._watcher is not None:
            self._watcher.cancel()

    @property
    def outcome(self) -> str:
        """How it went, in a word."""
        if self._done():
            return "finished"
        return "failed" if self._error is not None else "cancelled"

    def _cancel(self) -> None:
        for ticket, choice in zip(self._tickets, self._choices, strict=False):
            if not choice.has_ended():
                self._runner.cancel(ticket)

    def _done(self) -> bool:
        return all(choice.has_ended() for choice in self._choices)

    def _take(self, place: int, what: Output | Exception) -> None:
        if isinstance(what, Exception):
            self._error = what
        else:
            now, last = time.perf_counter(), self._last[place]
            if last is None:
                self._metrics.first.observe(now - self._begin)
            else:
                self._metrics.next.observe(now - last)
            self._last[place] = now
            self._outputs.append((place, what))
        self._arrival.set()

    def _add(self, place: int, output: Output) -> list[Piece]:
        choice = self._choices[place]
        if choice.has_ended():
            return []  # computed before the engine heard of the stop string
        piece = choice.add(output)
        if choice.has_ended() and output.finish is None:
            self._runner.cancel(self._tickets[place])
        return [piece]

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._cancel()
        self._arrival.set()
