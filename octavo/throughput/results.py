"""Every number of a comparison, down to the arrival of each token: the content of results.json.

Times are seconds where they were measured, milliseconds where a metric's name ends in ``_ms``.
"""

from __future__ import annotations

import datetime
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from octavo.reporting.validation import Frozen
from octavo.throughput.machine import Machine
from octavo.throughput.workload import Workload


class Request(Frozen):
    """One request.

    Attributes:
        sent: seconds since its pass began.
        arrivals: seconds since it was sent, of each chunk with tokens.
        prompt_tokens: by the server's count.
        output_tokens: likewise; a chunk may hold several.
    """

    sent: NonNegativeFloat
    arrivals: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt


class Pass(Frozen):
    """One load on one server, once.

    Attributes:
        name: the server's.
        round: the first is 1.
        concurrency: requests in flight.
        client_busy: share of the time that the client itself computed; near 1 it is what was measured.
        requests: in the order they were sent, without those for warming up.
    """

    name: str
    round: PositiveInt
    concurrency: PositiveInt
    client_busy: NonNegativeFloat
    requests: Annotated[tuple[Request, ...], Field(min_length=1)]


class Spread(Frozen):
    """A metric over rounds: the median, the smallest and the largest."""

    median: float
    low: float
    high: float


class Comparison(Frozen):
    """The servers under one load.

    Attributes:
        concurrency: requests in flight.
        values: metrics by server; see :data:`octavo.throughput.METRICS`.
        ratios: metrics by server, each divided by the first server's in the same round; without the
            first.
    """

    concurrency: PositiveInt
    values: dict[str, dict[str, Spread]]
    ratios: dict[str, dict[str, Spread]]


class Contender(Frozen):
    """A server that was measured.

    Attributes:
        name: as in the table.
        source: the checkpoint directory's name, or the URL.
        model: what the server calls its model.
        engine: what the server is, in its own words; None if it does not say.
        version: the engine's, likewise.
        command: how Octavo started it, the checkpoint by its directory's name; None for a URL.
    """

    name: str
    source: str
    model: str
    engine: str | None
    version: str | None
    command: str | None


class BenchResults(Frozen):
    """What ``octavo.bench`` found.

    Attributes:
        octavo: version of Octavo.
        date: day of the measurement.
        machine: where Octavo ran, and the servers it started.
        workload: what was asked.
        one_at_a_time: each server was started anew for every round, alone.
        contenders: what was measured; the first is the baseline.
        comparisons: one for each load.
        notes: what to know about the numbers, a sentence each.
        passes: all that was measured, in order.
    """

    octavo: str
    date: datetime.date
    machine: Machine
    workload: Workload
    one_at_a_time: bool
    contenders: tuple[Contender, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    passes: tuple[Pass, ...]
