"""The canonical form of a quantized decoder layer: which tensors it has, and their values.

Names and shapes are those of :mod:`octavo.formats.dialect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import fp8
from octavo.errors import not_finite
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
        if scheme.inputs == "static":
            layout[f"{name.removesuffix('weight')}input_scale"] = scale()
    if scheme.kv_cache == "fp8":
        for block in plan.attention:
            layout[f"{block}.k_scale"] = scale()
            layout[f"{block}.v_scale"] = scale()
    return layout


def quantize_layer(
    plan: LayerPlan,
    tensors: Mapping[str, Tensor],
    maxima: Mapping[str, Tensor],
    activations: Mapping[str, Tensor],
    scheme: Scheme,
    pool: Executor,
) -> tuple[dict[str, Tensor], dict[str, fp8.RoundingError]]:
    """Fold one layer into FP8.

    Args:
        plan: the layer.
        tensors: its tensors as stored in the checkpoint.
        maxima: amax of each tensor, from :func:`finite_amax`.
        activations: amax of the linears' inputs (``<module>``) and of keys and values
            (``<block>.k``, ``<block>.v``), float32 scalars; those the scheme needs.
        scheme: how.
        pool: runs the casts, one weight each.

    Returns:
        The canonical tensors on the CPU, and what rounding did to each linear layer's weight.
    """
    errors: dict[str, fp8.RoundingError] = {}
    amax = _weight_amax(plan.linears, maxima, scheme)

    def cast(module: str) -> tuple[Tensor, Tensor, fp8.RoundingError]:
        weight = tensors[f"{module}.weight"]
        found = amax[module] if scheme.weights == "tensor" else _FINER[scheme.weights](weight)
        scale = fp8.scale_from_amax(found)
        return scale, *fp8.quantize_and_measure(weight, scale)

    casts = {module: pool.submit(cast, module) for module in plan.linears}
    canonical: dict[str, Tensor] = {}
    for name in plan.tensors:
        module = name.removesuffix(".weight")
        if module not in casts or not name.endswith(".weight"):
            # A copy: the buffer the tensor lies in is filled again before this one is written.
            canonical[name] = tensors[name].to("cpu", copy=True)
            continue
        scale, codes, errors[module] = casts[module].result()
        canonical[name] = codes.cpu()
        canonical[f"{module}.weight_scale"] = scale.cpu()
        if scheme.inputs == "static":
            canonical[f"{module}.input_scale"] = fp8.scale_from_amax(activations[module])
    if scheme.kv_cache == "fp8":
        for block in plan.attention:
            for kind in ("k", "v"):
                canonical[f"{block}.{kind}_scale"] = fp8.scale_from_amax(
                    activations[f"{block}.{kind}"]
                )
    return canonical, errors


def finite_amax(name: str, tensor: Tensor) -> Tensor:
    """Amax of ``tensor``, float32 scalar; zero if it has no elements.

    Raises:
        OctavoError: it is not finite; names the tensor.
    """
    if not tensor.numel():
        return torch.zeros(())
    result = fp8.amax(tensor)
    if not result.isfinite():
        raise not_finite(name)
    return result


_FINER: dict[Granularity, Callable[[Tensor], Tensor]] = {
    "channel": fp8.amax_by_channel,
    "block": fp8.amax_by_block,
}


def _weight_amax(
    linears: Iterable[str], maxima: Mapping[str, Tensor], scheme: Scheme
) -> dict[str, Tensor]:
    """The amax that a linear layer's one weight scale is taken from, by module name."""
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
