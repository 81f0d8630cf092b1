"""The survey as tables: bytes by dtype, linear layers, decoder layers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from octavo.edition import Edition
from octavo.fp8 import E4M3_MAX
from octavo.inspection import codes
from octavo.inspection.survey import SCALES, Scales, Survey
from octavo.scheme import Granularity

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """What the tensors take.

    Attributes:
        bytes: of all stored tensors.
        bytes_by_dtype: likewise, by dtype.
        parameters: elements of the model, without scales and without copies for several ranks.
        bytes_per_parameter: bytes, scales and copies included, for each of them.
    """

    bytes: int
    bytes_by_dtype: dict[str, int]
    parameters: int
    bytes_per_parameter: float


@dataclass(frozen=True)
class Range:
    """The smallest and the largest of some positive, finite numbers."""

    low: float
    high: float


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        module: its name.
        dtype: of its weight.
        shape: ``(out, in)``.
        granularity: what a weight scale is for; None without FP8 or without usable scales.
        weight_scale: over all of them.
        input_scale: None where inputs are dynamic, or not quantized.
        used: share of E4M3's range, 0 to 448, that the codes reach; None without FP8.
        zeros: share of zeros among the codes; None without FP8.
        subnormals: share of codes that are not zero and less precise than others.
        amax: largest magnitude of the weight; None where scales make it unknown, or it is not finite.
    """

    module: str
    dtype: str
    shape: tuple[int, ...]
    granularity: Granularity | None
    weight_scale: Range | None
    input_scale: Range | None
    used: float | None
    zeros: float | None
    subnormals: float | None
    amax: float | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer, or what lies outside them.

    Attributes:
        number: of the decoder layer; None outside.
        dtypes: how many linear layers have weights of each dtype.
        weight_scale: over all weight scales.
        input_scale: over all input scales.
        k_scale: for keys in the cache.
        v_scale: for values.
        used: the least share of E4M3's range that a weight's codes reach.
        zeros: share of zeros among all codes.
        amax: largest magnitude of any weight that has one.
    """

    number: int | None
    dtypes: dict[str, int]
    weight_scale: Range | None
    input_scale: Range | None
    k_scale: Range | None
    v_scale: Range | None
    used: float | None
    zeros: float | None
    amax: float | None


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def measure_sizes(edition: Edition) -> Sizes:
    """The bytes of ``edition``, by dtype."""
    by_dtype: Counter[str] = Counter()
    for name in edition.checkpoint:
        by_dtype[dtype_name(edition.checkpoint[name].dtype)] += edition.checkpoint[name].nbytes
    parameters = sum(
        math.prod(edition[name].shape) for name in edition if not name.endswith(SCALES)
    )
    return Sizes(
        bytes=edition.nbytes,
        bytes_by_dtype=dict(by_dtype.most_common()),
        parameters=parameters,
        bytes_per_parameter=edition.nbytes / max(parameters, 1),
    )


def describe_linears(survey: Survey) -> tuple[Linear, ...]:
    """Every linear layer that is there, in the model's order."""
    modules = (*survey.outline.linears, *survey.outline.outer_linears)
    return tuple(
        _linear(survey, module) for module in modules if f"{module}.weight" in survey.tensors
    )


def _linear(survey: Survey, module: str) -> Linear:
    info = survey.tensors[f"{module}.weight"]
    found = survey.codes.get(module)
    amax = found.amax if found else survey.amax.get(f"{module}.weight")
    return Linear(
        module=module,
        dtype=dtype_name(info.dtype),
        shape=info.shape,
        granularity=found.granularity if found else None,
        weight_scale=_range([survey.scales.get(f"{module}.weight_scale")]),
        input_scale=_range([survey.scales.get(f"{module}.input_scale")]),
        used=found.largest / E4M3_MAX if found else None,
        zeros=_share(codes.zero_count(found.counts), found.total) if found else None,
        subnormals=_share(codes.subnormal_count(found.counts), found.total) if found else None,
        amax=amax if amax is not None and math.isfinite(amax) else None,
    )


def describe_layers(survey: Survey, linears: Iterable[Linear]) -> tuple[Layer, ...]:
    """Each decoder layer, and last the linear layers outside."""
    members: dict[int | None, list[Linear]] = {}
    for linear in linears:
        members.setdefault(_number(linear.module), []).append(linear)
    return tuple(_layer(survey, number, ones) for number, ones in members.items())


def _layer(survey: Survey, number: int | None, linears: list[Linear]) -> Layer:
    def cache(kind: str) -> Range | None:
        blocks = [block for block in survey.outline.attention if _number(block) == number]
        return _range([survey.scales.get(f"{block}.{kind}") for block in blocks])

    zeros = [(one.zeros, math.prod(one.shape)) for one in linears if one.zeros is not None]
    return Layer(
        number=number,
        dtypes=dict(Counter(one.dtype for one in linears).most_common()),
        weight_scale=_hull([one.weight_scale for one in linears]),
        input_scale=_hull([one.input_scale for one in linears]),
        k_scale=cache("k_scale"),
        v_scale=cache("v_scale"),
        used=min((one.used for one in linears if one.used is not None), default=None),
        zeros=sum(share * count for share, count in zeros) / sum(count for _, count in zeros)
        if zeros
        else None,
        amax=max((one.amax for one in linears if one.amax is not None), default=None),
    )


def _number(module: str) -> int | None:
    match = _LAYER.match(f"{module}.")
    return int(match[1]) if match else None


def _range(scales: Iterable[Scales | None]) -> Range | None:
    return _hull([Range(s.low, s.high) for s in scales if s and s.low and s.high])


def _hull(ranges: Iterable[Range | None]) -> Range | None:
    found = [one for one in ranges if one]
    if not found:
        return None
    return Range(min(one.low for one in found), max(one.high for one in found))


def _share(part: int, whole: int) -> float:
    return part / max(whole, 1)
