"""The thread that runs the embedded engine, and what other threads may ask of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch

from octavo.engines.torch.batch import Model
from octavo.engines.torch.request import Output, Request
from octavo.engines.torch.scheduler import Scheduler, SequenceState
from octavo.errors import OctavoError

OnOutput = Callable[[Output | Exception], None]


class QueueFullError(OctavoError):
    """As many requests wait as may."""


class DrainingError(OctavoError):
    """No more requests are taken."""


class Stats(NamedTuple):
    """What the engine has, and what it has done since it started.

    Attributes:
        running: sequences that are in the cache.
        waiting: requests in the line.
        blocks_total: blocks of the cache.
        blocks_used: those of running sequences.
        blocks_cached: those kept for prefixes to come.
        prefix_hit_tokens: tokens found in the cache instead of computed.
        prompt_tokens: of the requests that have come to generate.
        generated_tokens: new tokens.
        preemptions: sequences that had to leave the cache for a while.
        finished: requests that ended, but for those cancelled.
        cancelled: those.
        steps: batches computed.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    finished: int
    cancelled: int
    steps: int


class Ticket:
    """A request that was accepted; only the runner looks inside."""

    def __init__(self, sequence: SequenceState, on_output: OnOutput) -> None:
        self.sequence = sequence
        self.on_output = on_output
        # Held while on_output runs, which may itself cancel.
        self.lock = threading.RLock()
        self.ended = False


class Runner:
    """A scheduler in a thread of its own, which steps while there is work and sleeps otherwise."""

    def __init__(
        self,
        model: Model,
        *,
        blocks: int,
        max_running: int = 64,
        max_tokens: int = 512,
        max_waiting: int = 1024,
    ) -> None:
        """
        Args:
            model: computes; the runner closes it.
            blocks: see :class:`~octavo.engines.torch.scheduler.Scheduler`, like the next two.
            max_running: sequences.
            max_tokens: of a batch.
            max_waiting: requests in the line, at most.

        Raises:
            OctavoError: The numbers contradict each other.
        """
        self._model = model
        self._scheduler = Scheduler(
            model, blocks=blocks, max_running=max_running, max_tokens=max_tokens
        )
        self._max_waiting = max_waiting
        # Guards all that follows; told of every change that somebody may wait for.
        self._changed = threading.Condition()
        self._tickets: dict[SequenceState, Ticket] = {}
        self._cancelled: list[Ticket] = []
        self._draining = False
        self._closing = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-runner", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_output: OnOutput) -> Ticket:
        """Ask for a continuation; from any thread.

        Args:
            request: what to continue.
            on_output: called from the runner's thread with every new token. One that has ``finish`` set is the last,
                and so is an exception. It must be quick and wait for nothing; if it raises, its request is
                cancelled.

        Raises:
            QueueFullError: Too many wait already.
            DrainingError: No more requests are taken.
            OctavoError: The request can never be served.
        """
        with self._changed:
            if self._failure is not None:
                raise DrainingError(
                    f"the engine has failed ({self._failure!r}), and takes no more requests. Start it again."
                )
            if self._draining:
                raise DrainingError(
                    "the engine takes no more requests: it is shutting down. Ask another one."
                )
            if not self._has_room():
                raise QueueFullError(
                    f"{self._max_waiting} requests are waiting, which is as many as may. "
                    "Ask again later."
                )
            ticket = Ticket(self._scheduler.add(request), on_output)
            self._tickets[ticket.sequence] = ticket
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request; from any thread, also one that has ended. ``on_output`` is not called any more."""
        with ticket.lock:
            if ticket.ended:
                return
            ticket.ended = True
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    def generate(self, requests: Sequence[Request]) -> list[list[Output]]:
        """Continue as many requests as wanted, and wait for them.

        Raises:
            OctavoError: One can never be served, or the engine shuts down.
            Exception: What the model raised.
        """
        outputs: list[list[Output]] = [[] for _ in requests]
        ended: SimpleQueue[Exception | None] = SimpleQueue()

        def collect(to: list[Output], output: Output | Exception) -> None:
            if isinstance(output, Exception):
                ended.put(output)
                return
            to.append(output)
            if output.finish is not None:
                ended.put(None)

        tickets: list[Ticket] = []
        try:
            for request, to in zip(requests, outputs, strict=True):
                with self._changed:
                    self._changed.wait_for(lambda: self._has_room() or self._draining)
                    tickets.append(self.submit(request, partial(collect, to)))
            for _ in requests:
                error = ended.get()
                if error is not None:
                    raise error
        finally:
            for ticket in tickets:
                self.cancel(ticket)
        return outputs

    def drain(self, timeout: float | None) -> bool:
        """Take no more requests, and wait for those that were taken.

        Args:
            timeout: seconds to wait, at most.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._tickets, timeout)

    def close(self) -> None:
        """End now: requests on their way end with an exception, then the thread and the model."""
        with self._changed:
            if self._closing:
                return
            self._draining = self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._model.close()

    @property
    def failure(self) -> Exception | None:
        """What ended the thread, if it did not end by being closed: nothing more will come of the engine."""
        return self._failure

    def stats(self) -> Stats:
        """Counts as they are, from any thread; during a step they may be of different moments."""
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        return Stats(
            len(scheduler.running),
            len(scheduler.waiting),
            blocks.total,
            blocks.used,
            blocks.cached,
            scheduler.prefix_hit_tokens,
            scheduler.prompt_tokens,
            scheduler.generated_tokens,
            scheduler.preemptions,
            scheduler.finished,
            scheduler.cancelled,
            scheduler.steps,
        )

    def _has_room(self) -> bool:
        return len(self._scheduler.waiting) < self._max_waiting

    def _run(self) -> None:
        """The thread: whatever ends it, nobody is left waiting."""
        error: Exception = OctavoError(
            "the engine was shut down before the request was finished. Ask another one."
        )
        try:
            self._serve()
        except Exception as failure:
            error = self._failure = failure
            raise
        finally:
            with self._changed:
                self._draining = True
                tickets = list(self._tickets.values())
                self._changed.notify_all()
            for ticket in tickets:
                self._scheduler.cancel(ticket.sequence)
                self._tell(ticket, error)

    def _serve(self) -> None:
        # Threads of PyTorch's own would spin beside those that the model computes in.
        torch.set_num_threads(1)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._cancelled or self._scheduler.busy
                )
                if self._closing:
                    return
                for ticket in self._cancelled:
                    self._scheduler.cancel(ticket.sequence)
                    self._tickets.pop(ticket.sequence, None)
                self._cancelled.clear()
            results = self._scheduler.step()
            with self._changed:
                told = [(self._tickets[sequence], output) for sequence, output in results]
                # Of the line's length, and of those that were cancelled.
                self._changed.notify_all()
            for ticket, output in told:
                self._tell(ticket, output)

    def _tell(self, ticket: Ticket, output: Output | Exception) -> None:
        ended = isinstance(output, Exception) or output.finish is not None
        with ticket.lock:
            if not ticket.ended:
                ticket.ended = ended
                try:
                    ticket.on_output(output)
                except Exception:
                    self.cancel(ticket)
        if ended:
            with self._changed:
                self._tickets.pop(ticket.sequence, None)
                self._changed.notify_all()
