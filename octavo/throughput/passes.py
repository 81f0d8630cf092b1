"""Several servers under the same loads, turn by turn.

Every round measures all servers, A B A B …, so that a machine that slows down or warms up does so for
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import islice
from typing import NamedTuple, TypeAlias

from octavo.errors import OctavoError
from octavo.throughput.client import completion_request, run_load
from octavo.throughput.endpoint import Endpoint, ask
from octavo.throughput.results import Pass
from octavo.throughput.workload import Load, Workload, draw_prompts

# Called with the requests that are done, and with all there will be.
OnRequest: TypeAlias = Callable[[int, int], None]


class Candidate(NamedTuple):
    """A server to measure.

    Attributes:
        name: in results.
        open: makes the server run; gives its URL.
        log: its last lines, as far as they are known; grows while it runs.
    """

    name: str
    open: Callable[[], AbstractContextManager[str]]
    log: Sequence[str] = ()


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        endpoints: the servers, as they describe themselves, by name.
        passes: in the order they were run.
    """

    endpoints: dict[str, Endpoint]
    passes: list[Pass]


def measure(
    candidates: Sequence[Candidate],
    workload: Workload,
    *,
    one_at_a_time: bool = False,
    on_request: OnRequest = lambda done, total: None,
) -> Measured:
    """Run every load on every server in every round.

    Args:
        candidates: the servers.
        workload: what they are asked.
        one_at_a_time: start a server for its part of a round and stop it after, instead of having
            all run from beginning to end.
        on_request: called after each request, warm-up included.

    Raises:
        OctavoError: a server does not start, is not reachable, or does not do what it is asked.
    """
    session = _Session(workload, len(candidates), on_request)
    rounds = range(1, workload.rounds + 1)
    if one_at_a_time:
        for round in rounds:
            for candidate in candidates:
                with candidate.open() as url:
                    session.meet(candidate, url)
                    for load in workload.loads:
                        session.run(candidate, load, round)
    else:
        with ExitStack() as running:
            for candidate in candidates:
                session.meet(candidate, running.enter_context(candidate.open()))
            for round in rounds:
                for load in workload.loads:
                    for candidate in candidates:
                        session.run(candidate, load, round)
    return Measured(session.endpoints, session.passes)


def check_context(name: str, limit: int | None, workload: Workload) -> None:
    """Raise if a prompt and its continuation exceed ``limit``, the tokens a model can read at once."""
    wanted = workload.input_len + workload.output_len
    if limit is not None and wanted > limit:
        raise OctavoError(
            f"{name} takes at most {limit} tokens, prompt and output together; --input-len "
            f"{workload.input_len} and --output-len {workload.output_len} make {wanted}. Lower one."
        )


class _Session:
    """The state of a measurement: prompts not yet used, what is known of the servers, what was found."""

    def __init__(self, workload: Workload, candidates: int, on_request: OnRequest) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.passes: list[Pass] = []
        self._workload = workload
        self._prompts = draw_prompts(workload)
        each_round = sum(load.requests + load.concurrency for load in workload.loads)
        self._total = each_round * workload.rounds * candidates
        self._done = 0
        self._on_request = on_request

    def meet(self, candidate: Candidate, url: str) -> None:
        """Ask a server that was opened what it is."""
        endpoint = ask(url)
        check_context(candidate.name, endpoint.max_positions, self._workload)
        self.endpoints[candidate.name] = endpoint

    def run(self, candidate: Candidate, load: Load, round: int) -> None:
        """Warm the server up for the load, and measure it."""
        endpoint = self.endpoints[candidate.name]
        requests = self._requests(endpoint.model)
        warmup = list(islice(requests, load.concurrency))
        trace = run_load(
            endpoint,
            list(islice(requests, load.requests)),
            warmup=warmup,
            concurrency=load.concurrency,
            on_request=self._count,
            log=candidate.log,
        )
        self.passes.append(
            Pass(
                name=candidate.name,
                round=round,
                concurrency=load.concurrency,
                client_busy=trace.busy,
                requests=trace.requests,
            )
        )

    def _requests(self, model: str) -> Iterator[bytes]:
        for prompt in self._prompts:
            yield completion_request(model, prompt, self._workload.output_len)

    def _count(self) -> None:
        self._done += 1
        self._on_request(self._done, self._total)
