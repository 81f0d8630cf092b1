"""An analysis as a page: one file that asks nothing of the network and runs no script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from octavo.reporting import drawing
from octavo.reporting.analysis import Analysis, Loss, UnitLoss
from octavo.reporting.layers import LayerTable, arrange, merge_equal
from octavo.reporting.numbers import number, plus_minus
from octavo.reporting.plots import Plot, plot, sqnr_plot, weight_sqnr
from octavo.reporting.rendering import TEMPLATES, render
from octavo.reporting.results import Estimate
from octavo.reporting.table import Figure
from octavo.reporting.view import quantized
from octavo.units import format_bytes

# Rows of the table of what costs most.
TOP = 15

# Decades of KL that colours tell apart: what is a thousandth of the largest matters to no one.
_DECADES = 1e-3


class Row(NamedTuple):
    """A unit of the table, as text."""

    where: str
    kl: str
    share: str
    saved: str


def analysis_page(analysis: Analysis) -> str:
    """The page, complete with style sheet and figures."""
    return render(
        "analysis.html.jinja",
        analysis=analysis,
        figures=list(_figures(analysis)),
        unit_rows=rows(analysis, analysis.costliest[:TOP]),
        layer_rows=rows(analysis, sorted(analysis.layers, key=lambda one: -one.kl)[:TOP]),
        plots=list(_plots(analysis)),
        quantized=quantized(analysis.scheme),
        measured=_measured(analysis),
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )


def rows(analysis: Analysis, units: Sequence[UnitLoss]) -> list[Row]:
    """Units as text."""
    total = analysis.everything.kl
    return [
        Row(
            f"layer {unit.layer}" + ("" if unit.unit == "layer" else f" {unit.unit}"),
            nats(unit),
            f"{unit.kl / total:.1%}" if total else "0%",
            _saved(unit),
        )
        for unit in units
    ]


def nats(loss: Loss) -> str:
    """``0.00123 ± 0.00012``."""
    error = loss.kl_standard_error
    known = Estimate(value=loss.kl, standard_error=error)
    return plus_minus(known) if error else number(loss.kl)


def _saved(unit: UnitLoss) -> str:
    parts = [format_bytes(unit.bytes)] if unit.modules else []
    if unit.cache_bytes_per_token:
        parts.append(f"{unit.cache_bytes_per_token:,} B/cached token")
    return " + ".join(parts)


def _figures(analysis: Analysis) -> Iterator[Figure]:
    total, parts = analysis.everything.kl, analysis.sum_of_units
    yield Figure("Everything in FP8", number(total), "nats per token, KL divergence")
    if not analysis.units:
        return
    largest = analysis.costliest[0]
    yield Figure("Sum of the units", number(parts), "each quantized on its own")
    yield Figure("Largest unit", number(largest.kl), f"layer {largest.layer} {largest.unit}")
    if total:
        top = sum(unit.kl for unit in analysis.costliest[:TOP])
        yield Figure(
            f"Top {min(TOP, len(analysis.units))} of {len(analysis.units)}",
            f"{top / parts:.0%}" if parts else "0%",
            "of the sum of the units",
        )


def _plots(analysis: Analysis) -> Iterator[Plot]:
    measured = [*analysis.units, *analysis.layers]
    if any(unit.kl for unit in measured):
        yield _loss(analysis, measured)
    found = analysis.linears
    weights = {n: e.weight.sqnr_db for n, e in found.items() if e.weight.sqnr_db is not None}
    inputs = {n: e.input.sqnr_db for n, e in found.items() if e.input.sqnr_db is not None}
    weight_table, input_table = arrange(weights, worst=min), arrange(inputs, worst=min)
    if weight_table is not None:
        yield weight_sqnr(weight_table)
    if input_table is not None:
        yield sqnr_plot(
            merge_equal(input_table),
            "input-sqnr",
            "Input error",
            "Signal to quantization noise ratio of what each projection reads, on the text measured on: the higher, "
            "the better.",
        )


def _loss(analysis: Analysis, measured: Sequence[UnitLoss]) -> Plot:
    kinds = tuple(dict.fromkeys(unit.unit for unit in measured))
    values = {(unit.layer, unit.unit): unit.kl for unit in measured}
    table = LayerTable(analysis.model.layers, kinds, values)
    largest = analysis.costliest[0]
    top = max(values.values())
    return plot(
        "loss",
        "What each part costs",
        "KL divergence of the model's predictions when only this part is quantized, in nats per token, on a logarithmic "
        "scale of colours. The last of each layer is all of it.",
        f"Largest: layer {largest.layer} {largest.unit}, {number(largest.kl)} nats.",
        lambda canvas: drawing.heat_map(
            table,
            canvas,
            limits=(max(min(value for value in values.values() if value), top * _DECADES), top),
            axis="KL, nats per token",
            tooltip=lambda value: f"{number(value)} nats",
            log=True,
        ),
    )


def _measured(analysis: Analysis) -> list[tuple[str, str]]:
    text, calibration = analysis.text, analysis.calibration
    return [
        ("Text", f"{text.data}, {text.windows:,} windows of {text.seq_len:,} tokens"),
        (
            "Calibration",
            f"{calibration.source}, {calibration.samples:,} samples of {calibration.seq_len:,} tokens"
            if calibration
            else "none: no scale depends on data",
        ),
        ("Computed in", f"float32, on {analysis.device}"),
        ("Octavo", analysis.octavo),
        ("PyTorch", analysis.torch),
        ("transformers", analysis.transformers),
    ]
