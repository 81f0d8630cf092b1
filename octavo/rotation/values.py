"""Axes for the values of an attention head, in which the cache, the next inputs and both weights lose least in FP8.

A head's values v and the columns of ``o_proj`` that meet them, O, may be any ``M v`` and ``O M⁻¹``. With C = E[v vᵀ] and P = Oᵀ O the
noise is ``Σ_i (M C Mᵀ)_ii (M⁻ᵀ P M⁻¹)_ii``, and no smaller than ``(tr S)² / n``, S having the eigenvalues of ``(C P)^½``
(Cauchy, and the trace inequality). That is reached where both matrices are S, with one number all along its diagonal: M is the
root of the geometric mean of C⁻¹ and P (Bhatia, Positive Definite Matrices, 2007, section 4.1), then what turns S onto its
eigenvectors, then a Hadamard matrix.
"""

from __future__ import annotations

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
    _, vectors = torch.linalg.eigh(half @ c @ half)
    axes = _flat(size).to(half) @ vectors.T @ half
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


def _flat(size: int) -> Tensor:
    """An orthogonal matrix that spreads sorted eigenvalues evenly over the diagonal: of Hadamard's, as large as goes,
    side by side, each with every so manieth of them."""
    part = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < part:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    return torch.kron(hadamard / part**0.5, torch.eye(size // part, dtype=torch.float64))
