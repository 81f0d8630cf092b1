"""Wall-clock time by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds under names: ``with clock("read"): …``."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self._stages[stage] = self._stages.get(stage, 0.0) + spent

    def seconds(self) -> dict[str, float]:
        """Seconds by stage in the order they were first entered, and ``total`` since creation."""
        return {**self._stages, "total": time.perf_counter() - self._start}
