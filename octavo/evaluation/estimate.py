"""A mean and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean with its standard error; None where a single cluster gives no idea of it."""

    mean: float
    standard_error: float | None


def cluster_mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The mean over all members of some clusters.

    Members of a cluster (tokens of a window) are correlated, clusters are taken as independent. The
    standard error is therefore that of the ratio of totals over clusters (Cochran, *Sampling
    Techniques*, 3rd ed., §6.3), which for clusters of one size is that of the mean of their means;
    one taken over members as if independent would be too small.

    Args:
        sums: each cluster's sum of values.
        counts: each cluster's members.
    """
    totals, sizes = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    clusters, members = len(totals), sizes.sum()
    mean = float(totals.sum() / members)
    if clusters < 2:
        return Estimate(mean, None)
    spread = float(((totals - mean * sizes) ** 2).sum())
    return Estimate(mean, math.sqrt(spread * clusters / (clusters - 1)) / float(members))


def exponential(estimate: Estimate) -> Estimate:
    """e to an estimate: a perplexity from a mean NLL. The error is carried over to first order."""
    value = math.exp(estimate.mean)
    error = estimate.standard_error
    return Estimate(value, None if error is None else value * error)


def proportion(hits: int, trials: int) -> Estimate:
    """The share of ``trials`` that are ``hits``, with the binomial standard error."""
    share = hits / trials
    return Estimate(share, math.sqrt(share * (1 - share) / (trials - 1)) if trials > 1 else None)
