"""FP8 E4M3 numerics: pure functions on tensors.

The format is E4M3 as in "FP8 Formats for Deep Learning" (Micikevicius et al., 2022,
arXiv:2209.05433), PyTorch's ``float8_e4m3fn``: 4 exponent bits, 3 mantissa bits, largest finite
value 448, one NaN pattern per sign, no infinities.

A quantized tensor is a pair of codes and scale with ``value ≈ code · scale``. A scale is float32: a
scalar, ``[rows, 1]``, or ``[⌈rows/128⌉, ⌈columns/128⌉]`` for blocks of a matrix. Quantizing divides
by the scale once, in float32, clamps to ±448 and rounds to nearest even. The reference tools
divide in BF16, which rounds twice.

Casting never converts whole tensors to float32. BF16 on the CPU is cast in one pass; elsewhere the
arithmetic runs through small float32 pieces that stay in cache. A chain of full-size temporaries
is some forty times slower, nearly all of it page faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo import kernels
from octavo.scheme import BLOCK

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

# Elements worked on at a time, by kind of device: small enough for a core's cache, or to be
# no burden on a GPU, and large enough that the cost of a call does not count.
_STRIP = {"cpu": 1 << 20, "cuda": 1 << 26}

Map = Callable[..., Iterable[Any]]
"""Applies a function like ``map``: a thread pool's, for instance. No result depends on which."""

# Codes used as indices at a time: NumPy makes 8 bytes of each.
_INDICES = 1 << 16


def amax(tensor: Tensor, over: Map = map) -> Tensor:
    """Largest absolute value of ``tensor``.

    Args:
        tensor: any shape, at least one element, any floating dtype.
        over: applied to strips of it.

    Returns:
        A float32 scalar, exact. NaN if any element is NaN, +inf if any is infinite.
    """
    strips = torch.split(tensor.reshape(-1), _STRIP[tensor.device.type])
    # torch's maximum hands NaN on.
    return torch.stack(list(over(_amax, strips))).amax() if len(strips) > 1 else _amax(strips[0])


def _amax(strip: Tensor) -> Tensor:
    if _suits_kernels(strip):
        return kernels.amax(strip)
    low, high = torch.aminmax(strip)
    return torch.maximum(-low, high).float()


def amax_by_channel(matrix: Tensor, over: Map = map) -> Tensor:
    """Largest absolute value of each row of ``matrix``, any floating dtype: float32 ``[rows, 1]``."""
    return torch.cat(list(over(_amax_by_channel, torch.split(matrix, _strip_rows(matrix)))))


def _amax_by_channel(matrix: Tensor) -> Tensor:
    if _suits_kernels(matrix):
        return kernels.amax_of_tiles(matrix, (1, max(matrix.shape[1], 1)))
    low, high = torch.aminmax(matrix, dim=1, keepdim=True)
    return torch.maximum(-low, high).float()


def amax_by_block(matrix: Tensor, over: Map = map) -> Tensor:
    """Largest absolute value of each 128 x 128 block of ``matrix``, those at its edges smaller.

    Args:
        matrix: ``[rows, columns]``, any floating dtype.
        over: applied to strips of it.

    Returns:
        float32 ``[⌈rows/128⌉, ⌈columns/128⌉]``.
    """
    return torch.cat(list(over(_amax_by_block, torch.split(matrix, _strip_rows(matrix)))))


def _amax_by_block(matrix: Tensor) -> Tensor:
    if _suits_kernels(matrix):
        return kernels.amax_of_tiles(matrix, (BLOCK, BLOCK))
    strips = []
    for rows in torch.split(matrix, BLOCK):
        low, high = torch.aminmax(rows, dim=0)
        columns = torch.maximum(-low, high).float()
        strips.append(torch.stack([part.amax() for part in torch.split(columns, BLOCK)]))
    return torch.stack(strips)


def _strip_rows(matrix: Tensor) -> int:
    """Rows of a matrix that are worked on at a time: whole blocks."""
    return max(_STRIP[matrix.device.type] // max(matrix.shape[1], 1) // BLOCK, 1) * BLOCK


def _suits_kernels(tensor: Tensor) -> bool:
    """Whether the single-pass kernels take it."""
    on_cpu = tensor.device.type == "cpu"
    return on_cpu and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()


def spread(scale: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """``scale`` as it broadcasts over a tensor of ``shape``: block scales are repeated."""
    if not scale.ndim or tuple(scale.shape) == (shape[0], 1):
        return scale
    rows, columns = shape
    wide = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    return wide.repeat_interleave(BLOCK, 0)[:rows]


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
        tensor: any shape, finite, any floating dtype; a matrix unless ``scale`` is a scalar.
        scale: float32, positive, a scalar or one for each row or block.

    Returns:
        ``float8_e4m3fn``, the shape of ``tensor``.
    """
    return quantize_and_measure(tensor, scale)[0]


def quantize_and_measure(
    tensor: Tensor, scale: Tensor, over: Map = map
) -> tuple[Tensor, RoundingError]:
    """:func:`quantize`, and what it did to the tensor; ``over`` is applied to strips of it."""
    codes = torch.empty(tensor.shape, dtype=E4M3, device=tensor.device)
    sums = list(over(_cast, *zip(*_strips(tensor, scale, codes), strict=True)))
    noise, signal = (math.fsum(part[kind] for part in sums) for kind in (0, 1))
    underflows = sum(part[2] for part in sums)
    return codes, RoundingError(
        10 * math.log10(signal / noise) if noise else None, underflows / max(tensor.numel(), 1)
    )


def measure(tensor: Tensor, codes: Tensor, scale: Tensor) -> RoundingError:
    """What became of a matrix by codes that need not be the nearest; shapes as for :func:`quantize`."""
    noise = signal = 0.0
    underflows, rows = 0, _strip_rows(tensor)
    for top in range(0, len(tensor), rows):
        values = tensor[top : top + rows].float()
        left = dequantize(codes[top : top + rows], rows_of(scale, top, rows, len(tensor)))
        underflows += int(((left == 0) & (values != 0)).sum())
        signal += values.square().sum().item()
        noise += (values - left).square_().sum().item()
    return RoundingError(
        10 * math.log10(signal / noise) if noise else None, underflows / max(tensor.numel(), 1)
    )


def _strips(
    tensor: Tensor, scale: Tensor, codes: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Values, scale and codes of strips of a tensor, each a matrix; one strip at least."""
    if scale.ndim:
        height, rows = len(tensor), _strip_rows(tensor)
        for top in range(0, max(height, 1), rows):
            strip = slice(top, top + rows)
            yield tensor[strip], rows_of(scale, top, rows, height), codes[strip]
        return
    # With one scale the shape does not matter.
    size = _STRIP[tensor.device.type]
    parts = torch.split(tensor.reshape(-1), size)
    for part, place in zip(parts, torch.split(codes.view(-1), size), strict=True):
        yield part.view(1, -1), scale, place.view(1, -1)


def _cast(source: Tensor, scale: Tensor, target: Tensor) -> tuple[float, float, int]:
    """:func:`octavo.kernels.to_e4m3` for any dtype and device."""
    if _suits_kernels(source):
        by_row = not scale.ndim or tuple(scale.shape) == (len(source), 1)
        tile = (1, max(source.shape[1], 1)) if by_row else (BLOCK, BLOCK)
        return kernels.to_e4m3(source, scale if scale.ndim else scale.view(1, 1), tile, target)
    scale = spread(scale, source.shape)
    work = (source.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX)
    target.copy_(work)
    nonzero = work.count_nonzero()
    signal = (work * scale).square_().sum()
    codes = target.float()
    lost = nonzero - codes.count_nonzero()
    noise = work.sub_(codes).mul_(scale).square_().sum()
    noise_sum, signal_sum, underflows = torch.stack([noise, signal, lost]).double().tolist()
    return noise_sum, signal_sum, int(underflows)


def rows_of(scale: Tensor, top: int, rows: int, height: int) -> Tensor:
    """The part of a matrix's scale for some of its rows.

    Args:
        scale: of the matrix.
        top: the first row, a multiple of the block.
        rows: how many.
        height: rows of the matrix.
    """
    if not scale.ndim or scale.shape[0] == height:
        return scale[top : top + rows] if scale.ndim else scale
    return scale[top // BLOCK : -(-(top + rows) // BLOCK)]


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values that ``codes`` and ``scale`` stand for.

    Args:
        codes: ``float8_e4m3fn``, any shape; a matrix unless ``scale`` is a scalar.
        scale: float32, a scalar or one for each row or block.

    Returns:
        float32, the shape of ``codes``.
    """
    if codes.device.type == "cpu":
        # PyTorch widens BF16 numbers much faster.
        return numbers(codes).float().mul_(spread(scale, codes.shape))
    return codes.float().mul_(spread(scale, codes.shape))


def numbers(codes: Tensor) -> Tensor:
    """``float8_e4m3fn`` codes as the BF16 numbers they are, exactly."""
    if codes.device.type != "cpu":
        return codes.to(torch.bfloat16)
    result = torch.empty(codes.shape, dtype=torch.bfloat16)
    kernels.from_e4m3(codes.reshape(-1), result.view(-1))
    return result


def rescale(codes: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, RoundingError]:
    """The codes that stand for the same values with another scale, as nearly as may be.

    There are only 256 codes: each is dequantized and quantized once.

    Args:
        codes: ``float8_e4m3fn``, any shape, on the CPU.
        old: float32 scalar, the scale of ``codes``.
        new: float32 scalar, positive.

    Returns:
        ``float8_e4m3fn``, the shape of ``codes``, and what the change did to the values. A NaN code
        stays one and is not counted.
    """
    every = torch.arange(256).to(torch.uint8).view(E4M3)
    values = dequantize(every, old)
    table = quantize(values, new).view(torch.uint8)
    unusable = values.isnan()
    table[unusable] = every.view(torch.uint8)[unusable]
    result = torch.empty_like(codes)
    source, target = codes.reshape(-1).view(torch.uint8).numpy(), result.view(-1)
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(source), _INDICES):
        piece = source[start : start + _INDICES]
        counts += np.bincount(piece, minlength=256)
        target[start : start + len(piece)] = torch.from_numpy(table.numpy()[piece]).view(E4M3)
    weights = torch.from_numpy(counts).double()[~unusable]
    exact = values.double()[~unusable]
    rounded = table.view(E4M3).double()[~unusable] * new.double()
    signal = (weights * exact.square()).sum().item()
    noise = (weights * (exact - rounded).square()).sum().item()
    lost = weights[(exact != 0) & (rounded == 0)].sum().item()
    return result, RoundingError(
        10 * math.log10(signal / noise) if noise else None, lost / max(len(source), 1)
    )


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
