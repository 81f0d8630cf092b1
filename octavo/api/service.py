"""The state of a server: loading, ready, draining; and the way of a request through it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Literal

from fastapi.responses import Response
from starlette.requests import Request as HttpRequest

from octavo.api.errors import ApiError
from octavo.api.exchange import Exchange
from octavo.api.jobs import Job
from octavo.api.metrics import Metrics
from octavo.api.relay import Relay
from octavo.api.served import Served
from octavo.api.streaming import EventStream, events, whole
from octavo.engines.torch.request import Output
from octavo.engines.torch.runner import DrainingError, QueueFullError, Stats
from octavo.errors import OctavoError

State = Literal["loading", "ready", "draining"]


class Service:
    """A model that is loaded in the background, and then served until it is drained.

    Attributes:
        name: what clients call the model.
        metrics: what is counted.
        state: loading, ready or draining.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Served],
        on_ready: Callable[[Served], None] = lambda served: None,
        on_failure: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """
        Args:
            name: see above.
            load: loads the model, in a thread of its own.
            on_ready: called in the event loop once it is there.
            on_failure: called in the event loop with what prevented it.
        """
        self.name = name
        self.state: State = "loading"
        self.metrics = Metrics(self._stats)
        self._load, self._on_ready, self._on_failure = load, on_ready, on_failure
        self._served: Served | None = None
        self._relay: Relay[Output | Exception] | None = None

    def begin(self) -> None:
        """Load the model; called in the event loop."""
        loop = asyncio.get_running_loop()
        self._relay = Relay(loop)

        def load() -> None:
            try:
                call = partial(self._loaded, self._load())
            except Exception as error:
                call = partial(self._on_failure, error)
            loop.call_soon_threadsafe(call)

        # Not one of the executor's, which the program would wait for when it ends meanwhile.
        threading.Thread(target=load, name="octavo-load", daemon=True).start()

    async def drain(self) -> None:
        """Take no more requests, and wait until the engine is done with those it has."""
        self.state = "draining"
        if self._served is not None:
            await asyncio.to_thread(self._served.runner.drain, None)

    def close(self) -> None:
        """End the engine, whatever it does."""
        self.state = "draining"
        if self._served is not None:
            self._served.runner.close()

    def served(self) -> Served:
        """The model.

        Raises:
            ApiError: it is not there yet, or no more.
        """
        if self._served is None or self.state != "ready":
            raise ApiError(503, f"The server is {self.state}. Try again later.", code=self.state)
        if self._served.runner.failure is not None:
            raise ApiError(
                503,
                f"The engine has failed: {self._served.runner.failure!r}. Start the server again.",
                code="failed",
            )
        return self._served

    def named(self, model: str) -> Served:
        """The model, if it is the one that is called so.

        Raises:
            ApiError: likewise, or it is another.
        """
        served = self.served()
        if model != self.name:
            raise ApiError(
                404,
                f"There is no model {model!r} here, only {self.name!r}.",
                param="model",
                code="model_not_found",
            )
        return served

    async def answer(self, job: Job, http: HttpRequest) -> Response:
        """Have the engine do a job, and answer with what comes of it.

        Raises:
            ApiError: the engine does not take it.
        """
        assert self._relay is not None
        exchange = Exchange(self.served().runner, self._relay, self.metrics, job.choices)
        try:
            exchange.begin(job.requests, http.receive)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from None
        except DrainingError as error:
            raise ApiError(503, str(error), code="draining") from None
        except OctavoError as error:
            raise ApiError(400, str(error), param="prompt") from None

        def done() -> None:
            exchange.close()
            self.metrics.count(job.endpoint, exchange.outcome)

        if job.stream:
            return EventStream(events(exchange, job.answer, job.choices), done)
        try:
            return await whole(exchange, job.answer, job.choices)
        finally:
            done()

    def _loaded(self, served: Served) -> None:
        if self.state == "draining":
            served.runner.close()
            return
        self._served, self.state = served, "ready"
        self._on_ready(served)

    def _stats(self) -> Stats | None:
        return None if self._served is None else self._served.runner.stats()
