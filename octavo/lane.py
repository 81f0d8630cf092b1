"""The way to the disk that layers of a run take: written, synced, journaled, while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Self


class Lane:
    """One thread that writes, and one that waits until what was written is on the disk and journals it, each in the
    order it is asked to. After a failure neither does anything more, lest something be journaled that rests on what
    failed; whoever waits next is told.

    A context manager: it holds the threads.

    Attributes:
        calibrated: when the last calibrated pass is journaled.
    """

    def __init__(self) -> None:
        with ExitStack() as threads:
            self._writes = threads.enter_context(ThreadPoolExecutor(1, "octavo-write"))
            self._syncs = threads.enter_context(ThreadPoolExecutor(1, "octavo-sync"))
            self._threads = threads.pop_all()
        self._waiting: deque[Future[None]] = deque()
        self._failure: BaseException | None = None
        self._written = self._settled = self._finished = self.calibrated = _done()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._threads.close()

    def write(self, task: Callable[[], None]) -> None:
        """Have something written."""
        self._written = self._writes.submit(self._run, task)
        self._waiting.append(self._written)

    def settle(self, task: Callable[[], None]) -> Future[None]:
        """Have something done when all that was asked to be written before is written."""
        written = self._written

        def when_written() -> None:
            written.result()
            task()

        self._settled = self._syncs.submit(self._run, when_written)
        return self._settled

    def finish(self, task: Callable[[], None]) -> None:
        """Have a layer settled, when the one before it is: no more than one is ever lost."""
        self._finished.result()
        self._finished = self.settle(task)

    def wait_below(self, count: int) -> None:
        """Wait until fewer than ``count`` things are left to write."""
        while len(self._waiting) >= count:
            self._waiting.popleft().result()

    def drain(self) -> None:
        """Wait for all."""
        self.wait_below(1)
        self._settled.result()

    def _run(self, task: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            task()
        except BaseException as error:
            self._failure = error
            raise


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
