"""What a run looks like on screen: progress on stderr, results on stdout.

A terminal gets a progress bar; anything else gets a plain line every few seconds.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from octavo.units import format_bytes

stdout = Console()
stderr = Console(stderr=True)

_LINE_SECONDS = 5.0


class LayerProgress:
    """Progress over decoder layers; a context manager whose :meth:`update` takes each step."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} layers"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=stderr,
            disable=quiet or not stderr.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("loading", total=0, rate="")
        self._begin: float | None = None
        self._first = 0
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, tokens: int) -> None:
        """Show that ``done`` of ``total`` layers are finished, ``tokens`` tokens through each."""
        now = time.monotonic()
        if self._begin is None:
            # The first layers' time is only known from the second call on.
            self._begin, self._first = now, done
        rate = self._rate(done, total, tokens, now)
        self._bar.update(
            self._task, description="quantizing", completed=done, total=total, rate=rate
        )
        due = now - self._last_line >= _LINE_SECONDS or done == total
        if not self._quiet and not stderr.is_terminal and due:
            self._last_line = now
            print(f"layer {done}/{total}  {rate}", file=sys.stderr, flush=True)

    def _rate(self, done: int, total: int, tokens: int, now: float) -> str:
        if self._begin is None or done == self._first:
            return ""
        per_layer = max(now - self._begin, 1e-9) / (done - self._first)
        speed = f"{tokens / (per_layer * total):,.0f} tokens/s, " if tokens else ""
        return f"{speed}{1 / per_layer:.1f} layers/s, {per_layer * (total - done):.0f} s left"


def results_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """A two-column table."""
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def size_change(before: int, after: int) -> str:
    """``269.0 MB → 162.9 MB (60.5 %)``."""
    return f"{format_bytes(before)} → {format_bytes(after)} ({after / before:.1%})"
