"""How far an evaluation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias


class Progress(NamedTuple):
    """``done`` of ``total``, counted in ``unit``: ``tokens``, ``questions`` or ``requests``."""

    done: int
    total: int
    unit: str


OnProgress: TypeAlias = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Show nothing."""
