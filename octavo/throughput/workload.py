"""What servers are asked: how many requests, of how many random tokens, how many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from octavo.errors import OctavoError
from octavo.reporting.validation import Frozen


class Load(Frozen):
    """One load on a server.

    Attributes:
        concurrency: requests in flight at all times.
        requests: measured; as many as ``concurrency`` come before them and are not.
    """

    concurrency: PositiveInt
    requests: PositiveInt


class Workload(Frozen):
    """What every server is asked.

    Attributes:
        input_len: tokens of each prompt.
        output_len: tokens generated after each.
        loads: one after the other.
        rounds: how often each server bears each load.
        vocab_size: the prompts' token ids are below.
        seed: of the prompts.
    """

    input_len: PositiveInt
    output_len: PositiveInt
    loads: tuple[Load, ...]
    rounds: PositiveInt
    vocab_size: PositiveInt
    seed: NonNegativeInt


def parse_concurrency(text: str) -> tuple[int, ...]:
    """``(1, 8, 32)`` from ``1,8,32``.

    Raises:
        OctavoError: not whole numbers with commas between.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise _malformed(text)
    return tuple(int(part) for part in parts)


def plan_loads(concurrency: Sequence[int], requests: int | None) -> tuple[Load, ...]:
    """A load for each concurrency.

    Args:
        concurrency: requests in flight at a time.
        requests: measured under each load; by default four times the concurrency, at least 8.

    Raises:
        OctavoError: no concurrency, one below 1 or twice, or too few requests to reach it.
    """
    if not concurrency or min(concurrency) < 1 or len(set(concurrency)) < len(concurrency):
        raise _malformed(",".join(map(str, concurrency)))
    if requests is not None and requests < max(concurrency):
        raise OctavoError(
            f"--requests {requests} cannot keep {max(concurrency)} requests in flight. "
            f"Pass at least {max(concurrency)}, or lower --concurrency."
        )
    return tuple(
        Load(concurrency=count, requests=requests or max(8, 4 * count)) for count in concurrency
    )


def _malformed(concurrency: str) -> OctavoError:
    return OctavoError(
        f"--concurrency {concurrency!r} is not a list of concurrencies. Expected different whole "
        "numbers above zero with commas between them, such as 1,8,32."
    )


def draw_prompts(workload: Workload) -> Iterator[list[int]]:
    """Random prompts without end, each of ``input_len`` token ids.

    Every request of a run takes the next one, on whatever server: no prefix cache can know it.
    """
    random = np.random.default_rng(workload.seed)
    while True:
        yield random.integers(workload.vocab_size, size=workload.input_len).tolist()
