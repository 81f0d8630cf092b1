"""Axes for the values of an attention head, in which the cache, the next inputs and both weights lose least in FP8.

A head's values v and the columns of ``o_proj`` that meet them, O, may be any ``M v`` and ``O M⁻¹``. With C = E[v vᵀ] and P = Oᵀ O the
noise is ``Σ_i (M C Mᵀ)_ii (M⁻ᵀ P M⁻¹)_ii``, and no smaller than ``(tr S)² / n``, S having the eigenvalues of ``(C P)^½``
(Cauchy, and the trace inequality). That is reached where both matrices are S, with one number all along its diagonal: M is the
root of the geometric mean of C⁻¹ and P (Bhatia, Positive Definite Matrices, 2007, section 4.1), then a rotation that levels the
diagonal, which there always is (Horn, 1954).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Added to the diagonals, as a share of their means: directions that are hardly used stay as they are.
_RIDGE = 1e-4


def value_axes(values: Tensor, outputs: Tensor) -> Tensor:
    """M of one head.

    Args:
        values: second moments of the head's values, symmetric ``[head_dim, head_dim]``.
        outputs: ``Oᵀ O``, likewise.

    Returns:
        M, float64 ``[head_dim, head_dim]``, such that values keep their mean square; the identity where there
        are no values, or nothing reads them.
    """
    size = len(values)
    c, p = (_ridged(one.double()) for one in (values, outputs))
    if c is None or p is None:
        return torch.eye(size, dtype=torch.float64, device=values.device)
    root = _power(c, 0.5)
    inverse = _power(c, -0.5)
    mean = inverse @ _power(root @ p @ root, 0.5) @ inverse
    half = _power(mean, 0.5)
    axes = _levelling(half @ c @ half) @ half
    result: Tensor = axes * (c.trace() / (axes @ c @ axes.T).trace()).sqrt()
    return result


def _ridged(moments: Tensor) -> Tensor | None:
    mean = moments.diagonal().mean()
    if not mean > 0:
        return None
    return moments + _RIDGE * mean * torch.eye(len(moments)).to(moments)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    # Positive, but for rounding.
    result: Tensor = (vectors * values.clamp_min(values[-1] * 1e-12) ** exponent) @ vectors.T
    return result


def _levelling(matrix: Tensor) -> Tensor:
    """An orthogonal Q that makes the diagonal of ``Q matrix Qᵀ`` its mean throughout: the largest and the smallest are
    turned against each other until one of them is the mean, and so on."""
    size, mean = len(matrix), matrix.diagonal().mean().item()
    matrix, turned = matrix.clone(), torch.eye(size).to(matrix)
    for _ in range(size - 1):
        diagonal = matrix.diagonal()
        high, low = int(diagonal.argmax()), int(diagonal.argmin())
        above, below = diagonal[high].item() - mean, diagonal[low].item() - mean
        if not above > 0 > below:
            break
        beside = matrix[high, low].item()
        # The tangent of the angle at which the larger becomes the mean.
        tangent = (math.sqrt(beside * beside - above * below) - beside) / below
        cosine = 1 / math.sqrt(1 + tangent * tangent)
        turn = torch.tensor([[1, tangent], [-tangent, 1]]).to(matrix) * cosine
        pair = [high, low]
        matrix[pair] = turn @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ turn.T
        turned[pair] = turn @ turned[pair]
    return turned
