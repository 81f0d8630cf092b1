"""The comparison as a figure: throughput and latency under each load, bar by bar."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from octavo.reporting.svg import GRID, MUTED, STYLE, TEXT
from octavo.throughput.results import BenchResults, Comparison, Spread

# The report's style on a page of its own: its light colours, and letters as shapes, which look the
# same everywhere.
_LIGHT = {TEXT: "#1b1f24", MUTED: "#59636e", GRID: "#dfe3e8"}
_COLOURS = ("#0b6bc0", "#c2410c", "#08795a", "#9a3d97", "#8a6100", "#52606d", "#b4234a")
_STYLE = {key: _LIGHT.get(str(value), value) for key, value in STYLE.items()} | {
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "svg.fonttype": "path",
}

# A group of bars is so wide, of the space from one concurrency to the next.
_GROUP = 0.8
# Points (CSS pixels) for each panel and for each of its bars, at least; and for a ratio above a bar,
# without which it stands upright.
_PANEL, _BAR, _LABEL = 320, 16, 36
_LATENCIES = {"ttft": "Time to first token, ms", "tpot": "Time per output token, ms"}


def draw(results: BenchResults) -> dict[str, bytes]:
    """The figure by file ending: ``png`` and ``svg``."""
    with matplotlib.style.context(["default", _STYLE]):
        drawn = figure(results)
        return {
            "png": _save(drawn, "png", dpi=144),
            "svg": _save(drawn, "svg", metadata={"Date": None, "Creator": None}),
        }


def figure(results: BenchResults) -> Figure:
    """Panels for throughput, time to first token and, if there is one, time per output token."""
    comparisons, names = results.comparisons, [one.name for one in results.contenders]
    latencies = [name for name in _LATENCIES if f"{name}_p50_ms" in comparisons[0].values[names[0]]]
    drawn = Figure(figsize=(3 * _panel(len(names) * len(comparisons)) / 72, 360 / 72))
    throughput, *others = drawn.subplots(1, 1 + len(latencies), squeeze=False)[0]
    _throughput(throughput, comparisons, names)
    for axes, latency in zip(others, latencies, strict=True):
        _latency(axes, comparisons, names, latency)
    for axes in (throughput, *others):
        axes.set_xticks(range(len(comparisons)), [str(one.concurrency) for one in comparisons])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("Requests in flight")
        # One group or two would be very wide bars.
        middle, half = (len(comparisons) - 1) / 2, max(len(comparisons), 3) / 2
        axes.set_xlim(middle - half, middle + half)
        axes.set_axisbelow(True)
        axes.grid(axis="y")
    drawn.legend(*throughput.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    drawn.supxlabel(_caption(results), fontsize=11, color=_LIGHT[MUTED])
    return drawn


def _caption(results: BenchResults) -> str:
    work, names = results.workload, [one.name for one in results.contenders]
    rounds = "one round" if work.rounds == 1 else f"{work.rounds} rounds"
    ratio = f"Above a bar, its ratio to {names[0]}. " if len(names) > 1 else ""
    return (
        f"{work.input_len} tokens in, {work.output_len} out. Median of {rounds}, whiskers from the "
        f"smallest to the largest.\n{ratio}Latency: p50, pale up to p95."
    )


def _panel(bars: int) -> int:
    """The width of a panel of so many bars, in points."""
    return max(_PANEL, _BAR * bars)


def _throughput(axes: Axes, comparisons: Sequence[Comparison], names: Sequence[str]) -> None:
    axes.set_title("Output tokens/s", loc="left", fontsize=12.5)
    bars = len(names) * len(comparisons)
    upright = _GROUP * _panel(bars) / bars < _LABEL
    for index, name in enumerate(names):
        spreads = [one.values[name]["output_tokens_per_second"] for one in comparisons]
        places = _places(index, len(names), len(comparisons))
        axes.bar(
            places,
            [spread.median for spread in spreads],
            width=_GROUP / len(names),
            color=_COLOURS[index % len(_COLOURS)],
            edgecolor="white",
            yerr=[
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            error_kw={"ecolor": _LIGHT[TEXT], "elinewidth": 1.0, "capsize": 2.5},
            label=name,
        )
        for place, spread, comparison in zip(places, spreads, comparisons, strict=True):
            if name in comparison.ratios:
                ratio = comparison.ratios[name]["output_tokens_per_second"]
                _write(axes, place, spread, f"{ratio.median:.2f}×", upright=upright)
    axes.margins(y=0.2 if upright else 0.12)


def _latency(
    axes: Axes, comparisons: Sequence[Comparison], names: Sequence[str], latency: str
) -> None:
    axes.set_title(_LATENCIES[latency], loc="left", fontsize=12.5)
    for index, name in enumerate(names):
        places = _places(index, len(names), len(comparisons))
        colour = _COLOURS[index % len(_COLOURS)]
        for percentile, shade in (("p95", _pale(colour)), ("p50", to_rgb(colour))):
            axes.bar(
                places,
                [one.values[name][f"{latency}_{percentile}_ms"].median for one in comparisons],
                width=_GROUP / len(names),
                color=shade,
                edgecolor="white",
            )


def _places(index: int, names: int, groups: int) -> list[float]:
    """Where the bars of one name stand, in groups around 0, 1, 2 …"""
    return [group + (index - (names - 1) / 2) * _GROUP / names for group in range(groups)]


def _pale(colour: str) -> tuple[float, float, float]:
    """A third of ``colour`` on white; see-through, it would show the grid."""
    red, green, blue = (1 - (1 - part) * 0.35 for part in to_rgb(colour))
    return red, green, blue


def _write(axes: Axes, place: float, spread: Spread, text: str, *, upright: bool) -> None:
    axes.annotate(
        text,
        (place, spread.high),
        xytext=(0, 5 if upright else 3),
        textcoords="offset points",
        ha="center",
        fontsize=11,
        rotation=90 if upright else 0,
    )


def _save(figure: Figure, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, **options)
    return buffer.getvalue()
