"""The three kinds of drawing in a report: heat map, lines, histogram."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from octavo.reporting.layers import Cell, LayerTable
from octavo.reporting.numbers import number
from octavo.reporting.results import Histogram
from octavo.reporting.svg import MUTED, SERIES, STYLE

P = ParamSpec("P")


class Canvas(NamedTuple):
    """A width to draw for, in CSS pixels."""

    name: str
    width: float


CANVASES = WIDE, NARROW = Canvas("wide", 880), Canvas("narrow", 360)


class Drawing(NamedTuple):
    """A figure, and the tooltips of its parts by ``gid``."""

    figure: Figure
    tooltips: dict[str, str]


# Viridis: even steps to the eye, colour-blind safe, and no end of it fades into white or black.
_COLOURS = matplotlib.colormaps["viridis"].resampled(64)
# Shapes too tell series apart, and one fewer of them than of colours.
_MARKERS = ("o", "s", "^", "D", "v", "P")


def styled(draw: Callable[P, Drawing]) -> Callable[P, Drawing]:
    """Draw in the report's style, whatever the user's own matplotlib settings are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Drawing:
        with matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


@styled
def heat_map(
    table: LayerTable,
    canvas: Canvas,
    *,
    limits: tuple[float, float],
    axis: str,
    tooltip: Callable[[float], str],
    log: bool = False,
) -> Drawing:
    """A cell for each layer and projection; a cell without value stays empty.

    Args:
        table: the values.
        canvas: where; layers run to the right if wide, down if narrow.
        limits: values of the darkest and of the brightest colour; what lies beyond has these too.
        axis: the values' name and unit.
        tooltip: a value as text.
        log: whether colours follow the logarithm of values; limits are then above zero.
    """
    wide = canvas is WIDE
    shape = (table.layers, len(table.kinds)) if wide else (len(table.kinds), table.layers)
    height = 30 * shape[1] + 60 if wide else min(18 * shape[1], 900) + 110
    figure, axes = _new(canvas, height)
    colours = LogNorm(*limits) if log else Normalize(*limits)
    # Gaps between cells, but not where they would take up a good part of them.
    gap = 0.08 if table.layers <= 60 else 0.0
    tooltips = {}
    for cell in table.cells:
        place = cell.layer, table.kinds.index(cell.kind)
        x, y = place if wide else place[::-1]
        gid = f"cell-{place[0]}-{place[1]}"
        tooltips[gid] = f"{cell.where}: {tooltip(cell.value)}"
        colour = _COLOURS(colours(min(max(cell.value, limits[0]), limits[1])))
        axes.add_artist(
            Rectangle(
                (x - 0.5 + gap / 2, y - 0.5 + gap / 2),
                1 - gap,
                1 - gap,
                facecolor=colour,
                edgecolor=colour,
                # Without gaps, the page would shine through between neighbours.
                linewidth=0 if gap else 0.4,
                gid=gid,
            )
        )
    axes.set(xlim=(-0.5, shape[0] - 0.5), ylim=(shape[1] - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    layers, kinds = (axes.xaxis, axes.yaxis) if wide else (axes.yaxis, axes.xaxis)
    layers.set_major_locator(MaxNLocator(12, integer=True))
    layers.set_label_text("Decoder layer")
    kinds.set_ticks(range(len(table.kinds)), table.kinds)
    if not wide:
        axes.xaxis.tick_top()
    bar = figure.colorbar(
        ScalarMappable(colours, _COLOURS),
        ax=axes,
        location="right" if wide else "top",
        aspect=18 if wide else 30,
        fraction=0.05,
        pad=0.015,
        label=axis,
    )
    bar.outline.set_visible(False)
    if log:
        ticks = bar.ax.yaxis if wide else bar.ax.xaxis
        # Few enough for a phone.
        subs = (1.0,) if limits[1] / limits[0] > 20 else (1.0, 2.0, 5.0)
        ticks.set_major_locator(LogLocator(subs=subs))
        ticks.set_minor_locator(NullLocator())
        ticks.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    if bar.solids is not None:
        # Without hairlines between the steps.
        bar.solids.set_edgecolor("face")
    return Drawing(figure, tooltips)


@styled
def lines(table: LayerTable, canvas: Canvas, *, axis: str) -> Drawing:
    """A line for each kind over the layers, on a logarithmic axis; what stands out is labelled.

    Args:
        table: values above zero; others are not drawn.
        canvas: where.
        axis: the values' name.
    """
    figure, axes = _new(canvas, 340 if canvas is WIDE else 320)
    size = 5 if table.layers <= 40 else 3
    for kind, colour, marker in zip(
        table.kinds, itertools.cycle(SERIES), itertools.cycle(_MARKERS)
    ):
        values = [value if value > 0 else float("nan") for value in table.series(kind)]
        axes.plot(
            values,
            label=kind,
            color=colour,
            marker=marker,
            markersize=size,
            linewidth=1.6,
            markeredgewidth=0,
        )
    axes.set_yscale("log")
    axes.set(xlabel="Decoder layer", ylabel=f"{axis} (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(12 if canvas is WIDE else 6, integer=True))
    axes.margins(x=0.02, y=0.15)
    _plain_ticks(axes.yaxis, *axes.get_ylim())
    axes.grid(axis="y")
    for cell in _peaks(table):
        axes.annotate(
            f"layer {cell.layer}\n{number(cell.value)}",
            (cell.layer, cell.value),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=12,
        )
    figure.legend(loc="outside upper left", ncols=4, handlelength=1.8, columnspacing=1.4)
    return Drawing(figure, {})


@styled
def histogram(
    counts: Histogram, canvas: Canvas, *, axis: str, marks: Mapping[str, float]
) -> Drawing:
    """Shares in percent over a logarithmic axis, with vertical lines at two ``marks``, the smaller
    one first."""
    figure, axes = _new(canvas, 320 if canvas is WIDE else 300)
    filled = [index for index, count in enumerate(counts.counts) if count]
    first, last = filled[0], filled[-1]
    edges = list(counts.edges)
    if edges[0] == 0:
        # All that lies below the next edge, drawn as wide as its neighbour.
        edges[0] = edges[1] ** 2 / edges[2]
    edges = edges[first : last + 2]
    total = sum(counts.counts)
    shares = [100 * count / total for count in counts.counts[first : last + 1]]
    axes.stairs(shares, edges, fill=True, color=SERIES[0], alpha=0.3, linewidth=0)
    axes.stairs(shares, edges, color=SERIES[0], linewidth=1.6)
    axes.set_xscale("log")
    top = 1.3 * max(shares)
    for side, (name, value) in zip(("right", "left"), marks.items(), strict=True):
        if value > 0:
            axes.plot([value, value], [0, top], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.annotate(
                f"{name}\n{number(value)}",
                (value, top),
                xytext=(-6 if side == "right" else 6, 0),
                textcoords="offset points",
                ha=side,
                va="top",
            )
    axes.set(xlabel=f"{axis} (log scale)", ylabel="Tokens, %", ylim=(0, top))
    axes.xaxis.set_major_locator(LogLocator(numticks=8 if canvas is WIDE else 5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.grid(axis="y")
    return Drawing(figure, {})


def _new(canvas: Canvas, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(canvas.width / 72, height / 72))
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10 … where the axis spans few powers of ten, at 1, 10, 100 … otherwise."""
    subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _power(value: float) -> str:
    """``0.01`` or ``10⁻⁶``: a power of ten."""
    exponent = round(math.log10(value))
    if abs(exponent) <= 3:
        return f"{value:,g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _peaks(table: LayerTable) -> list[Cell]:
    """What is to be labelled: values ten times above their kind's median and above all others of
    their layer, the largest first, none beside another."""
    medians = {
        kind: statistics.median(cell.value for cell in table.cells if cell.kind == kind)
        for kind in table.kinds
    }
    peaks: list[Cell] = []
    for cell in sorted(table.cells, key=lambda cell: -cell.value):
        layer = [table.values.get((cell.layer, kind), 0) for kind in table.kinds]
        alone = all(abs(cell.layer - peak.layer) > table.layers / 4 for peak in peaks)
        if cell.value == max(layer) and cell.value > 10 * medians[cell.kind] and alone:
            peaks.append(cell)
    return peaks
