"""Statistics by name, arranged by decoder layer and projection."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

# `model.layers.11.mlp.down_proj`: layer 11, `down_proj`. Four digits bound what is drawn.
_NAME = re.compile(r"(?:.*\.)?layers\.(\d{1,4})\.(?:.*\.)?([^.]+)")


# In the order a decoder layer runs them; others follow in the order of the record.
_ORDER = ("q", "k", "v", "o", "gate", "up", "down")


class Cell(NamedTuple):
    """One statistic of one projection in one layer."""

    layer: int
    kind: str
    value: float

    @property
    def where(self) -> str:
        """``layer 11 down``."""
        return f"layer {self.layer} {self.kind}"


class LayerTable(NamedTuple):
    """A statistic by layer and projection; not every layer has every projection.

    Attributes:
        layers: number of layers, the first is 0.
        kinds: projections in the order they run, without their ``_proj``.
        values: by layer and projection.
    """

    layers: int
    kinds: tuple[str, ...]
    values: dict[tuple[int, str], float]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(layer, kind, value) for (layer, kind), value in self.values.items()]

    @property
    def complete(self) -> bool:
        """Whether every layer has every projection."""
        return len(self.values) == self.layers * len(self.kinds)

    def series(self, kind: str) -> list[float]:
        """One projection's values in the order of layers; NaN where it has none."""
        return [self.values.get((layer, kind), float("nan")) for layer in range(self.layers)]


def arrange(
    statistics: Mapping[str, float], *, worst: Callable[[Iterable[float]], float]
) -> LayerTable | None:
    """The statistics of decoder layers as a table; None if there are none.

    Args:
        statistics: by module name; names outside decoder layers are left out.
        worst: what stands for several modules of one kind in a layer, such as a layer's experts:
            ``min`` or ``max``.
    """
    values: dict[tuple[int, str], float] = {}
    for name, value in statistics.items():
        if match := _NAME.fullmatch(name):
            place = int(match[1]), match[2].removesuffix("_proj")
            values[place] = worst((values.get(place, value), value))
    if not values:
        return None
    layers = 1 + max(layer for layer, _ in values)
    kinds = dict.fromkeys(kind for _, kind in values)
    known = [kind for kind in _ORDER if kind in kinds]
    return LayerTable(layers, tuple(dict.fromkeys([*known, *kinds])), values)


def merge_equal(table: LayerTable) -> LayerTable:
    """Projections that share all their values become one: ``q/k/v`` read the same input."""
    groups: dict[tuple[float | None, ...], list[str]] = {}
    for kind in table.kinds:
        key = tuple(table.values.get((layer, kind)) for layer in range(table.layers))
        groups.setdefault(key, []).append(kind)
    names = {kinds[0]: "/".join(kinds) for kinds in groups.values()}
    values = {
        (layer, names[kind]): value
        for (layer, kind), value in table.values.items()
        if kind in names
    }
    return LayerTable(table.layers, tuple(names.values()), values)
