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


class _Progress:
    """A bar on a terminal, a line every few seconds elsewhere; a context manager."""

    def __init__(self, *, unit: str, quiet: bool) -> None:
        self._quiet = quiet
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            console=stderr,
            disable=quiet or not stderr.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("loading", total=0, unit=unit, rate="")
        self._begin: float | None = None
        self._first = self._latest = 0
        self._last_line, self._last_done = time.monotonic(), -1

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

    def _seconds_each(self, done: int) -> float | None:
        """Seconds for each step since the first call, or since steps began anew; None on that call."""
        now = time.monotonic()
        again, self._latest = done < self._latest, done
        if self._begin is None or again:
            # The first steps' time is only known from the second call on.
            self._begin, self._first = now, done
        steps = done - self._first
        return max(now - self._begin, 1e-9) / steps if steps else None

    def _show(self, description: str, done: int, total: int, unit: str, rate: str) -> None:
        self._bar.update(
            self._task,
            description=description,
            completed=done,
            total=total,
            unit=unit,
            rate=rate,
        )
        now = time.monotonic()
        due = now - self._last_line >= _LINE_SECONDS or done == total
        if not self._quiet and not stderr.is_terminal and due and done != self._last_done:
            self._last_line, self._last_done = now, done
            print(f"{unit} {done:,}/{total:,}  {rate}", file=sys.stderr, flush=True)


class LayerProgress(_Progress):
    """Progress over decoder layers; :meth:`update` takes each step."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(unit="layers", quiet=quiet)

    def update(self, done: int, total: int, tokens: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` layers are finished, ``tokens`` tokens through each, and
        ``detail``."""
        each, rate = self._seconds_each(done), ""
        if each is not None:
            speed = f"{tokens / (each * total):,.0f} tokens/s, " if tokens else ""
            rate = f"{speed}{1 / each:.1f} layers/s, {each * (total - done):.0f} s left"
        self._show("quantizing", done, total, "layers", f"{rate}  {detail}" if detail else rate)

    def update_measured(self, done: int, total: int, unit: str) -> None:
        """Show that ``done`` of ``total`` ``unit`` are measured, between two runs over the layers."""
        self._show("measuring", done, total, unit, "")


class CountProgress(_Progress):
    """Progress over tokens, questions, requests or bytes; :meth:`update` takes each step."""

    def __init__(self, doing: str = "evaluating", *, quiet: bool) -> None:
        super().__init__(unit="", quiet=quiet)
        self._doing = doing

    def update(self, done: int, total: int, unit: str) -> None:
        """Show that ``done`` of ``total`` ``unit`` are finished."""
        each, rate = self._seconds_each(done), ""
        if each is not None:
            rate = f"{1 / each:,.1f} {unit}/s, {each * (total - done):.0f} s left"
        self._show(self._doing, done, total, unit, rate)


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


def estimate(value: float, error: float | None, unit: str = "", digits: int = 3) -> str:
    """``19.283 ± 0.514``: a number with its standard error, where one is known."""
    after = f" {unit}" if unit else ""
    if error is None:
        return f"{value:.{digits}f}{after}"
    return f"{value:.{digits}f} ± {error:.{digits}f}{after}"
