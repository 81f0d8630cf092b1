"""The report's figures: where in the model FP8 costs something, and how much.

Each is drawn twice, for a desktop and for a phone; the page shows the one that fits. A heat map's
layers run to the right on the one and down on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from octavo.reporting import drawing
from octavo.reporting.drawing import CANVASES, Canvas, Drawing
from octavo.reporting.layers import Cell, LayerTable, arrange, merge_equal
from octavo.reporting.numbers import number
from octavo.reporting.record import Record
from octavo.reporting.results import Divergence, Results
from octavo.reporting.svg import to_svg

# Weights that differ by less look alike, as they should: a colour scale stretched over hundredths of
# a decibel would make a drama of nothing.
_LEAST_SPAN_DB = 1.0


class Plot(NamedTuple):
    """A figure of the page.

    Attributes:
        name: its id.
        title: what is drawn.
        how: how to read it, a sentence.
        finding: what is to be seen, a sentence.
        svgs: the drawing by the name of its canvas.
    """

    name: str
    title: str
    how: str
    finding: str
    svgs: dict[str, str]


def plots(results: Results) -> list[Plot]:
    """The figures that ``results`` has the numbers for."""
    found = _layer_plots(results.record) if results.record else []
    if results.evaluation.divergence:
        found.append(_divergence(results.evaluation.divergence))
    return found


def _layer_plots(record: Record) -> list[Plot]:
    amax, weights = record.amax, record.weights
    sqnr = {name: error.sqnr_db for name, error in weights.items() if error.sqnr_db is not None}
    candidates = (
        (weight_sqnr, arrange(sqnr, worst=min)),
        (_inputs, arrange({n: amax[n] for n in amax if f"{n}.weight" in amax}, worst=max)),
        (_cache, arrange(_keys_and_values(amax), worst=max)),
        (
            _underflow,
            arrange({name: error.underflow for name, error in weights.items()}, worst=max),
        ),
    )
    return [draw(table) for draw, table in candidates if table is not None]


def _keys_and_values(amax: dict[str, float]) -> dict[str, float]:
    kinds = {"k": "keys", "v": "values"}
    names = {name: name.rpartition(".") for name in amax}
    return {
        f"{block}.{kinds[kind]}": amax[name]
        for name, (block, _, kind) in names.items()
        if kind in kinds
    }


def weight_sqnr(table: LayerTable) -> Plot:
    """The error of weights, in dB."""
    return sqnr_plot(
        table,
        "sqnr",
        "Weight error",
        "Signal to quantization noise ratio of each weight: the higher, the closer to the original; "
        "6 dB less is twice the error.",
    )


def sqnr_plot(table: LayerTable, name: str, title: str, how: str) -> Plot:
    """A heat map of signal to quantization noise ratios in dB."""
    worst, best = min(table.cells, key=_value), max(table.cells, key=_value)
    return plot(
        name,
        title,
        how,
        f"Lowest: {worst.where}, {worst.value:.1f} dB.{_gaps(table)}",
        lambda canvas: drawing.heat_map(
            table,
            canvas,
            limits=(min(worst.value, best.value - _LEAST_SPAN_DB), best.value),
            axis="SQNR, dB",
            tooltip=lambda value: f"{value:.2f} dB",
        ),
    )


def _inputs(table: LayerTable) -> Plot:
    largest = max(table.cells, key=_value)
    return plot(
        "inputs",
        "Largest inputs",
        "Largest absolute value that each projection's input reached on the calibration text; a point "
        "far above its line is a massive activation, and its scale coarsens all other values there.",
        f"Largest: {largest.where}, {number(largest.value)}.",
        lambda canvas: drawing.lines(merge_equal(table), canvas, axis="Input amax"),
    )


def _cache(table: LayerTable) -> Plot:
    largest = max(table.cells, key=_value)
    return plot(
        "cache",
        "Range of keys and values",
        "Largest absolute key, after rotary embedding, and value of each layer on the calibration "
        "text: the range that the FP8 cache spans.",
        f"Largest: {largest.where}, {number(largest.value)}.",
        lambda canvas: drawing.lines(table, canvas, axis="KV cache amax"),
    )


def _underflow(table: LayerTable) -> Plot:
    worst = max(table.cells, key=_value)
    # With a scale for a whole tensor only a few values lie below the smallest code.
    factor, unit = (100.0, "%") if worst.value >= 1e-3 else (1e6, "per million")
    shares = table._replace(values={place: v * factor for place, v in table.values.items()})
    return plot(
        "underflow",
        "Weights that became zero",
        "Share of each weight's nonzero values that are too small for FP8 at its scale: the fewer, the "
        "better.",
        f"Largest: {worst.where}, {number(worst.value * factor)} {unit}.{_gaps(table)}"
        if worst.value
        else f"None did.{_gaps(table)}",
        lambda canvas: drawing.heat_map(
            shares,
            canvas,
            limits=(0, worst.value * factor or 1),
            axis=f"Became zero, {unit}",
            tooltip=lambda value: f"{number(value)} {unit}",
        ),
    )


def _divergence(divergence: Divergence) -> Plot:
    mean, worst = divergence.mean.value, divergence.worst_1_percent
    return plot(
        "divergence",
        "KL divergence by token",
        "How far the edition's next-token distribution is from the base model's, token by token: the "
        "further left the mass, the less changed.",
        f"Mean {number(mean)} nats; over the worst 1 % of tokens {number(worst)} nats.",
        lambda canvas: drawing.histogram(
            divergence.histogram,
            canvas,
            axis="KL(base ‖ edition), nats",
            marks={"mean": mean, "worst 1 %": worst},
        ),
    )


def plot(name: str, title: str, how: str, finding: str, draw: Callable[[Canvas], Drawing]) -> Plot:
    """A figure on every canvas."""
    svgs = {}
    for canvas in CANVASES:
        figure, tooltips = draw(canvas)
        svgs[canvas.name] = to_svg(
            figure, name=f"{name}-{canvas.name}", label=f"{title}. {finding}", tooltips=tooltips
        )
    return Plot(name, title, how, finding, svgs)


def _gaps(table: LayerTable) -> str:
    return "" if table.complete else " Empty places kept their exact values."


def _value(cell: Cell) -> float:
    return cell.value
