"""Codes of a weight learned by gradient descent: rounding as a straight-through estimator (Bengio et al., 2013,
arXiv:1308.3432), steps by Adam (Kingma & Ba, 2015, arXiv:1412.6980).

Each number has a place on the real line, which begins at its code and moves in units of the distance between codes
there; its code is the nearest to that place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo import fp8

# Of E4M3: bits of the mantissa, and the exponent of its smallest normal number (OCP OFP8, table 1).
_MANTISSA, _LEAST_EXPONENT = 3, -6

# The last gradients count for more than is usual: there are few steps.
_BETAS = (0.9, 0.95)


class LearnedCodes:
    """The codes of one weight, on their way.

    Attributes:
        codes: ``float8_e4m3fn``, as they are now.
    """

    def __init__(self, codes: Tensor, scale: Tensor, rate: float) -> None:
        """
        Args:
            codes: ``float8_e4m3fn`` ``[rows, columns]``, where to begin.
            scale: float32, as for :func:`octavo.fp8.dequantize`.
            rate: how far a number moves in the first step, at most about, in distances between codes.
        """
        self.codes, self._first, self._rate = codes, fp8.numbers(codes), rate
        self._scale = fp8.spread(scale, tuple(codes.shape))
        self._unit = code_distance(codes)
        self._moved = torch.zeros(codes.shape, device=codes.device, requires_grad=True)
        # Gradients are as small as losses: nothing is to be added to their size.
        self._adam = torch.optim.Adam([self._moved], lr=rate, betas=_BETAS, eps=1e-20, fused=True)

    def step(self, gradient: Tensor, left: float) -> None:
        """Move once.

        Args:
            gradient: of the loss by the dequantized weight, float32 ``[rows, columns]``; overwritten.
            left: of the steps, as a share: they become smaller.
        """
        self._moved.grad = gradient.mul_(self._unit).mul_(self._scale)
        self._adam.param_groups[0]["lr"] = self._rate * left
        self._adam.step()
        self._moved.grad = None
        place = self._moved.detach() * self._unit
        place += self._first
        # By way of BF16, which is cast in one pass, and still tells a sixteenth of the distance.
        self.codes = fp8.quantize(place.bfloat16(), torch.ones((), device=place.device))

    def values(self, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, as a new tensor."""
        return (fp8.numbers(self.codes).to(dtype) * self._scale).to(dtype)

    @property
    def changed(self) -> int:
        """How many codes are no longer those of the beginning."""
        return int((fp8.numbers(self.codes) != self._first).sum())


def code_distance(codes: Tensor) -> Tensor:
    """The distance of E4M3 numbers to the next one away from zero, BF16, exact."""
    numbers = codes.float()
    exponents = torch.where(numbers == 0, _LEAST_EXPONENT, torch.frexp(numbers).exponent - 1)
    return torch.exp2(exponents.clamp_min_(_LEAST_EXPONENT) - _MANTISSA).bfloat16()
