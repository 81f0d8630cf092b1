"""Fused CPU kernels in the place of ``transformers``' own elementwise chains.

The modelling code stays that of ``transformers``: only RMSNorm, rotary embedding and the gated MLP's
activation are swapped, on the layers that are run and while they are run, for kernels that give the
same BF16 numbers in one pass. They know the maximum of what they wrote, and leave it on the tensor
for the observer to find.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from octavo import fp8, kernels

# The families whose modules compute exactly what the kernels do (a test compares each).
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_NORMS = {f"{family}RMSNorm" for family in _FAMILIES}
_MLPS = {f"{family}MLP" for family in _FAMILIES}
_SILU = {"SiLU", "SiLUActivation"}
_ROTARY = "apply_rotary_pos_emb"


def tensor_amax(tensor: Tensor) -> Tensor:
    """Amax of a tensor, measured once: q, k and v share their input, and fused kernels leave theirs."""
    known: Tensor | None = getattr(tensor, "octavo_amax", None)
    if known is None:
        known = fp8.amax(tensor)
        _with_amax(tensor, known)
    return known


@contextmanager
def fused_kernels(layer: nn.Module) -> Iterator[None]:
    """Run ``layer`` on fused kernels inside the context, where its weights are BF16 on the CPU."""
    weight = next(layer.parameters())
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        yield
        return
    swapped = []
    for module in layer.modules():
        kind = type(module).__name__
        if kind in _NORMS or (kind in _MLPS and type(module.act_fn).__name__ in _SILU):
            # On the instance: the class, and every other model in the process, keeps its own.
            module.forward = partial(_rms_norm if kind in _NORMS else _mlp, module)
            swapped.append(module)
    # A layer calls its rotary function by its name in the module that defines the layer's class.
    namespace = vars(sys.modules[type(layer).__module__])
    original = namespace[_ROTARY]
    namespace[_ROTARY] = partial(_rotary, original)
    try:
        yield
    finally:
        namespace[_ROTARY] = original
        for module in swapped:
            del module.forward


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    return _with_amax(*kernels.rms_norm(x.contiguous(), module.weight, module.variance_epsilon))


def _mlp(module: Any, x: Tensor) -> Tensor:
    hidden = module.gate_proj(x)
    _with_amax(hidden, kernels.silu_mul_(hidden, module.up_proj(x)))
    result: Tensor = module.down_proj(hidden)
    return result


def _rotary(original: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    # The caller made q and k for this call alone, so they may be rotated in place.
    by_token = q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()
    if len(cos) > 1 or not by_token:
        result: tuple[Tensor, Tensor] = original(q, k, cos, sin)
        return result
    kernels.rotary_(q, cos[0], sin[0])
    return q, _with_amax(k, kernels.rotary_(k, cos[0], sin[0]))


def _with_amax(tensor: Tensor, amax: Tensor) -> Tensor:
    # An attribute of our own, which the type of a tensor does not list.
    tensor.octavo_amax = amax  # type: ignore[attr-defined]
    return tensor
