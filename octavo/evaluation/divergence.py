"""How far a model's predictions moved from its reference's: KL divergence, token by token."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.tokens import check_vocabulary
from octavo.engines import DistributionEngine
from octavo.errors import OctavoError
from octavo.evaluation.estimate import cluster_mean, exponential
from octavo.evaluation.journal import Journal
from octavo.evaluation.perplexity import check_finite
from octavo.evaluation.progress import OnProgress, Progress, silent
from octavo.evaluation.windows import Window, cut

# Ten bins a decade, in nats; the first and the last also hold what lies beyond.
_EDGES = np.geomspace(1e-8, 1e2, 101)


class Histogram(NamedTuple):
    """Counts of tokens by their KL.

    Attributes:
        edges: of the bins, in nats, log-spaced; one more than counts.
        counts: tokens; the first and the last bin also hold what lies beyond them.
    """

    edges: list[float]
    counts: list[int]


class DivergenceResult(NamedTuple):
    """What separates a model from its reference on a text. Standard errors are taken over windows,
    since tokens within one are correlated; with a single window they are None.

    Attributes:
        kl: mean KL(reference ‖ model) over tokens, in nats.
        kl_standard_error: its standard error.
        top1_agreement: share of tokens for which both find the same token likeliest.
        top1_standard_error: its standard error.
        worst_mean: mean KL of the worst 1 % of tokens (at least one), in nats.
        worst_threshold: the smallest KL among these.
        perplexity: the model's.
        perplexity_standard_error: its standard error.
        reference_perplexity: the reference's.
        reference_standard_error: its standard error.
        perplexity_ratio: model over reference.
        ratio_standard_error: its standard error, from the windows' differences: the text's own
            difficulty cancels, so it is much smaller than those above.
        tokens: compared.
        windows: read.
        seq_len: tokens in a window.
        tokens_per_second: compared tokens of the windows computed in this run.
        histogram: of the tokens' KL.
    """

    kl: float
    kl_standard_error: float | None
    top1_agreement: float
    top1_standard_error: float | None
    worst_mean: float
    worst_threshold: float
    perplexity: float
    perplexity_standard_error: float | None
    reference_perplexity: float
    reference_standard_error: float | None
    perplexity_ratio: float
    ratio_standard_error: float | None
    tokens: int
    windows: int
    seq_len: int
    tokens_per_second: float
    histogram: Histogram


def divergence(
    model: DistributionEngine,
    reference: DistributionEngine,
    tokens: Tensor,
    *,
    seq_len: int = 2048,
    limit: int | None = None,
    on_progress: OnProgress = silent,
    journal: Journal | None = None,
) -> DivergenceResult:
    """Compare two models' next-token distributions on every token of a text, in one pass.

    Window by window both models' hidden states are computed, and from them the logits of a slice of
    positions at a time, which are compared and dropped.

    Args:
        model: the edition.
        reference: what it was made from.
        tokens: int64 ``[tokens]``.
        seq_len: tokens in a window; windows do not overlap.
        limit: windows, at most.
        on_progress: called after each window.
        journal: where windows' results are kept.

    Raises:
        OctavoError: different vocabularies, too few tokens, an impossible option, or a NaN.
    """
    if model.vocab_size != reference.vocab_size:
        raise OctavoError(
            f"The model's vocabulary has {model.vocab_size} tokens, the reference's "
            f"{reference.vocab_size} (vocab_size in config.json); expected the same. "
            "Pass as --reference the checkpoint that the edition was made from."
        )
    journal = journal or Journal()
    positions = min(model.max_positions, reference.max_positions)
    windows = cut(len(tokens), seq_len, None, limit=limit, max_positions=positions)
    check_vocabulary(tokens.numpy(), "the evaluation text", model.vocab_size)
    keys = [f"{window.begin}" for window in windows]
    fresh = sum(
        window.scored for key, window in zip(keys, windows, strict=True) if key not in journal
    )
    total = sum(window.scored for window in windows)

    def compare(window: Window) -> dict[str, Any]:
        return _compare(model, reference, tokens[window.begin : window.end], window.begin)

    def compute(missing: list[int]) -> Iterator[dict[str, Any]]:
        with model.computing():
            yield from reference.map(compare, (windows[index] for index in missing))

    begin, done, records = time.perf_counter(), 0, []
    for record, window in zip(journal.run(keys, compute), windows, strict=True):
        records.append(record)
        done += window.scored
        on_progress(Progress(done, total, "tokens"))
    rate = fresh / (time.perf_counter() - begin)
    return _summary(records, [window.scored for window in windows], seq_len, rate)


def _compare(
    model: DistributionEngine, reference: DistributionEngine, tokens: Tensor, begin: int
) -> dict[str, Any]:
    """One window's record: its tokens' KL (float32, base64), and three sums."""
    kl, agreed, nll = [], 0, torch.zeros(2, dtype=torch.float64)
    states = [engine.hidden(tokens[:-1]) for engine in (reference, model)]
    targets = tokens[1:].to(states[0].device)
    slices = zip(
        reference.logits(states[0]), model.logits(states[1].to(states[0].device)), strict=True
    )
    for pair in slices:
        p, q = (torch.log_softmax(logits, dim=-1, dtype=torch.float32) for logits in pair)
        target, targets = targets[: len(p)].unsqueeze(1), targets[len(p) :]
        nll -= torch.stack([one.gather(1, target).double().sum() for one in (p, q)]).cpu()
        likeliest = p.argmax(dim=-1, keepdim=True)
        agreed += int((q.gather(1, likeliest).squeeze(1) >= q.amax(dim=-1)).sum())
        # Below zero is rounding. The weights come last: they take p's place.
        kl.append(q.neg_().add_(p).mul_(p.exp_()).sum(dim=-1).clamp(min=0).cpu())
    values = torch.cat(kl).numpy()
    check_finite(float(values.sum() + nll.sum()), begin)
    return {
        "kl": base64.b64encode(values.astype("<f4").tobytes()).decode(),
        "agreed": agreed,
        "reference_nll": nll[0].item(),
        "nll": nll[1].item(),
    }


def _summary(
    records: list[dict[str, Any]], counts: list[int], seq_len: int, rate: float
) -> DivergenceResult:
    windows = [np.frombuffer(base64.b64decode(record["kl"]), dtype="<f4") for record in records]
    values = np.sort(np.concatenate(windows).astype(np.float64))
    worst = values[-max(1, len(values) // 100) :]

    nll, reference = [record["nll"] for record in records], [r["reference_nll"] for r in records]
    kl = cluster_mean([float(window.sum(dtype=np.float64)) for window in windows], counts)
    agreement = cluster_mean([record["agreed"] for record in records], counts)
    perplexity = exponential(cluster_mean(nll, counts))
    reference_perplexity = exponential(cluster_mean(reference, counts))
    increase = [one - other for one, other in zip(nll, reference, strict=True)]
    ratio = exponential(cluster_mean(increase, counts))
    inside = values.clip(_EDGES[0], _EDGES[-1])
    return DivergenceResult(
        kl=kl.mean,
        kl_standard_error=kl.standard_error,
        top1_agreement=agreement.mean,
        top1_standard_error=agreement.standard_error,
        worst_mean=float(worst.mean()),
        worst_threshold=float(worst[0]),
        perplexity=perplexity.mean,
        perplexity_standard_error=perplexity.standard_error,
        reference_perplexity=reference_perplexity.mean,
        reference_standard_error=reference_perplexity.standard_error,
        perplexity_ratio=ratio.mean,
        ratio_standard_error=ratio.standard_error,
        tokens=sum(counts),
        windows=len(records),
        seq_len=seq_len,
        tokens_per_second=rate,
        histogram=Histogram(_EDGES.tolist(), np.histogram(inside, _EDGES)[0].tolist()),
    )
