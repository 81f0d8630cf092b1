"""What the scale of an input, of keys or of values is taken from: the magnitude that becomes 448.

The largest magnitude seen (amax) is the plain choice. The others look at how often each magnitude occurred. There
are only 32,768 of them in BF16, so counts lose nothing, and as integers do not depend on the order of batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import fp8, kernels
from octavo.scheme import Scales

MAGNITUDES = 1 << 15
COUNTS_BYTES = MAGNITUDES * 8

# The share of values that "percentile" does not clip.
PERCENTILE = 0.9999

# Candidates, as multiples of amax. E4M3's precision is relative: a range of up to twice amax costs nothing but the
# smallest values, and moves the grid under values that are always alike, as those of outlier channels are. Beyond
# one octave the same grids come again, and below amax outliers would be clipped.
_CANDIDATES = [2 ** (step / 64) for step in range(64)]


def count(tensor: Tensor) -> Tensor:
    """How often each magnitude occurs.

    Args:
        tensor: any shape and floating dtype; other than BF16, it is rounded to that first.

    Returns:
        int64 ``[32768]`` on the CPU, indexed by the bits of the BF16 magnitude.
    """
    values = tensor.to(torch.bfloat16).contiguous()
    if values.device.type == "cpu":
        counts = torch.zeros(MAGNITUDES, dtype=torch.int64)
        kernels.count_magnitudes(values, counts)
        return counts
    bits = values.view(torch.int16).bitwise_and_(MAGNITUDES - 1)
    return torch.bincount(bits.reshape(-1).int(), minlength=MAGNITUDES).cpu()


def range_of(amax: Tensor, counts: Tensor, choice: Scales) -> Tensor:
    """The magnitude that is to become the largest E4M3 number.

    Args:
        amax: float32 scalar, finite: the largest magnitude.
        counts: from :func:`count`, of values that are finite.
        choice: ``mse``: between amax and twice that, where the squared error of all values is least.
            ``percentile``: the one that 99.99 % of values do not exceed.

    Returns:
        A float32 scalar.
    """
    seen = counts.nonzero().squeeze(1)
    values, times = _magnitude(seen), counts[seen].double()
    if not amax:
        return amax
    if choice == "percentile":
        below = times.cumsum(0) / times.sum()
        found = values[int((below < PERCENTILE).sum().clamp_max(len(values) - 1))]
        return found if found else amax
    ranges = [amax * factor for factor in _CANDIDATES]
    errors = [(times * _squared_errors(values, one)).sum() for one in ranges]
    return ranges[int(torch.stack(errors).argmin())]


def _magnitude(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.bfloat16).float()


def _squared_errors(values: Tensor, range_: Tensor) -> Tensor:
    scale = fp8.scale_from_amax(range_)
    rounded = fp8.dequantize(fp8.quantize(values, scale), scale)
    return (values.double() - rounded.double()).square()
