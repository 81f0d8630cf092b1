"""How far variants' predictions are from the model's: KL divergence, some of the vocabulary at a time.

With ``d`` the change of a token's logit and ``p`` its probability in the model, ``KL = log Σ p eᵈ - Σ p d``, whose sums
can be taken over parts of the vocabulary. So logits are never all there, each part of ``lm_head`` is read once, and
the model's own logits are computed once for all variants. As ``d`` is ``lm_head`` times the change of the normalized
hidden state, no small difference of large logits is taken either.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.analysis.variants import ORIGINAL, Variants
from octavo.calibration.moments import exact_products
from octavo.decoder import Decoder
from octavo.errors import not_finite

# Rows of lm_head at a time, and as many threads at most: each has a few matrices of logits, and the rows in float32.
_ROWS = 4096
_MOST_WORKERS = 8


class _Sums(NamedTuple):
    """Over a part of the vocabulary, float64, ``[tokens]`` or ``[slots, tokens]``.

    Attributes:
        largest: the model's largest logit.
        total: Σ p, where p is e to a logit less ``largest``.
        moved: Σ p eᵈ of each variant.
        change: Σ p d of each variant.
    """

    largest: Tensor
    total: Tensor
    moved: Tensor
    change: Tensor

    def plus(self, other: _Sums) -> _Sums:
        """Over both parts."""
        largest = torch.maximum(self.largest, other.largest)
        one, two = (torch.exp(sums.largest - largest) for sums in (self, other))
        pairs = zip(self[1:], other[1:], strict=True)
        return _Sums(largest, *(one * mine + two * theirs for mine, theirs in pairs))


def divergences(
    decoder: Decoder, variants: Variants, workers: int, on_part: Callable[[float], None]
) -> Tensor:
    """KL(model ‖ variant) of the next-token distributions.

    The final norm takes the place of the variants' hidden states.

    Args:
        decoder: for the final norm and ``lm_head``; it computes in float32.
        variants: behind the last layer.
        workers: parts of the vocabulary at a time, at most.
        on_part: called after each part with its share of the work.

    Returns:
        float64 ``[slots, windows, seq_len]``, in nats; that of the model itself is 0. NaN or infinite where a
        model overflows.

    Raises:
        OctavoError: the final norm or ``lm_head`` holds NaN or infinity.
    """
    norm = decoder.norm()
    variants.apply(norm, [(slot, slot) for slot in range(variants.slots)])
    vocabulary = range(decoder.config.vocab_size)
    parts = [vocabulary[start : start + _ROWS] for start in vocabulary[::_ROWS]]

    @torch.inference_mode()
    def part_sums(part: range) -> _Sums:
        rows = decoder.checkpoint.read_rows(decoder.head_name, part)
        if not rows.isfinite().all():
            raise not_finite(decoder.head_name)
        rows = rows.to(decoder.device).float()
        batches = [_sums(rows, variants, batch) for batch in range(variants.batches)]
        return _Sums(*(torch.cat(sums, dim=-1) for sums in zip(*batches, strict=True)))

    found: _Sums | None = None
    with (
        exact_products(decoder.checkpoint[decoder.head_name].dtype),
        ThreadPoolExecutor(min(workers, _MOST_WORKERS), "octavo-head") as pool,
    ):
        for sums in pool.map(part_sums, parts):
            found = sums if found is None else found.plus(sums)
            on_part(1 / len(parts))
    assert found is not None
    kl = torch.log(found.moved / found.total) - found.change / found.total
    # Below zero is rounding.
    return kl.clamp_(min=0).view(variants.slots, -1, variants.seq_len)


def _sums(rows: Tensor, variants: Variants, batch: int) -> _Sums:
    """Over some rows of ``lm_head``, float32 ``[rows, hidden_size]``, and the tokens of a batch."""

    states = variants.read(ORIGINAL, batch).flatten(0, 1)
    p = states @ rows.t()
    largest = p.amax(dim=-1, keepdim=True)
    p.sub_(largest).exp_()
    total = p.sum(dim=-1)
    # The model's own logits do not change.
    moved, change = torch.zeros(2, variants.slots, len(states), device=states.device)
    moved[ORIGINAL] = total
    # Filled anew for each variant: what is freed and allocated by turns leaves holes, gigabytes of them.
    d, work = torch.empty_like(p), torch.empty_like(p)
    for slot in range(ORIGINAL + 1, variants.slots):
        torch.mm(variants.read(slot, batch).flatten(0, 1).sub_(states), rows.t(), out=d)
        torch.sum(torch.mul(p, d, out=work), dim=-1, out=change[slot])
        torch.sum(d.exp_().mul_(p), dim=-1, out=moved[slot])
    return _Sums(*(sums.double().cpu() for sums in (largest.squeeze(1), total, moved, change)))
