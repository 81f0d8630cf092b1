"""One tensor laid open: where it is, what scales it, how its numbers are spread."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.fp8 import E4M3, E4M3_MAX
from octavo.inspection import codes
from octavo.inspection.overview import open_edition
from octavo.inspection.strips import strips
from octavo.inspection.survey import SCALES, scale_values, tally_weight
from octavo.inspection.tables import Range, dtype_name
from octavo.scheme import Granularity
from octavo.skeleton import FLOATS

# Binades shown of an unquantized tensor, from its largest number down.
_BINADES = 24
# Makes the exponents of float32 indices.
_BIAS = 256


@dataclass(frozen=True)
class Scaling:
    """A scale that belongs to a tensor, or is the tensor itself.

    Attributes:
        name: of the scale.
        values: how many there are.
        range: of those that are positive and finite; None if none is.
        invalid: how many are not.
    """

    name: str
    values: int
    range: Range | None
    invalid: int


@dataclass(frozen=True)
class Quantization:
    """How a weight uses its E4M3 codes.

    Attributes:
        granularity: what a scale is for; None without usable scales.
        tiles: parts with a scale of their own.
        narrow: those that use less than half the range.
        used: share of the range, 0 to 448, that the codes reach.
        saturated: codes of ±448.
        subnormal: codes below 2^-6 other than zero, less precise than others.
        nan: codes that are NaN.
        expected_sqnr_db: what rounding should have cost, see :func:`octavo.inspection.codes.expected_sqnr`.
        counts: how often each of the 256 codes occurs.
    """

    granularity: Granularity | None
    tiles: int
    narrow: int
    used: float
    saturated: int
    subnormal: int
    nan: int
    expected_sqnr_db: float | None
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Bin:
    """Numbers of one magnitude: ``2^-3`` counts those from 2^-3 to 2^-2."""

    label: str
    count: int


@dataclass(frozen=True)
class TensorReport:
    """What is known of one tensor.

    Attributes:
        name: canonical.
        stored: the names it is stored under, in this dialect.
        files: the shards it lies in.
        dtype: as stored.
        shape: canonical.
        bytes: of its elements.
        amax: largest magnitude, scale included; None if it is not finite, or not known.
        zeros: elements that are zero.
        scales: that belong to it.
        quantization: None unless it is an FP8 weight.
        histogram: magnitudes; of codes for an FP8 weight, without the scale.
    """

    name: str
    stored: tuple[str, ...]
    files: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    amax: float | None
    zeros: int
    scales: tuple[Scaling, ...]
    quantization: Quantization | None
    histogram: tuple[Bin, ...]


def inspect_tensor(
    model: str | Path, tensor: str, *, config: str | Path | None = None
) -> TensorReport:
    """Look at one tensor of a checkpoint.

    Args:
        model: a directory, or a hub id.
        tensor: its canonical name, or the one it is stored under.
        config: as for :func:`octavo.inspect`.

    Raises:
        OctavoError: not a checkpoint, no such tensor, or a stored one that holds several canonical ones.
    """
    with open_edition(model, config) as edition:
        return _report(edition, _canonical(edition, tensor))


def _canonical(edition: Edition, name: str) -> str:
    if name in edition:
        return name
    found = [one for one in edition if any(p.name == name for p in edition.stored(one).pieces)]
    if len(found) == 1:
        return found[0]
    if found:
        raise OctavoError(
            f"The tensor {name!r} of {edition.directory} holds (parts of) {', '.join(found)}. "
            "Name one of these."
        )
    known = list(dict.fromkeys([*edition, *edition.checkpoint]))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    raise OctavoError(
        f"{edition.directory} has no tensor {name!r}. Similar names: {', '.join(close)}."
    )


def _report(edition: Edition, name: str) -> TensorReport:
    info, pieces = edition[name], edition.stored(name).pieces
    stored = tuple(dict.fromkeys(piece.name for piece in pieces))
    files = (edition.checkpoint.file_of(one).name for one in stored)
    module = name.removesuffix(".weight")
    quantized = name.endswith(".weight") and info.dtype == E4M3
    found = tally_weight(edition, module) if quantized else None
    if found is not None:
        zeros, amax, bins = codes.zero_count(found.counts), found.amax, _code_bins(found.counts)
    else:
        zeros, amax, bins = _spread(edition, name)
    return TensorReport(
        name=name,
        stored=stored,
        files=tuple(dict.fromkeys(files)),
        dtype=dtype_name(info.dtype),
        shape=info.shape,
        bytes=info.nbytes,
        amax=amax,
        zeros=zeros,
        scales=_scales(edition, name, module if quantized else None),
        quantization=None
        if found is None
        else Quantization(
            granularity=found.granularity,
            tiles=found.tiles,
            narrow=found.narrow,
            used=found.largest / E4M3_MAX,
            saturated=codes.saturated_count(found.counts),
            subnormal=codes.subnormal_count(found.counts),
            nan=codes.nan_count(found.counts),
            expected_sqnr_db=codes.expected_sqnr(found.counts),
            counts=found.counts,
        ),
        histogram=tuple(bins),
    )


def _scales(edition: Edition, name: str, module: str | None) -> tuple[Scaling, ...]:
    names = [name] if name.endswith(SCALES) else []
    if module is not None:
        names = [f"{module}.weight_scale", f"{module}.input_scale"]
    found = {one: scale_values(edition, one) for one in names if one in edition}
    return tuple(
        Scaling(
            name=one,
            values=scale.count,
            range=None if scale.low is None or scale.high is None else Range(scale.low, scale.high),
            invalid=scale.invalid,
        )
        for one, scale in found.items()
    )


def _code_bins(counts: tuple[int, ...]) -> list[Bin]:
    normal = [Bin(f"2^{exponent}", count) for exponent, count in codes.by_exponent(counts)]
    return [
        Bin("NaN", codes.nan_count(counts)),
        *reversed(normal),
        Bin("subnormal", codes.subnormal_count(counts)),
        Bin("zero", codes.zero_count(counts)),
    ]


def _spread(edition: Edition, name: str) -> tuple[int, float | None, list[Bin]]:
    """Zeros, amax and histogram of an unquantized tensor; nothing of what is not floating."""
    if edition[name].dtype not in FLOATS:
        return 0, None, []
    exponents: Counter[int] = Counter()
    zeros, broken, amax = 0, 0, 0.0
    for _, strip in strips(edition, name):
        values = strip.float().reshape(-1)
        finite = values[values.isfinite()]
        # To frexp, 1 is 0.5 · 2^1.
        counts = torch.bincount(torch.frexp(finite[finite != 0]).exponent - 1 + _BIAS)
        exponents.update({i - _BIAS: n for i, n in enumerate(counts.tolist()) if n})
        zeros += int((finite == 0).sum())
        broken += values.numel() - finite.numel()
        amax = max(amax, finite.abs().max().item() if finite.numel() else 0.0)
    top = max(exponents, default=0)
    shown = range(top, max(min(exponents, default=0), top - _BINADES + 1) - 1, -1)
    bins = [Bin("not finite", broken)]
    bins += [Bin(f"2^{exponent}", exponents[exponent]) for exponent in shown if exponents]
    smaller = sum(count for exponent, count in exponents.items() if exponent not in shown)
    bins += [Bin("smaller", smaller), Bin("zero", zeros)]
    return zeros, amax if not broken and math.isfinite(amax) else None, bins
