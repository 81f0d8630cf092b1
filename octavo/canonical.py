"""The canonical form of a quantized decoder layer: which tensors it has, and their values.

Names and shapes are those of :mod:`octavo.formats.dialect`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo import fp8
from octavo.alignment import power_of_two
from octavo.errors import not_finite
from octavo.rounding.gptq import Feedback, round_weight
from octavo.scheme import BLOCK, FUSED_GROUPS, Granularity, Scheme

# The shape of a weight scale, from rows and columns of the weight.
SCALE_SHAPES: dict[Granularity, Callable[[int, int], tuple[int, ...]]] = {
    "tensor": lambda rows, columns: (),
    "channel": lambda rows, columns: (rows, 1),
    "block": lambda rows, columns: (-(-rows // BLOCK), -(-columns // BLOCK)),
}


class LayerPlan(NamedTuple):
    """What happens to the tensors of one decoder layer.

    Attributes:
        tensors: the checkpoint's names, in the model's order.
        linears: linear layers to quantize; every other tensor is carried over.
        kept: linear layers that keep their dtype.
        attention: attention blocks that get KV scales.
    """

    tensors: tuple[str, ...]
    linears: tuple[str, ...]
    kept: tuple[str, ...]
    attention: tuple[str, ...]


def layout_layer(
    plan: LayerPlan, source: Mapping[str, Tensor], scheme: Scheme
) -> dict[str, Tensor]:
    """The canonical tensors of a layer as meta tensors, in the order they are written.

    Args:
        plan: the layer.
        source: meta tensors of the checkpoint, by name.
        scheme: decides which scales exist.
    """

    def scale(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    weights = {f"{module}.weight" for module in plan.linears}
    layout: dict[str, Tensor] = {}
    for name in plan.tensors:
        if name not in weights:
            layout[name] = source[name]
            continue
        layout[name] = source[name].to(fp8.E4M3)
        layout[f"{name}_scale"] = scale(*SCALE_SHAPES[scheme.weights](*source[name].shape))
        if scheme.inputs_of(name.removesuffix(".weight")) == "static":
            layout[f"{name.removesuffix('weight')}input_scale"] = scale()
    if scheme.kv_cache == "fp8":
        for block in plan.attention:
            layout[f"{block}.k_scale"] = scale()
            layout[f"{block}.v_scale"] = scale()
    return layout


def units(plan: LayerPlan, fuses: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tensors of a layer in groups that are quantized and stored together.

    Args:
        plan: the layer.
        fuses: linear layers a dialect stores as one tensor, by the last part of their names.

    Returns:
        Names of the checkpoint: each module's tensors, or those of all modules of a fused tensor.
    """
    groups: dict[str, list[str]] = {}
    for name in plan.tensors:
        module = name.rpartition(".")[0]
        parent, _, projection = module.rpartition(".")
        fused = [group for group in fuses if projection in group]
        groups.setdefault(f"{parent} {fused[0]}" if fused else module, []).append(name)
    return list(groups.values())


def quantize_unit(
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    amax: Mapping[str, Tensor],
    activations: Mapping[str, Tensor],
    scheme: Scheme,
    over: fp8.Map = map,
    feedback: Feedback | None = None,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Fold some tensors of a layer into FP8.

    Args:
        names: of :func:`units`.
        tensors: the layer's, as stored in the checkpoint.
        amax: of the weights to quantize, by module, from :func:`weight_amax`; other tensors are
            carried over.
        activations: amax of the linears' inputs by module, float32 scalars, where they are static.
        scheme: how.
        over: applied to strips of a tensor.
        feedback: of the linears' inputs, to round by; None to round to nearest.

    Returns:
        The canonical tensors, and what rounding did to each linear layer's weight.
    """
    errors: dict[str, dict[str, Any]] = {}
    canonical: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if module not in amax or not name.endswith(".weight"):
            # A copy: the buffer the tensor lies in is filled again before this one is written.
            canonical[name] = tensors[name].clone()
            continue
        finer = _FINER.get(scheme.weights)
        scale = fp8.scale_from_amax(finer(tensors[name], over) if finer else amax[module])
        canonical[name], errors[module] = _round(tensors[name], scale, over, feedback)
        canonical[f"{module}.weight_scale"] = scale
        if scheme.inputs_of(module) == "static":
            canonical[f"{module}.input_scale"] = fp8.scale_from_amax(activations[module])
    return canonical, errors


def _round(
    weight: Tensor, scale: Tensor, over: fp8.Map, feedback: Feedback | None
) -> tuple[Tensor, dict[str, Any]]:
    """Codes of a weight, and what rounding did to it."""
    if feedback is None:
        codes, error = fp8.quantize_and_measure(weight, scale, over)
        return codes, error._asdict()
    found = round_weight(weight, scale, feedback, over)
    return found.codes, {
        **fp8.measure(weight, found.codes, scale)._asdict(),
        "output_gain_db": found.gain_db,
        "nearest_rows": found.nearest_rows,
        "damping": feedback.damping,
    }


def turns(plan: LayerPlan) -> list[list[str]]:
    """The linear layers of a decoder layer, in groups that share an input, in the order they are computed in."""
    every = {f"{module}.weight": module for module in (*plan.linears, *plan.kept)}
    linears = [every[name] for name in plan.tensors if name in every]
    shared = {module: group for group in fused_groups(linears) for module in group}
    groups = [shared.get(module, [module]) for module in linears]
    return [group for module, group in zip(linears, groups, strict=True) if group[0] == module]


def inputs(plan: LayerPlan) -> list[list[str]]:
    """The linear layers that are quantized, in groups that share an input."""
    groups = [[name for name in group if name in plan.linears] for group in turns(plan)]
    return [group for group in groups if group]


def cache_scales(
    plan: LayerPlan,
    activations: Mapping[str, Tensor],
    scheme: Scheme,
    aligned: Collection[str] = (),
) -> dict[str, Tensor]:
    """The canonical scales of a layer's KV cache.

    Args:
        plan: the layer.
        activations: amax of ``<block>.k`` and ``<block>.v``.
        scheme: whether there is an FP8 cache.
        aligned: attention blocks whose keys were moved onto its numbers (:mod:`octavo.alignment`).
    """
    if scheme.kv_cache == "none":
        return {}
    scales = {
        f"{block}.{kind}_scale": fp8.scale_from_amax(activations[f"{block}.{kind}"])
        for block in plan.attention
        for kind in ("k", "v")
    }
    for name in (f"{block}.k_scale" for block in plan.attention if block in aligned):
        scales[name] = power_of_two(scales[name])
    return scales


def finite_amax(name: str, tensor: Tensor, over: fp8.Map = map) -> Tensor:
    """Amax of ``tensor``, float32 scalar; zero if it has no elements.

    Raises:
        OctavoError: it is not finite; names the tensor.
    """
    if not tensor.numel():
        return torch.zeros(())
    result = fp8.amax(tensor, over)
    if not result.isfinite():
        raise not_finite(name)
    return result


_FINER: dict[Granularity, Callable[[Tensor, fp8.Map], Tensor]] = {
    "channel": fp8.amax_by_channel,
    "block": fp8.amax_by_block,
}


def weight_amax(
    linears: Iterable[str], maxima: Mapping[str, Tensor], scheme: Scheme
) -> dict[str, Tensor]:
    """The amax that a linear layer's one weight scale is taken from, by module name.

    Args:
        linears: those to quantize.
        maxima: amax of each tensor, from :func:`finite_amax`.
        scheme: decides which share one.
    """
    merged = {module: maxima[f"{module}.weight"] for module in linears}
    if scheme.merge_scales:
        for members in fused_groups(merged):
            shared = torch.stack([merged[module] for module in members]).amax()
            merged |= dict.fromkeys(members, shared)
    return merged


def partial_blocks(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """What to know of weights that blocks of 128 x 128 do not divide; None if they divide all.

    Args:
        shapes: by module name.
    """
    partial = [name for name, shape in shapes.items() if any(size % BLOCK for size in shape)]
    if not partial:
        return None
    return (
        f"{len(partial)} of {len(shapes)} weights, {partial[0]} of {list(shapes[partial[0]])} among them, "
        f"have sizes that are no multiple of {BLOCK}, so that blocks at their edges are smaller. vLLM 0.32 misreads "
        "the scales of such layers where it fuses them, without a word; `transformers` on a CPU refuses or misreads "
        "them. Exclude them, or choose another scheme. Octavo reads them."
    )


def fused_groups(linears: Iterable[str]) -> list[list[str]]:
    """The linear layers that engines fuse into one matrix, group by group."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in linears:
        parent, projection = name.rsplit(".", 1)
        for number, group in enumerate(FUSED_GROUPS):
            if projection in group:
                groups.setdefault((parent, number), []).append(name)
    return list(groups.values())
