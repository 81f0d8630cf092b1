"""Checks of weights: do the codes use their range, are there numbers that are none?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from octavo.canonical import fused_groups
from octavo.inspection import codes
from octavo.inspection.findings import Check, Fault, Severity
from octavo.inspection.survey import Survey
from octavo.scheme import BLOCK

_HALF = codes.VALUES[codes.HALF_RANGE]


def _nan(survey: Survey) -> Iterator[Fault]:
    for module, found in survey.codes.items():
        if count := codes.nan_count(found.counts):
            yield Fault(f"{module}.weight", f"{count:,} of {found.total:,} codes are NaN")


def _not_finite(survey: Survey) -> Iterator[Fault]:
    for name, amax in survey.amax.items():
        if not math.isfinite(amax):
            yield Fault(name, "NaN" if math.isnan(amax) else "infinity")


def _zero(survey: Survey) -> Iterator[Fault]:
    for module, found in survey.codes.items():
        if found.total and codes.zero_count(found.counts) == found.total:
            yield Fault(f"{module}.weight", "zeros only")
    for name, amax in survey.amax.items():
        if amax == 0 and len(survey.tensors[name].shape) == 2:
            yield Fault(name, "zeros only")


def _narrow(survey: Survey) -> Iterator[Fault]:
    partners = _partners(survey)
    for module, found in survey.codes.items():
        if not found.narrow or found.granularity is None:
            continue
        if found.tiles > 1:
            which = f"{found.narrow} of {found.tiles} {found.granularity}s stay below {_HALF:g}"
            yield Fault(f"{module}.weight", which)
        elif max(survey.codes[one].largest for one in partners.get(module, [module])) < _HALF:
            yield Fault(f"{module}.weight", f"nothing beyond {found.largest:g}")


def _partners(survey: Survey) -> dict[str, list[str]]:
    """For each module the layers it shares one weight scale with, itself among them: there only the
    largest of them uses the range."""
    found: dict[str, list[str]] = {}
    for members in fused_groups(one for one in survey.outline.linears if one in survey.codes):
        for module in members:
            scales = survey.scales.get(f"{module}.weight_scale")
            found[module] = [
                one
                for one in members
                if one == module or (scales and survey.scales.get(f"{one}.weight_scale") == scales)
            ]
    return found


def _partial_blocks(survey: Survey) -> Iterator[Fault]:
    for module, found in survey.codes.items():
        rows, *columns = survey.tensors[f"{module}.weight"].shape
        if found.granularity == "block" and any(size % BLOCK for size in (rows, *columns)):
            yield Fault(f"{module}.weight", f"shape {[rows, *columns]}")


CHECKS: tuple[Check[Survey], ...] = (
    Check(
        "nan-codes",
        Severity.error,
        _nan,
        "E4M3 codes other than 0x7F and 0xFF.",
        "One NaN makes every output of the layer NaN. The input held NaN or infinity, or the cast did not clamp "
        "to 448: quantize the original checkpoint again.",
    ),
    Check(
        "not-finite",
        Severity.error,
        _not_finite,
        "Finite numbers.",
        "The checkpoint is damaged or its training diverged: get an intact copy.",
    ),
    Check(
        "weight-zero",
        Severity.warning,
        _zero,
        "Some number other than zero.",
        "The file may be an incomplete copy, reserved but never filled: compare its checksum with the source.",
    ),
    Check(
        "codes-narrow",
        Severity.warning,
        _narrow,
        f"Codes that reach {_HALF:g} of 448 or more, wherever a scale is for.",
        "The scale is more than twice too large, and small weights round to zero: it was not taken from this "
        "weight's amax. Quantize the original checkpoint again.",
    ),
    Check(
        "blocks-partial",
        Severity.warning,
        _partial_blocks,
        f"Rows and columns in multiples of {BLOCK}.",
        "Where vLLM fuses such layers it reads their scales wrong without a word, or refuses them. Exclude them, or "
        "choose the scheme fp8-dynamic.",
    ),
)
