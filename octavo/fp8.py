"""FP8 E4M3 numerics: pure functions on tensors.

The format is E4M3 as in "FP8 Formats for Deep Learning" (Micikevicius et al., 2022,
arXiv:2209.05433), PyTorch's ``float8_e4m3fn``: 4 exponent bits, 3 mantissa bits, largest finite
value 448, one NaN pattern per sign, no infinities.

A quantized tensor is a pair of codes and scale with ``value ≈ code · scale``. Quantizing divides
by the scale once, in float32, clamps to ±448 and rounds to nearest even. The reference tools
divide in BF16, which rounds twice.

Whole tensors are never converted to float32. BF16 on the CPU is cast in one pass; elsewhere the
arithmetic runs through a small float32 buffer that stays in cache. A chain of full-size temporaries
is some forty times slower, nearly all of it page faults.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import kernels

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

# Elements of the float32 work buffer, by kind of device: small enough for a core's cache, or to be
# no burden on a GPU, and large enough that the cost of a call does not count.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}


def amax(tensor: Tensor) -> Tensor:
    """Largest absolute value of ``tensor``.

    Args:
        tensor: any shape, at least one element, any floating dtype.

    Returns:
        A float32 scalar, exact. NaN if any element is NaN, +inf if any is infinite.
    """
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and tensor.is_contiguous():
        return kernels.amax(tensor)
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).float()


def scale_from_amax(amax: Tensor) -> Tensor:
    """The scale that maps ``amax`` onto the largest E4M3 value: ``amax / 448``.

    Args:
        amax: float32, any shape, finite and not negative.

    Returns:
        float32, same shape, always positive: 1 where ``amax`` is 0 (nothing to represent), and at
        least the smallest normal float32, so that dividing by it cannot overflow to NaN.
    """
    scale = (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


class RoundingError(NamedTuple):
    """What rounding a tensor to E4M3 did to it.

    Attributes:
        sqnr_db: signal to quantization noise, ``10 log10(Σ w² / Σ (w - ŵ)²)``; None without noise.
        underflow: share of its elements that became zero without being zero.
    """

    sqnr_db: float | None
    underflow: float


def quantize(tensor: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of ``tensor``, rounded to nearest even, saturating at ±448.

    Args:
        tensor: any shape, finite, any floating dtype.
        scale: float32 scalar, positive.

    Returns:
        ``float8_e4m3fn``, the shape of ``tensor``.
    """
    return quantize_and_measure(tensor, scale)[0]


def quantize_and_measure(tensor: Tensor, scale: Tensor) -> tuple[Tensor, RoundingError]:
    """:func:`quantize`, and what it did to the tensor."""
    codes = torch.empty(tensor.shape, dtype=E4M3, device=tensor.device)
    source, target = tensor.reshape(-1), codes.view(-1)
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        noise, signal, underflows = kernels.to_e4m3(source, scale.item(), target)
    else:
        noise, signal, underflows = _cast_in_chunks(source, scale, target)
    return codes, RoundingError(
        10 * math.log10(signal / noise) if noise else None, underflows / max(len(source), 1)
    )


def _cast_in_chunks(source: Tensor, scale: Tensor, target: Tensor) -> tuple[float, float, int]:
    """:func:`octavo.kernels.to_e4m3` for any dtype and device."""
    chunk = _CHUNK[source.device.type]
    buffer = torch.empty(min(chunk, source.numel()), dtype=torch.float32, device=source.device)
    sums = torch.zeros(3, dtype=torch.float64, device=source.device)
    for start in range(0, source.numel(), chunk):
        piece, codes = source[start : start + chunk], target[start : start + chunk]
        work = buffer[: piece.numel()].copy_(piece)
        work.div_(scale).clamp_(-E4M3_MAX, E4M3_MAX)
        codes.copy_(work)
        sums[1] += work.square().sum()
        sums[2] += work.count_nonzero()
        work.sub_(codes.float())
        sums[0] += work.square_().sum()
        sums[2] -= codes.float().count_nonzero()
    noise, signal, underflows = sums.tolist()
    return noise, signal, int(underflows)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values that ``codes`` and ``scale`` stand for.

    Args:
        codes: ``float8_e4m3fn``, any shape.
        scale: float32, broadcastable to ``codes``.

    Returns:
        float32, the shape of ``codes``.
    """
    return codes.to(torch.float32).mul_(scale)


def round_trip(tensor: Tensor, scale: Tensor) -> Tensor:
    """What is left of ``tensor`` after E4M3 storage: quantized and dequantized.

    Args:
        tensor: any shape, any floating dtype.
        scale: float32 scalar, positive.

    Returns:
        The shape and dtype of ``tensor``.
    """
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        result = torch.empty(tensor.shape, dtype=tensor.dtype)
        kernels.through_e4m3(tensor.reshape(-1), scale.item(), result.view(-1))
        return result
    return dequantize(quantize(tensor, scale), scale).to(tensor.dtype)
