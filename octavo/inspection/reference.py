"""An edition beside the checkpoint it was made from: how far is each weight from what it was?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import fp8
from octavo.edition import ROTATION_KEY, Edition
from octavo.errors import OctavoError
from octavo.inspection.findings import Check, Fault, Finding, Severity, run_checks
from octavo.inspection.originals import Originals
from octavo.inspection.outline import Outline, outline
from octavo.inspection.strips import strips
from octavo.inspection.survey import OnProgress, granularity_of, in_parallel, silent
from octavo.inspection.tables import dtype_name

# Rounding to E4M3 leaves 31 or 32 dB where the scale is right; what is below this is another tensor,
# or has another scale.
LOWEST_DB = 20.0

# A weight is an outlier if its SQNR is below its projection's median over the layers by more than
# this many standard deviations, estimated from the median absolute deviation (Gaussian errors have
# 1.4826 of these in one), and by more than this many dB: all layers of a projection can be equal.
OUTLIER_DEVIATIONS = 5.0
OUTLIER_DB = 1.0
_GAUSSIAN = 1.4826


@dataclass(frozen=True)
class WeightError:
    """What became of one weight.

    Attributes:
        module: the linear layer.
        sqnr_db: ``10 log10(Σ w² / Σ (w - ŵ)²)``; None without noise, or without a finite number for it.
        exact: whether the two are equal.
        outlier: whether it is far below the others of its projection.
    """

    module: str
    sqnr_db: float | None
    exact: bool
    outlier: bool


@dataclass(frozen=True)
class Projection:
    """One projection over all layers.

    Attributes:
        name: ``q_proj``.
        count: quantized weights.
        lowest_db: the smallest SQNR; None where every weight came through exactly, as for all below.
        median_db: over the layers.
        worst: the module with the smallest.
        outliers: modules far below the median.
    """

    name: str
    count: int
    lowest_db: float | None
    median_db: float | None
    worst: str | None
    outliers: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """An edition and its reference.

    Attributes:
        reference: the reference's directory.
        weights: every quantized weight.
        projections: the same by projection.
        equal: unquantized tensors with the reference's bytes.
    """

    reference: str
    weights: tuple[WeightError, ...]
    projections: tuple[Projection, ...]
    equal: int


class _Difference(NamedTuple):
    """Of one tensor: sums of squares for a quantized one, equality for the others."""

    signal: float
    noise: float
    equal: bool


class _Compared(NamedTuple):
    """What the checks of a comparison look at.

    Attributes:
        edition: the tensors' shapes and dtypes.
        reference: likewise.
        model: what both should have.
        partners: by tensor of the edition, the reference's tensor it came from.
        errors: of quantized weights.
        carried: of other tensors, whether they have the reference's bytes.
    """

    edition: Edition
    reference: Edition
    model: Outline
    partners: Mapping[str, str]
    errors: tuple[WeightError, ...]
    carried: Mapping[str, bool]


def compare(
    edition: Edition, reference: Edition, on_progress: OnProgress = silent
) -> tuple[Comparison, tuple[Finding, ...]]:
    """Measure every tensor of ``edition`` against ``reference``, strip by strip.

    Raises:
        OctavoError: the reference is quantized itself, or in other axes, or a file changed while it was read.
    """
    if reference.dialect is not None:
        raise OctavoError(
            f"The reference {reference.directory} is quantized itself ({reference.dialect}). Pass the "
            "BF16, FP16 or FP32 checkpoint that the edition was made from."
        )
    if edition.rotation != reference.rotation:
        raise OctavoError(
            f"{edition.directory} and the reference {reference.directory} are in different axes: config.json of only one "
            f"has {ROTATION_KEY}, or it is not the same. Pass what `octavo rotate` wrote and the edition was made from; "
            "`octavo eval --task kl --reference` compares with the original."
        )
    model = outline(edition)
    partners = _partners(edition, reference, model)
    pairs = {
        name: other
        for name, other in partners.items()
        if other in reference
        and edition[name].shape == reference[other].shape
        and _is_known(edition, name)
    }
    originals = Originals(edition, reference, model, pairs.keys())
    sizes = (edition[name].nbytes + reference[other].nbytes for name, other in pairs.items())
    found = in_parallel(
        lambda name: _difference(edition, name, originals, pairs[name]), pairs, sizes, on_progress
    )
    differences = dict(zip(pairs, found, strict=True))
    weights = {f"{module}.weight": module for module in edition.quantized_modules()}
    errors = _weight_errors(
        {weights[name]: one for name, one in differences.items() if name in weights}
    )
    carried = {name: one.equal for name, one in differences.items() if name not in weights}
    comparison = Comparison(
        reference=str(reference.directory),
        weights=errors,
        projections=_by_projection(errors),
        equal=sum(carried.values()),
    )
    compared = _Compared(edition, reference, model, partners, errors, carried)
    return comparison, run_checks(CHECKS, compared)


def _partners(edition: Edition, reference: Edition, model: Outline) -> dict[str, str]:
    """For every tensor of the model that the edition has, the reference's one that it came from: for a
    tied tensor that the reference does not store, the one it is tied to."""
    return {
        name: name if name in reference else model.tied.get(name, name)
        for name in model.shapes
        if name in edition
    }


def _is_known(edition: Edition, name: str) -> bool:
    """Whether the tensor's numbers are known: what is FP8 needs a scale of a known shape."""
    module = name.removesuffix(".weight")
    return not edition.is_quantized(module) or granularity_of(edition, module) is not None


def _difference(edition: Edition, name: str, originals: Originals, other: str) -> _Difference:
    module = name.removesuffix(".weight")
    pairs = zip(strips(edition, name), originals.strips(other), strict=True)
    if not edition.is_quantized(module):
        same = edition[name].dtype == originals.reference[other].dtype
        return _Difference(0.0, 0.0, same and all(_equal(one, two) for (_, one), (_, two) in pairs))
    scale = edition.read_unchecked(f"{module}.weight_scale")
    signal = noise = 0.0
    for (first, codes), (_, original) in pairs:
        rows = fp8.rows_of(scale, first, len(codes), edition[name].shape[0])
        restored = fp8.dequantize(codes, rows)
        expected = original.float()
        noise += restored.sub_(expected).square_().sum(dtype=torch.float64).item()
        signal += expected.square_().sum(dtype=torch.float64).item()
    return _Difference(signal, noise, False)


def _equal(one: Tensor, two: Tensor) -> bool:
    # By their bytes: NaN is equal to itself, -0 is not equal to 0.
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def _weight_errors(differences: Mapping[str, _Difference]) -> tuple[WeightError, ...]:
    levels = {module: _sqnr(one) for module, one in differences.items()}
    limits: dict[str, float] = {}
    for projection in {_projection(module) for module in levels}:
        alike = [levels[module] for module in levels if _projection(module) == projection]
        limits[projection] = _lowest_expected([one for one in alike if one is not None])
    return tuple(
        WeightError(
            module=module,
            sqnr_db=level,
            exact=differences[module].noise == 0,
            outlier=level is not None and level < limits[_projection(module)],
        )
        for module, level in levels.items()
    )


def _sqnr(found: _Difference) -> float | None:
    """In dB; None without noise, or without a finite number for it."""
    if not found.noise or not found.signal or not math.isfinite(found.noise):
        return None
    return 10 * math.log10(found.signal / found.noise)


def _lowest_expected(levels: list[float]) -> float:
    """Below it an SQNR is an outlier among ``levels``."""
    if not levels:
        return -math.inf
    middle = statistics.median(levels)
    deviation = _GAUSSIAN * statistics.median(abs(level - middle) for level in levels)
    return middle - max(OUTLIER_DEVIATIONS * deviation, OUTLIER_DB)


def _projection(module: str) -> str:
    return module.rpartition(".")[2]


def _by_projection(errors: Iterable[WeightError]) -> tuple[Projection, ...]:
    members: dict[str, list[WeightError]] = {}
    for error in errors:
        members.setdefault(_projection(error.module), []).append(error)
    return tuple(_describe(name, ones) for name, ones in members.items())


def _describe(name: str, errors: list[WeightError]) -> Projection:
    levels = {error.module: error.sqnr_db for error in errors if error.sqnr_db is not None}
    worst = min(levels, key=lambda module: levels[module], default=None)
    return Projection(
        name=name,
        count=len(errors),
        lowest_db=None if worst is None else levels[worst],
        median_db=statistics.median(levels.values()) if levels else None,
        worst=worst,
        outliers=tuple(error.module for error in errors if error.outlier),
    )


def _unmatched(compared: _Compared) -> Iterator[Fault]:
    edition, reference, partners = compared.edition, compared.reference, compared.partners
    for name, other in partners.items():
        if other not in reference:
            yield Fault(name, "not in the reference")
        elif edition[name].shape != reference[other].shape:
            shapes = list(edition[name].shape), list(reference[other].shape)
            yield Fault(name, "shape {}, in the reference {}".format(*shapes))
    for name in compared.model.shapes:
        if name in reference and name not in edition and name not in compared.model.tied:
            yield Fault(name, "in the reference only")


def _changed(compared: _Compared) -> Iterator[Fault]:
    for name, same in compared.carried.items():
        if not same:
            other = compared.reference[compared.partners[name]]
            dtypes = dtype_name(compared.edition[name].dtype), dtype_name(other.dtype)
            converted = "{}, in the reference {}".format(*dtypes)
            yield Fault(name, "other numbers" if dtypes[0] == dtypes[1] else converted)


def _far(compared: _Compared) -> Iterator[Fault]:
    for error in compared.errors:
        if error.sqnr_db is None and not error.exact:
            yield Fault(error.module, "no finite SQNR")
        elif error.sqnr_db is not None and error.sqnr_db < LOWEST_DB:
            yield Fault(error.module, f"SQNR {error.sqnr_db:.1f} dB")


def _outliers(compared: _Compared) -> Iterator[Fault]:
    for error in compared.errors:
        if error.outlier and error.sqnr_db is not None and error.sqnr_db >= LOWEST_DB:
            yield Fault(error.module, f"SQNR {error.sqnr_db:.1f} dB")


CHECKS: tuple[Check[_Compared], ...] = (
    Check(
        "reference-mismatch",
        Severity.error,
        _unmatched,
        "The same tensors in the same shapes.",
        "See that the reference is the checkpoint that the edition was made from.",
    ),
    Check(
        "reference-differs",
        Severity.error,
        _changed,
        "Unquantized tensors with the reference's bytes.",
        "Something else than quantization changed the model, or the reference is another one.",
    ),
    Check(
        "sqnr-low",
        Severity.error,
        _far,
        f"An SQNR of the dequantized weight against the reference's of {LOWEST_DB:g} dB or more; rounding to E4M3 "
        "leaves about 31.",
        "The scale or the codes are not this weight's: quantize the reference again.",
    ),
    Check(
        "sqnr-outlier",
        Severity.warning,
        _outliers,
        f"An SQNR within {OUTLIER_DEVIATIONS:g} standard deviations (from the median absolute deviation) or "
        f"{OUTLIER_DB:g} dB of the median of the same projection in all layers.",
        "Either outliers in these weights cost the others precision (choose finer scales, or exclude the modules), or "
        "they were rounded twice, as where a conversion merges scales (quantize with --merge-scales).",
    ),
)
