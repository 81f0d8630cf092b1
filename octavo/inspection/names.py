"""Many places in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from octavo.inspection.findings import Fault

_NUMBER = re.compile(r"\.(\d+)\.")

# Lines for one finding.
_LINES = 4


def fold(names: Iterable[str]) -> list[str]:
    """Names that differ in their layer's number as one: ``model.layers.{0-29}.mlp.down_proj``."""
    found: dict[tuple[str, str], list[int]] = {}
    plain: dict[str, None] = {}
    for name in names:
        if match := _NUMBER.search(name):
            around = name[: match.start(1)], name[match.end(1) :]
            found.setdefault(around, []).append(int(match[1]))
        else:
            plain[name] = None
    folded = [f"{before}{_ranges(found[before, after])}{after}" for before, after in found]
    return [*plain, *folded]


def tell(faults: Sequence[Fault]) -> list[str]:
    """A few lines about ``faults``: what was found, and where."""
    by_found: dict[str, list[str]] = {}
    for fault in faults:
        by_found.setdefault(fault.found, []).append(fault.place)
    lines = [f"{place}: {found}" for found, places in by_found.items() for place in fold(places)]
    rest = len(lines) - _LINES
    return lines if rest <= 1 else [*lines[:_LINES], f"… and {rest} more lines like these"]


def _ranges(numbers: list[int]) -> str:
    """``{0-3,7}``; a single number stays as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
