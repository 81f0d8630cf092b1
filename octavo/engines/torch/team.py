"""Threads that compute one thing together: each runs the same function on its share.

A function is called with the thread's number. Inside, threads wait for each other at a barrier that spins, so that
a step of a few milliseconds can have hundreds of them. PyTorch's own threads stay out of it: each thread of the team
gives it one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from octavo.engines.torch.vectors import break_barrier, new_barrier, wait

Share = Callable[[int], None]


class Team:
    """Threads; the one that calls :meth:`run` is the first.

    Attributes:
        size: how many there are.
        barrier: theirs, for compiled code.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = new_barrier()
        self._work: list[SimpleQueue[Share | None]] = [SimpleQueue() for _ in range(size - 1)]
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, args=(number, work), daemon=True)
            for number, work in enumerate(self._work, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function: Share) -> None:
        """Have every thread call ``function`` with its number, from 0.

        Raises:
            BaseException: what one of them raised; the others were let through their barriers.
        """
        for work in self._work:
            work.put(function)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        failures = [self._call(function, 0), *(self._done.get() for _ in self._work)]
        torch.set_num_threads(before)
        for failure in failures:
            if failure is not None:
                self.barrier[:] = 0
                raise failure

    def wait(self) -> None:
        """Wait until all threads are here."""
        wait(self.barrier, self.size)

    def close(self) -> None:
        """End the threads."""
        for work in self._work:
            work.put(None)
        for thread in self._threads:
            thread.join()

    def _call(self, function: Share, number: int) -> BaseException | None:
        try:
            with torch.inference_mode():
                function(number)
        except BaseException as error:  # whatever it is, the others must not wait for this one
            break_barrier(self.barrier)
            return error
        return None

    def _serve(self, number: int, work: SimpleQueue[Share | None]) -> None:
        torch.set_num_threads(1)
        while (function := work.get()) is not None:
            self._done.put(self._call(function, number))
