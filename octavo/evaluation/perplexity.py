"""Perplexity: e to the mean negative log-likelihood (NLL) of a text's tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from octavo.calibration.tokens import check_vocabulary
from octavo.engines import Engine
from octavo.errors import OctavoError
from octavo.evaluation.estimate import cluster_mean, exponential
from octavo.evaluation.journal import Journal
from octavo.evaluation.progress import OnProgress, Progress, silent
from octavo.evaluation.windows import cut


class PerplexityResult(NamedTuple):
    """What a text's tokens cost a model.

    Attributes:
        perplexity: e to ``nll``.
        standard_error: of the perplexity, from the spread of the windows' means carried through the
            exponential (delta method): tokens within a window are correlated. None for one window.
        nll: mean over all scored tokens, in nats.
        nll_standard_error: likewise; None for one window.
        tokens: scored.
        windows: read.
        seq_len: tokens in a window.
        stride: tokens from one window to the next.
        tokens_per_second: scored tokens of the windows computed in this run (not resumed ones).
    """

    perplexity: float
    standard_error: float | None
    nll: float
    nll_standard_error: float | None
    tokens: int
    windows: int
    seq_len: int
    stride: int
    tokens_per_second: float


def perplexity(
    engine: Engine,
    tokens: Tensor,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    limit: int | None = None,
    on_progress: OnProgress = silent,
    journal: Journal | None = None,
) -> PerplexityResult:
    """Measure the perplexity of a text in the standard way.

    The text is cut into windows of ``seq_len`` tokens. Without a ``stride`` they do not overlap and
    all tokens but each window's first are scored, the protocol of GPTQ, AWQ and llama.cpp; with one
    they do, and each scores its last ``stride`` tokens
    (https://huggingface.co/docs/transformers/perplexity).

    Args:
        engine: the model.
        tokens: int64 ``[tokens]``, as :func:`octavo.evaluation.load_tokens` returns them.
        seq_len: tokens in a window.
        stride: tokens from one window to the next, ``seq_len`` by default.
        limit: windows, at most.
        on_progress: called after each window.
        journal: where windows' results are kept.

    Raises:
        OctavoError: too few tokens, an impossible option, or a NaN among the model's results.
    """
    journal = journal or Journal()
    windows = cut(len(tokens), seq_len, stride, limit=limit, max_positions=engine.max_positions)
    check_vocabulary(tokens.numpy(), "the evaluation text", engine.vocab_size)
    keys = [f"{window.begin}" for window in windows]
    fresh = sum(
        window.scored for key, window in zip(keys, windows, strict=True) if key not in journal
    )
    counts = [window.scored for window in windows]

    def compute(missing: list[int]) -> Iterator[float]:
        chosen = [windows[index] for index in missing]
        scores = engine.score(
            (tokens[window.begin : window.end] for window in chosen),
            (window.start for window in chosen),
        )
        for window, score in zip(chosen, scores, strict=True):
            nll = -score.logprobs.double().sum().item()
            check_finite(nll, window.begin)
            yield nll

    begin, done, sums = time.perf_counter(), 0, []
    for nll, count in zip(journal.run(keys, compute), counts, strict=True):
        sums.append(nll)
        done += count
        on_progress(Progress(done, sum(counts), "tokens"))
    mean = cluster_mean(sums, counts)
    value = exponential(mean)
    return PerplexityResult(
        perplexity=value.mean,
        standard_error=value.standard_error,
        nll=mean.mean,
        nll_standard_error=mean.standard_error,
        tokens=sum(counts),
        windows=len(windows),
        seq_len=seq_len,
        stride=stride or seq_len,
        tokens_per_second=fresh / (time.perf_counter() - begin),
    )


def check_finite(value: float, begin: int) -> None:
    """Refuse what comes of a model that overflows, in the window that starts at token ``begin``."""
    if not math.isfinite(value):
        raise OctavoError(
            f"The model's log-probabilities sum up to {value} in the window that starts at token {begin}. "
            "It overflows on this text: check the checkpoint with another tool."
        )
