"""Second-order rounding: GPTQ (Frantar et al., 2022, arXiv:2210.17323) onto the E4M3 grid.

A linear layer's output error for weights moved by D is tr(D H Dᵀ), H being the second moments of its inputs.
Columns are rounded one after another, and after each the columns still to come are moved so as to make up for
its error as well as they can. What that takes of H is the Cholesky factor of its inverse, U with Uᵀ U = H⁻¹.
Then each column once more takes the codes that are best given all others: a sweep of coordinate descent on the same error
(Behdin et al., 2023, QuantEase, arXiv:2309.01885), for columns that were rounded early had no say in what came after.

The rows of a weight do not depend on each other: each keeps its nearest codes where those leave a smaller error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, argsort

from octavo import fp8, kernels
from octavo.errors import OctavoError
from octavo.scheme import BLOCK

# Added to the diagonal of the second moments, as a share of its mean (Frantar et al., section 3.3).
DAMPING = 0.01

# Damping is raised by this factor until there is a Cholesky factor, so often at most.
_RAISE, _TRIES = 10.0, 5

# Columns that are rounded before what they left is carried to all that follow.
_COLUMNS = 128

# Elements of the rows that are worked on at a time.
_STRIP = 1 << 17


class Feedback(NamedTuple):
    """What rounding a weight needs to know of its inputs.

    Attributes:
        order: columns, the first to be rounded first: int64 ``[columns]``.
        factor: U, upper triangular, float32 ``[columns, columns]``, in that order.
        moments: second moments, damped, float32 ``[columns, columns]``, in that order.
        damping: what was added to their diagonal, as a share of its mean.
    """

    order: Tensor
    factor: Tensor
    moments: Tensor
    damping: float


class FeedbackResult(NamedTuple):
    """What a weight was rounded to.

    Attributes:
        codes: ``float8_e4m3fn`` ``[rows, columns]``.
        gain_db: how much smaller the squared error of the outputs is than with nearest codes, on the inputs
            the moments are of: ``10 log10(nearest / this)``; 0 where neither has any.
        nearest_rows: rows that kept their nearest codes.
    """

    codes: Tensor
    gain_db: float
    nearest_rows: int


def prepare(moments: Tensor, damping: float = DAMPING) -> Feedback:
    """Factor second moments, which are overwritten.

    Args:
        moments: float32 ``[columns, columns]``, symmetric: the sum of ``xᵀ x`` over tokens.
        damping: added to the diagonal, as a share of its mean; raised where that is not enough.

    Raises:
        OctavoError: the moments are not finite.
    """
    diagonal = moments.diagonal()
    # An input that is always zero has no say: its weights have no error to make up for.
    diagonal[diagonal <= 0] = 1.0
    order = argsort(diagonal, descending=True, stable=True)
    moments = moments[order.unsqueeze(1), order]
    mean, added = moments.diagonal().mean().item(), 0.0
    for _ in range(_TRIES):
        moments.diagonal().add_((damping - added) * mean)
        added = damping
        factor = _factor(moments)
        if factor is not None:
            return Feedback(order, factor, moments, added)
        damping *= _RAISE
    raise OctavoError(
        "The second moments of a layer's inputs have no Cholesky factor: its activations are too large for float32, "
        "or not finite. Check the checkpoint with another tool, or pass --rounding nearest."
    )


def _factor(moments: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse, if rounding errors leave one."""
    lower, failed = torch.linalg.cholesky_ex(moments)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not upper.isfinite().all() else upper


def round_weight(
    weight: Tensor, scale: Tensor, given: Feedback, over: fp8.Map = map
) -> FeedbackResult:
    """E4M3 codes of a weight, the error of each column made up for by those after it.

    Args:
        weight: ``[rows, columns]``, any floating dtype, finite.
        scale: float32, as for :func:`octavo.fp8.quantize`.
        given: of its inputs.
        over: applied to strips of rows.
    """
    height, columns = weight.shape
    # Whole blocks, for scales of blocks.
    step = -(-max(_STRIP // columns, 1) // BLOCK) * BLOCK
    tops = range(0, height, step)

    def strip(top: int) -> tuple[Tensor, Tensor, Tensor]:
        part = weight[top : top + step]
        return _round_rows(part, fp8.rows_of(scale, top, step, height), given)

    codes, losses, nearest = (torch.cat(parts) for parts in zip(*over(strip, tops), strict=True))
    kept = losses >= nearest
    before, after = (
        nearest.double().sum().item(),
        torch.minimum(losses, nearest).double().sum().item(),
    )
    gain = 10 * math.log10(before / after) if after else 0.0
    return FeedbackResult(codes, gain, int((kept & (nearest > 0)).sum()))


def _round_rows(weight: Tensor, scale: Tensor, given: Feedback) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of some rows, and each row's squared error of outputs with these and with nearest codes."""
    rows, columns = weight.shape
    work = weight.float()
    scales = fp8.spread(scale, weight.shape).expand(rows, columns)
    nearest = fp8.quantize(weight, scale)
    moved = (work - fp8.dequantize(nearest, scale))[:, given.order]
    moved = torch.linalg.solve_triangular(given.factor, moved, upper=True, left=False)
    at_nearest = moved.square_().sum(dim=1)
    del moved
    work = work[:, given.order]
    codes = torch.empty_like(nearest)
    losses = torch.zeros_like(at_nearest)
    for start in range(0, columns, _COLUMNS):
        block = slice(start, start + _COLUMNS)
        place = given.order[block]
        errors = torch.empty_like(work[:, block])
        chosen = torch.empty_like(errors, dtype=fp8.E4M3)
        feed_back = kernels.round_with_feedback if errors.device.type == "cpu" else _feed_back
        feed_back(
            work[:, block],
            given.factor[block, block],
            scales[:, place].contiguous(),
            chosen,
            errors,
        )
        codes.view(torch.uint8)[:, place] = chosen.view(torch.uint8)
        losses += errors.square().sum(dim=1)
        work[:, block.stop :] -= errors @ given.factor[block, block.stop :]
    del work
    losses += _descend(weight, scale, codes, given)
    kept = losses >= at_nearest
    codes.view(torch.uint8)[kept] = nearest.view(torch.uint8)[kept]
    return codes, losses, at_nearest


def _descend(weight: Tensor, scale: Tensor, codes: Tensor, given: Feedback) -> Tensor:
    """A sweep of coordinate descent over the columns of ``codes``; how much each row's squared error of outputs changes,
    which is never upwards."""
    rows, columns = weight.shape
    exact = weight.float()[:, given.order]
    moved = fp8.dequantize(codes, scale)[:, given.order].sub_(exact)
    scales = fp8.spread(scale, weight.shape).expand(rows, columns)
    changes = torch.zeros(rows, device=weight.device)
    for start in range(0, columns, _COLUMNS):
        block = slice(start, start + _COLUMNS)
        place = given.order[block]
        chosen = codes.view(torch.uint8)[:, place].view(fp8.E4M3)
        descend = kernels.descend if exact.device.type == "cpu" else _descend_block
        descend(
            exact[:, block],
            given.moments[block, block],
            scales[:, place].contiguous(),
            moved @ given.moments[:, block],
            moved[:, block],
            chosen,
            changes,
        )
        codes.view(torch.uint8)[:, place] = chosen.view(torch.uint8)
    return changes


def _descend_block(
    weight: Tensor,
    moments: Tensor,
    scales: Tensor,
    slopes: Tensor,
    moved: Tensor,
    codes: Tensor,
    changes: Tensor,
) -> None:
    """:func:`octavo.kernels.descend` on any device."""
    for column in range(len(moments)):
        scale, curvature = scales[:, column], moments[column, column]
        best = weight[:, column] + moved[:, column] - slopes[:, column] / curvature
        scaled = (best / scale).clamp_(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3)
        step = scaled.float() * scale - weight[:, column] - moved[:, column]
        better = step * (2 * slopes[:, column] + curvature * step)
        step = torch.where(better < 0, step, torch.zeros_like(step))
        changes += better.clamp(max=0)
        moved[:, column] += step
        stay = (better >= 0).nonzero().squeeze(1)
        kept = codes.view(torch.uint8)[stay, column]
        codes.view(torch.uint8)[:, column] = scaled.view(torch.uint8)
        codes.view(torch.uint8)[stay, column] = kept
        slopes[:, column + 1 :] += step.unsqueeze(1) * moments[column, column + 1 :]


def _feed_back(
    weight: Tensor, factor: Tensor, scales: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """:func:`octavo.kernels.round_with_feedback` on any device."""
    for column in range(len(factor)):
        values, scale = weight[:, column], scales[:, column]
        scaled = (values / scale).clamp_(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3)
        codes.view(torch.uint8)[:, column] = scaled.view(torch.uint8)
        errors[:, column] = (values - scaled.float() * scale) / factor[column, column]
        weight[:, column:] -= errors[:, column : column + 1] * factor[column, column:]
