"""Numbers as the report prints them: with a sign, a unit, a standard error."""

from __future__ import annotations

import math

from octavo.reporting.results import Estimate


def number(value: float, digits: int = 3) -> str:
    """``1,234`` or ``0.0123``: ``digits`` significant digits, never in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _minus(f"{value:,.{decimals}f}")


def plus_minus(
    estimate: Estimate,
    *,
    scale: float = 1,
    decimals: int = 0,
    signed: bool = False,
    unit: str = "",
) -> str:
    """``+0.31 ± 0.05 %``: the standard error, if known, to two significant digits, the value to as
    many decimals.

    Args:
        estimate: what to print.
        scale: both numbers are multiplied by it: 100 turns a share into percent.
        decimals: at least so many.
        signed: print a plus sign too.
        unit: follows the numbers.
    """
    error = (estimate.standard_error or 0) * scale
    if error:
        decimals = max(decimals, 1 - math.floor(math.log10(error)))
    sign = "+" if signed else ""
    value = _minus(f"{estimate.value * scale:{sign},.{decimals}f}")
    known = "" if estimate.standard_error is None else f" ± {error:,.{decimals}f}"
    return f"{value}{known}{unit and ' ' + unit}"


def percent_change(before: float, after: float, *, decimals: int = 1) -> str:
    """``−39.5 %``."""
    return f"{_minus(f'{100 * (after / before - 1):+.{decimals}f}')} %"


def _minus(text: str) -> str:
    # The true minus sign: a hyphen before a number is easily lost, or taken for a dash.
    return text.replace("-", "−")
