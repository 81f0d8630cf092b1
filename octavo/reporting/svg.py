"""A matplotlib figure as SVG that lives inside an HTML page.

It takes its colours from the page, so that one drawing serves light and dark; it grows and shrinks
with its place; its text is text; and its ids are its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure

# Colours to draw with: matplotlib writes them out, the page's colours take their places.
TEXT = "#010101"
MUTED = "#010102"
GRID = "#010103"
SERIES = ("#010104", "#010105", "#010106", "#010107", "#010108", "#010109", "#01010a")
_PAGE_COLOURS = {
    TEXT: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES, 1)},
}

# Points are CSS pixels here: the figure's width in points becomes the view box's.
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT,
    "axes.labelsize": 12.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "font.size": 12.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
    "svg.fonttype": "none",
    "svg.hashsalt": "octavo",
    "text.color": TEXT,
    "xtick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "xtick.labelsize": 12,
    "ytick.color": MUTED,
    "ytick.labelcolor": TEXT,
    "ytick.labelsize": 12,
}

_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"'DejaVu Sans'[^;]*")


def to_svg(figure: Figure, *, name: str, label: str, tooltips: Mapping[str, str]) -> str:
    """The figure as an ``<svg>`` element for an HTML page.

    Args:
        figure: drawn in :data:`STYLE`, with the colours above.
        name: unique on the page; begins every id.
        label: what the picture shows, for those who do not see it.
        tooltips: text by the ``gid`` of what it belongs to.
    """
    buffer = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _drop_metadata(root)
    _own_ids(root, name, tooltips)
    for element in root.iter():
        # In HTML the parser knows the namespace.
        element.tag = element.tag.rpartition("}")[2]
        for key, value in element.items():
            element.set(key, _page_style(value))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _drop_metadata(root: ElementTree.Element) -> None:
    """Without what says who drew it, and the style sheet, which would reach the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)


def _own_ids(root: ElementTree.Element, name: str, tooltips: Mapping[str, str]) -> None:
    """Tooltips in their places; ids that are referred to made unique, the others dropped."""
    referred = {
        reference
        for element in root.iter()
        for value in element.attrib.values()
        for reference in _REFERENCE.findall(value)
    } | {
        element.attrib[_HREF].removeprefix("#")
        for element in root.iter()
        if _HREF in element.attrib
    }
    for element in root.iter():
        id = element.attrib.pop("id", "")
        if id in referred:
            element.set("id", f"{name}-{id}")
        if id in tooltips:
            title = ElementTree.Element("title")
            title.text = tooltips[id]
            element.insert(0, title)
        if target := element.attrib.pop(_HREF, None):
            element.set("href", target.replace("#", f"#{name}-"))
        for key, value in element.items():
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", value))


def _page_style(value: str) -> str:
    for drawn, page in _PAGE_COLOURS.items():
        value = value.replace(drawn, page)
    return _FONT.sub("var(--font)", value)
