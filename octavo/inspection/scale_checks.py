"""Checks of scales: are they there, were they calibrated, can they be right?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from octavo.canonical import fused_groups
from octavo.inspection.findings import Check, Fault, Severity
from octavo.inspection.survey import SCALES, Survey
from octavo.scheme import Inputs

_INPUT = ".input_scale"
_KV = (".k_scale", ".v_scale")

# An amax of exactly 448 gives a scale of exactly 1, and in BF16 one amax in a hundred between 256 and
# 512 is 448. More than this share of a model's input scales are no chance.
_CHANCE = 0.05

# Keys and values reach from about 0.1 to a few hundred. Scales for amax below 0.055 or above 3584, or a
# hundred times off the median of the layers, are more likely amax, 1 / scale or those of another model.
_KV_LOW, _KV_HIGH = 2**-13, 8.0
_KV_FACTOR = 100.0


def _invalid(survey: Survey) -> Iterator[Fault]:
    for name, scales in survey.scales.items():
        if scales.invalid and scales.count == 1:
            yield Fault(name, f"a scale of {scales.worst}")
        elif scales.invalid:
            yield Fault(
                name, f"{scales.invalid} of {scales.count} scales, the first of them {scales.worst}"
            )


def _uncalibrated(survey: Survey) -> Iterator[Fault]:
    for module, codes in survey.codes.items():
        if codes.unscaled:
            which = "" if codes.tiles == 1 else f" for {codes.unscaled} of {codes.tiles} parts"
            yield Fault(f"{module}.weight_scale", f"exactly 1{which}, for codes other than zero")
    ones, by_chance = _input_ones(survey)
    if not by_chance:
        yield from ones


def _few_ones(survey: Survey) -> Iterator[Fault]:
    ones, by_chance = _input_ones(survey)
    if by_chance:
        yield from ones


def _input_ones(survey: Survey) -> tuple[list[Fault], bool]:
    """Input scales of exactly 1, and whether they are so few that it may be chance."""
    names = [name for name in survey.scales if name.endswith(_INPUT)]
    ones = [Fault(name, "exactly 1") for name in names if survey.scales[name].single == 1]
    return ones, len(ones) <= _CHANCE * len(names)


def _kv_uncalibrated(survey: Survey) -> Iterator[Fault]:
    for name, scales in survey.scales.items():
        if name.endswith(_KV) and scales.single == 1:
            yield Fault(name, "exactly 1")


def _weight_scales_missing(survey: Survey) -> Iterator[Fault]:
    for module in survey.quantized:
        if f"{module}.weight_scale" not in survey.scales:
            yield Fault(f"{module}.weight_scale", "an FP8 weight without scale")


def _input_scales_missing(survey: Survey) -> Iterator[Fault]:
    for module in _having(survey, "static"):
        if f"{module}.input_scale" not in survey.scales:
            yield Fault(f"{module}.input_scale", "no scale")


def _input_scales_unpromised(survey: Survey) -> Iterator[Fault]:
    for module in _having(survey, "dynamic"):
        if f"{module}.input_scale" in survey.scales:
            yield Fault(f"{module}.input_scale", "a scale, though inputs are dynamic")


def _having(survey: Survey, inputs: Inputs) -> list[str]:
    """The quantized modules whose inputs the config promises to be so."""
    scheme = survey.scheme
    if scheme is None:
        return []
    return [module for module in survey.quantized if scheme.inputs_of(module) == inputs]


def _kv_scales_missing(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is None or survey.scheme.kv_cache != "fp8":
        return
    for block in survey.outline.attention:
        for kind in _KV:
            if f"{block}{kind}" not in survey.scales:
                yield Fault(f"{block}{kind}", "no scale")


def _kv_scales_unpromised(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is None or survey.scheme.kv_cache == "fp8":
        return
    for name in survey.scales:
        if name.endswith(_KV):
            yield Fault(name, "a scale, though the config has no FP8 KV cache")


def _kv_scales_out_of_range(survey: Survey) -> Iterator[Fault]:
    for kind in _KV:
        found = {
            name: scales.single
            for name, scales in survey.scales.items()
            # Exactly 1 is another check's.
            if name.endswith(kind) and scales.single not in (None, 1.0)
        }
        values = [value for value in found.values() if value is not None]
        middle = statistics.median(values) if values else 0.0
        for name, value in found.items():
            assert value is not None
            if not _KV_LOW <= value <= _KV_HIGH or max(value / middle, middle / value) > _KV_FACTOR:
                yield Fault(name, f"{value:.3g}, which is for an amax of {value * 448:.3g}")


def _shared_inputs_differ(survey: Survey) -> Iterator[Fault]:
    for members in fused_groups(survey.outline.linears):
        found = [survey.scales.get(f"{module}.input_scale") for module in members]
        values = [scales.single for scales in found if scales is not None]
        if len(set(values)) > 1 and None not in values:
            parent = members[0].rpartition(".")[0]
            each = ", ".join(
                f"{module.rpartition('.')[2]} {scales.single:.4g}"
                for module, scales in zip(members, found, strict=True)
                if scales is not None
            )
            yield Fault(parent, f"input scales {each}")


def _shapes(survey: Survey) -> Iterator[Fault]:
    for module, codes in survey.codes.items():
        name = f"{module}.weight_scale"
        if name in survey.scales and codes.granularity is None:
            shapes = survey.tensors[name].shape, survey.tensors[f"{module}.weight"].shape
            yield Fault(name, "shape {} for a weight of {}".format(*map(list, shapes)))
    for name, scales in survey.scales.items():
        if name.endswith((_INPUT, *_KV)) and scales.count != 1:
            yield Fault(name, f"shape {list(survey.tensors[name].shape)}")


def _granularity(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is None:
        return
    promised = survey.scheme.weights
    for module, codes in survey.codes.items():
        if codes.granularity not in (None, promised):
            yield Fault(
                f"{module}.weight_scale",
                f"one per {codes.granularity}, promised one per {promised}",
            )


def _orphans(survey: Survey) -> Iterator[Fault]:
    for name in survey.scales:
        module, _, kind = name.rpartition(".")
        if kind in ("weight_scale", "input_scale") and module not in survey.codes:
            dtype = survey.tensors.get(f"{module}.weight")
            what = "no weight" if dtype is None else f"a weight of {dtype.dtype}"
            yield Fault(name, f"a scale beside {what}")


def _unknown(survey: Survey) -> Iterator[Fault]:
    for name in survey.tensors:
        if name in survey.outline.shapes:
            continue
        block, _, last = name.rpartition(".")
        misplaced = last in ("k_scale", "v_scale") and block not in survey.outline.attention
        if misplaced or ("scale" in last and not name.endswith(SCALES)):
            yield Fault(name, "a scale that this dialect does not know")


_AGAIN = "Quantize the original checkpoint again, with calibration data."

CHECKS: tuple[Check[Survey], ...] = (
    Check(
        "scale-invalid",
        Severity.error,
        _invalid,
        "Positive, finite scales.",
        f"Whatever is divided by them becomes zero, infinite or NaN. {_AGAIN}",
    ),
    Check(
        "scale-uncalibrated",
        Severity.error,
        _uncalibrated,
        "amax / 448. Exactly 1 is what tools and engines put where nothing was measured; only a weight of "
        "zeros has it rightly.",
        _AGAIN,
    ),
    Check(
        "scale-of-one",
        Severity.warning,
        _few_ones,
        "amax / 448. Exactly 1 is what tools put where nothing was measured, or an amax of exactly 448, "
        "which among so many inputs may be chance.",
        "Compare with the amax of the calibration (octavo.json has it); quantize again if it is not 448.",
    ),
    Check(
        "kv-scale-uncalibrated",
        Severity.warning,
        _kv_uncalibrated,
        "amax / 448. Exactly 1 is what tools and engines put where nothing was measured; ModelOpt's exports for "
        "TensorRT-LLM have nothing smaller.",
        f"Keys and values beyond 448 are clipped, and small ones lose precision. {_AGAIN}",
    ),
    Check(
        "weight-scale-missing",
        Severity.error,
        _weight_scales_missing,
        "A weight_scale beside every FP8 weight.",
        "The codes alone are not the weights. Quantize the original checkpoint again, or copy the file that "
        "holds the scales.",
    ),
    Check(
        "input-scale-missing",
        Severity.error,
        _input_scales_missing,
        "An input_scale beside every FP8 weight: the config promises static inputs.",
        f"Engines compute with an uninitialized or default scale. {_AGAIN}",
    ),
    Check(
        "input-scale-unpromised",
        Severity.warning,
        _input_scales_unpromised,
        "No input_scale: the config promises dynamic inputs.",
        "Engines ignore the scale or refuse it. Correct the config if the scales were meant.",
    ),
    Check(
        "input-scales-differ",
        Severity.warning,
        _shared_inputs_differ,
        "One input scale for linear layers that read the same input.",
        "Engines that fuse the layers take the largest for all. Scales of one calibration do not differ: "
        "see how the edition was made.",
    ),
    Check(
        "kv-scale-missing",
        Severity.error,
        _kv_scales_missing,
        "k_scale and v_scale for every attention block: the config promises an FP8 KV cache.",
        f"Engines use 1, which clips or rounds away keys and values. {_AGAIN}",
    ),
    Check(
        "kv-scale-unpromised",
        Severity.warning,
        _kv_scales_unpromised,
        "No scales of keys and values: the config does not promise an FP8 KV cache.",
        "Engines ignore them unless told to use an FP8 cache. Correct the config if they were meant.",
    ),
    Check(
        "kv-scale-range",
        Severity.warning,
        _kv_scales_out_of_range,
        f"Scales from {_KV_LOW:.2g} to {_KV_HIGH:g}, within a factor of {_KV_FACTOR:g} of the layers' median.",
        "Too small a scale clips keys and values, too large a one rounds them to zero. See that it is amax / 448, "
        "neither amax itself nor its inverse.",
    ),
    Check(
        "scale-shape",
        Severity.error,
        _shapes,
        "One value; for weights also one for each row, or for each block of 128 x 128.",
        "No engine reads these. Quantize the original checkpoint again.",
    ),
    Check(
        "scale-granularity",
        Severity.error,
        _granularity,
        "Weight scales as fine as the config promises.",
        "Engines lay out memory by the config and then fail, or take a wrong scale. Correct the config, or "
        "quantize again.",
    ),
    Check(
        "scale-orphan",
        Severity.warning,
        _orphans,
        "Scales only beside FP8 weights.",
        "Either the scale is a leftover, or the weight lost its FP8 form and must not be scaled: see how the "
        "edition was made.",
    ),
    Check(
        "scale-unknown",
        Severity.warning,
        _unknown,
        "No scales but weight_scale, input_scale, k_scale and v_scale under the dialect's names.",
        "It is ignored. If it stands for one of these, the config names the wrong dialect or format.",
    ),
)
