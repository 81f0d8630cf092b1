"""What is quantized or left out together, and what it costs to leave it out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from octavo import canonical
from octavo.canonical import LayerPlan
from octavo.scheme import Scheme

KV_CACHE, LAYER = "KV cache", "layer"


class Unit(NamedTuple):
    """A part of a decoder layer that engines fuse, and that therefore has one precision.

    Attributes:
        layer: its number.
        name: ``q/k/v``, ``o``, ``gate/up``, ``down``; :data:`KV_CACHE`; :data:`LAYER` for all of them.
        modules: linear layers that are quantized.
        blocks: attention blocks whose keys and values are.
        dynamic: whether their inputs are dynamic where the scheme has static ones.
    """

    layer: int
    name: str
    modules: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    dynamic: bool = False


def units_of(layer: int, plan: LayerPlan, scheme: Scheme) -> list[Unit]:
    """The units of a decoder layer in the order they are computed in, then the whole layer; none
    where nothing is quantized.

    A group of which only a part is quantized is a unit of that part, under the group's name.
    """
    found = []
    for group in canonical.turns(plan):
        modules = tuple(name for name in group if name in plan.linears)
        if modules:
            name = "/".join(module.rpartition(".")[2].removesuffix("_proj") for module in group)
            found.append(Unit(layer, name, modules))
    if scheme.kv_cache == "fp8":
        found.append(Unit(layer, KV_CACHE, (), plan.attention))
    if not found:
        return []
    linears = tuple(module for unit in found for module in unit.modules)
    blocks = tuple(block for unit in found for block in unit.blocks)
    return [*found, Unit(layer, LAYER, linears, blocks)]


def moved(units: Iterable[Unit], scheme: Scheme) -> list[Unit]:
    """Those units whose linear layers have static inputs, with dynamic ones."""
    return [
        unit._replace(dynamic=True)
        for unit in units
        if any(scheme.inputs_of(module) == "static" for module in unit.modules)
    ]


def extra_bytes(unit: Unit, plan: LayerPlan, source: Mapping[str, Tensor], scheme: Scheme) -> int:
    """Bytes that an edition is larger by if the linear layers of a unit keep their dtype.

    Args:
        unit: of the layer.
        plan: of the layer.
        source: meta tensors of the checkpoint, by name.
        scheme: decides which scales would be there.
    """
    layout = canonical.layout_layer(plan, source, scheme)

    def nbytes(tensors: Mapping[str, Tensor]) -> int:
        return sum(
            tensor.nbytes
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] in unit.modules
        )

    return nbytes({name: source[name] for name in plan.tensors}) - nbytes(layout)


def extra_cache_bytes(unit: Unit, source: Mapping[str, Tensor]) -> int:
    """Bytes that a token takes more in the KV cache if those of a unit keep the model's dtype."""
    weights = [
        source[f"{block}.{kind}_proj.weight"] for block in unit.blocks for kind in ("k", "v")
    ]
    return sum(len(weight) * (weight.dtype.itemsize - 1) for weight in weights)
