"""From the engine's thread to the event loop.

The engine says something for every sequence after each step, and waking the loop costs more than what it
is woken for: it is woken once, for everything that has been said by the time it comes to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Relay(Generic[T]):
    """Calls functions in the event loop, in the order in which another thread asks for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[Callable[[T], None], T]] = deque()
        self._called = False

    def put(self, take: Callable[[T], None], what: T) -> None:
        """Have ``take(what)`` called in the loop; from any thread."""
        self._waiting.append((take, what))
        # Appended first: a delivery that does not see this call is one that will be called.
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._waiting:
            take, what = self._waiting.popleft()
            take(what)
