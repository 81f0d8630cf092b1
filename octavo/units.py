"""Sizes as people write them."""

from __future__ import annotations

import re

from octavo.errors import OctavoError

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """Bytes in ``5GB``, ``1.5 GiB`` or ``4096``.

    Raises:
        OctavoError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or not 1 <= float(match[1]) * factor < 2**63:
        raise OctavoError(
            f"{text!r} is not a size. Expected a number and a unit, such as 5GB or 500MiB."
        )
    return int(float(match[1]) * factor)


def format_bytes(count: float) -> str:
    """``269.0 MB``: a count of bytes in decimal units."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``: a duration as precise as an estimate deserves."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
