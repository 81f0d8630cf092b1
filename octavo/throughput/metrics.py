"""What the requests of a load amount to: throughput, and percentiles of latency."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from octavo.throughput.results import Comparison, Pass, Request, Spread


def duration(requests: Sequence[Request]) -> float:
    """Seconds from the first request's sending to the last token's arrival."""
    begin = min(request.sent for request in requests)
    return max(request.sent + request.arrivals[-1] for request in requests) - begin


def times_to_first_token(requests: Sequence[Request]) -> list[float]:
    """Seconds from each request's sending to its first token's arrival (TTFT)."""
    return [request.arrivals[0] for request in requests]


def times_per_output_token(requests: Sequence[Request]) -> list[float]:
    """Seconds between tokens, on average over each request, without its first (TPOT).

    Requests of one token have none.
    """
    return [
        (request.arrivals[-1] - request.arrivals[0]) / (request.output_tokens - 1)
        for request in requests
        if request.output_tokens > 1
    ]


def inter_token_latencies(requests: Sequence[Request]) -> list[float]:
    """Seconds from one arrival to the next (ITL), of all requests.

    Where a server sends several tokens at once, that is from one chunk to the next.
    """
    return [
        after - before
        for request in requests
        for before, after in itertools.pairwise(request.arrivals)
    ]


class Metric(NamedTuple):
    """A number that a load gives.

    Attributes:
        label: for people, with the unit.
        of: the number from the requests; None where they do not have it.
    """

    label: str
    of: Callable[[Sequence[Request]], float | None]


def _rate(count: Callable[[Request], int]) -> Callable[[Sequence[Request]], float]:
    return lambda requests: sum(map(count, requests)) / duration(requests)


def _percentile(
    seconds: Callable[[Sequence[Request]], list[float]], percent: int
) -> Callable[[Sequence[Request]], float | None]:
    """In milliseconds, interpolated linearly between samples."""

    def of(requests: Sequence[Request]) -> float | None:
        samples = seconds(requests)
        return 1000 * float(np.percentile(samples, percent)) if samples else None

    return of


METRICS = {
    "output_tokens_per_second": Metric(
        "output tokens/s", _rate(lambda request: request.output_tokens)
    ),
    "total_tokens_per_second": Metric(
        "total tokens/s", _rate(lambda request: request.prompt_tokens + request.output_tokens)
    ),
    **{
        f"{name}_p{percent}_ms": Metric(f"{label} p{percent}, ms", _percentile(seconds, percent))
        for name, label, seconds in (
            ("ttft", "time to first token", times_to_first_token),
            ("tpot", "time per output token", times_per_output_token),
            ("itl", "inter-token latency", inter_token_latencies),
        )
        for percent in (50, 95)
    },
}


def spread(values: Sequence[float]) -> Spread:
    """Of one value for each round."""
    return Spread(median=float(np.median(values)), low=min(values), high=max(values))


def compare(passes: Sequence[Pass], names: Sequence[str]) -> tuple[Comparison, ...]:
    """The servers under each load, over all rounds.

    A ratio is taken within a round, where the machine was the same for both, and only then over
    rounds. The median of ratios need not be the ratio of medians.

    Args:
        passes: of every server under every load in every round.
        names: the servers'; the first is what the others are compared with.
    """
    return tuple(
        _compare([one for one in passes if one.concurrency == concurrency], names)
        for concurrency in dict.fromkeys(one.concurrency for one in passes)
    )


def _compare(passes: Sequence[Pass], names: Sequence[str]) -> Comparison:
    rounds = {name: _by_round(passes, name) for name in names}
    baseline = rounds[names[0]]
    return Comparison(
        concurrency=passes[0].concurrency,
        values={
            name: {metric: spread(values) for metric, values in rounds[name].items()}
            for name in names
        },
        ratios={
            name: {
                metric: spread(
                    [ours / theirs for ours, theirs in zip(values, baseline[metric], strict=True)]
                )
                for metric, values in rounds[name].items()
                # Chunks that arrive together are no time apart, and nothing is a multiple of that.
                if metric in baseline and all(baseline[metric])
            }
            for name in names[1:]
        },
    )


def _by_round(passes: Sequence[Pass], name: str) -> dict[str, list[float]]:
    """Each metric's value in each round; metrics that a round lacks are left out."""
    own = sorted((one for one in passes if one.name == name), key=lambda one: one.round)
    values = {name: [metric.of(one.requests) for one in own] for name, metric in METRICS.items()}
    return {
        name: [value for value in found if value is not None]
        for name, found in values.items()
        if None not in found
    }
