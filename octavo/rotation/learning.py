"""The rotation in which FP8 loses least, learned from second moments (rotations learned for integers: Liu et al., 2024,
SpinQuant, arXiv:2405.16406; there outliers decide, here the product of inputs and columns).

With R = (I + K)⁻¹ (I - K) = 2 (I + K)⁻¹ - I, K = S - Sᵀ (Cayley), every S is a rotation; Adam finds it, from none on, a few
norms at a step.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.rotation.basis import Rotation, inverses

# Steps, how far each goes at first, and norms in each.
_STEPS, _RATE, _NORMS = 120, 2e-3, 24


class Moments(Protocol):
    """What stands behind each norm, in blocks of channels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Second moments of what the norm gives (without its weight) and of the weights that read it, each float32
        ``[blocks, size, size]``; the second in units that make the sum of the products of their diagonals 1."""
        ...


class Learned(NamedTuple):
    """What was found.

    Attributes:
        rotation: of the hidden states.
        noise: in its axes, as a share of that in the model's own: the mean over norms.
    """

    rotation: Rotation
    noise: float


def learn_rotation(moments: Moments, order: Tensor) -> Learned:
    """Find it.

    Args:
        moments: of each norm.
        order: channels, those of a block side by side.

    Returns:
        The rotation; none, with noise 1, if that is not smaller.
    """
    first, _ = moments[0]
    angles = torch.zeros_like(first, requires_grad=True)
    adam = torch.optim.Adam([angles], lr=_RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(_STEPS):
            for group in adam.param_groups:
                group["lr"] = _RATE * (1 - step / _STEPS)
            chosen = torch.randperm(len(moments), generator=generator)[:_NORMS].tolist()
            adam.zero_grad()
            # A norm's gradient at a time by those of the rotation: the graphs of all would be much memory.
            blocks = _cayley(angles)
            turned = blocks.detach().requires_grad_()
            for index in chosen:
                torch.autograd.backward(_noise(turned, *moments[index]) / len(chosen))
            torch.autograd.backward(blocks, turned.grad)
            adam.step()
    with torch.no_grad():
        blocks = _cayley(angles.double()).float()
        noise = mean_noise(blocks, moments)
    if not noise < 1:
        return Learned(Rotation(order, torch.eye(first.shape[-1]).to(first).expand_as(first)), 1.0)
    return Learned(Rotation(order, blocks), noise)


def mean_noise(blocks: Tensor, moments: Moments) -> float:
    """The noise in the axes that ``blocks`` turn to, as a share of that in the model's own: the mean over norms."""
    noises = [_noise(blocks, *moments[index]).item() for index in range(len(moments))]
    return sum(noises) / len(noises)


def _cayley(angles: Tensor) -> Tensor:
    skew = angles - angles.mT
    identity = torch.eye(angles.shape[-1], dtype=angles.dtype, device=angles.device)
    return 2 * inverses(identity + skew) - identity


def _noise(blocks: Tensor, inputs: Tensor, weights: Tensor) -> Tensor:
    """The sum over channels of the inputs' power times that of the columns that meet them."""
    powers, columns = (((blocks @ one) * blocks).sum(-1) for one in (inputs, weights))
    return (powers * columns).sum()
