"""The workers of a run, from their start to the last tensor they wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from octavo.checkpoint import CheckpointWriter
from octavo.cluster.orders import AHEAD, Order
from octavo.cluster.session import RESTARTS, connected, plain_errors
from octavo.cluster.worker import Outcome, Report, Worker, clear_machine, hold
from octavo.errors import OctavoError, WriteError

_POLL_SECONDS = 0.5

# Which of a worker's threads answer what.
_GROUPS = {"fetch": "serve", "read": "serve", "result": "wait", "report": "tell"}

# How long to wait for workers' last words, and for machines to clear up.
_LAST_LOOK_SECONDS = 5.0
_CLEAR_SECONDS = 60.0


def run_stages(
    orders: Sequence[Order],
    address: str | None,
    writer: CheckpointWriter,
    beside: Callable[[], None],
    on_report: Callable[[Sequence[Report]], None],
) -> list[Outcome]:
    """Run all stages to their end.

    Args:
        orders: one for each worker.
        address: of a Ray cluster; None starts one on this machine.
        writer: of the edition; gets what workers wrote to directories of their own.
        beside: what the driver does itself while they work.
        on_report: called twice a second with every worker's report.

    Returns:
        What came out of each.

    Raises:
        OctavoError: Ray is not installed or has not enough to offer, or a stage's own error.
        OSError: a worker's.
    """
    with ExitStack() as stack:
        ray = stack.enter_context(connected(address, _cores(orders)))
        orders = fit(orders, ray.nodes(), grow=address is not None)
        crew = stack.enter_context(_crew(ray, orders, on_report))
        stack.enter_context(plain_errors(ray))
        results = [worker.result.remote() for worker in crew.workers]
        beside()
        pending = list(results)
        while pending:
            done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
            ray.get(done)
            crew.look(_POLL_SECONDS)
        outcomes: list[Outcome] = ray.get(results)
        on_report([outcome.report for outcome in outcomes])
        for worker, outcome in zip(crew.workers, outcomes, strict=True):
            tensors = _tensors(outcome.records)
            if outcome.report.shared:
                writer.accept(tensors)
            else:
                _gather(ray, worker, tensors, writer)
    return outcomes


def fit(orders: Sequence[Order], nodes: Sequence[Mapping[str, Any]], *, grow: bool) -> list[Order]:
    """The orders for a cluster, with as many threads for each worker as there is room for all of them.

    Args:
        orders: with the threads that this machine would give.
        nodes: of the cluster, as Ray lists them.
        grow: whether there may be more.

    Raises:
        OctavoError: not even one thread for each has room.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    first = orders[0]
    most = first.threads
    if grow and not first.limited and first.device == "cpu":
        most = max([1, *(int(offered.get("CPU", 0)) for offered in machines)])
    for threads in range(most, 0, -1):
        needs = _needs(first._replace(threads=threads))
        room = sum(_places(offered, needs) for offered in machines)
        if room >= len(orders):
            return [_with_threads(order, threads) for order in orders]
    kind, count = next(iter(needs.items()))
    offers = ", ".join(f"{offered.get(kind, 0):g}" for offered in machines)
    raise OctavoError(
        f"{len(orders)} workers take {count:g} {kind} each, and the machines of the Ray cluster ({offers} {kind}) "
        f"have room for {room}. Ask for fewer workers, or add machines to the cluster."
    )


def _with_threads(order: Order, threads: int) -> Order:
    batches = order.settings.workers if order.limited else threads
    return order._replace(threads=threads, settings=order.settings._replace(workers=batches))


def _places(offered: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers a machine has room for."""
    return min(int(offered.get(kind, 0) // count) for kind, count in needs.items())


def _needs(order: Order) -> dict[str, float]:
    """What a worker takes of a machine."""
    return {"GPU": 1, "CPU": 1} if order.device == "cuda" else {"CPU": order.threads}


def _cores(orders: Sequence[Order]) -> int:
    return max(os.cpu_count() or 1, sum(int(_needs(order)["CPU"]) for order in orders))


class _Crew:
    """The workers of a run, and what each last reported."""

    def __init__(
        self, ray: Any, orders: Sequence[Order], on_report: Callable[[Sequence[Report]], None]
    ) -> None:
        self._ray, self._orders, self._on_report = ray, orders, on_report
        # While a worker runs, other threads of it answer.
        serving = 1 + AHEAD * max(order.at_once for order in orders)
        for method, group in _GROUPS.items():
            ray.method(concurrency_group=group)(getattr(Worker, method))
        actor = ray.remote(
            max_restarts=RESTARTS,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
            concurrency_groups={"serve": serving, "wait": 1, "tell": 1},
        )(Worker)
        self.workers: list[Any] = []
        for order in orders:
            needs = _needs(order)
            options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0)}
            self.workers.append(actor.options(**options).remote())
        befores = [None, *self.workers]
        self._runs = [
            worker.run.remote(order, before)
            for worker, order, before in zip(self.workers, orders, befores, strict=False)
        ]
        # Reports that have not arrived.
        self._asked: dict[int, Any] = {}
        # Of those that are being started.
        self.reports = [Report(0, 0, "", True, 0, 0)] * len(orders)
        # Whether there may be directories of workers' own.
        self.scattered = orders[0].resumed

    def look(self, patience: float) -> None:
        """Pass on every worker's report, of those that answer within so many seconds. What was finished stays so,
        whatever happens to a worker."""
        for number, worker in enumerate(self.workers):
            if number not in self._asked:
                self._asked[number] = worker.report.remote()
        asked = dict(self._asked)
        ready, _ = self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=patience)
        for number, answer in asked.items():
            if answer in ready:
                del self._asked[number]
                report: Report = self._ray.get(answer)
                layers = max(report.layers, self.reports[number].layers)
                self.reports[number] = report._replace(layers=layers)
                self.scattered |= not report.shared
        self._on_report(self.reports)

    def stop(self) -> None:
        """End all workers. When this returns, none of them writes to the driver's directory any more."""
        for worker in self.workers:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker)
        for order in self._orders:
            if order.lock.exists():
                os.close(hold(order.lock))


@contextmanager
def _crew(
    ray: Any, orders: Sequence[Order], on_report: Callable[[Sequence[Report]], None]
) -> Iterator[_Crew]:
    crew, keep = _Crew(ray, orders, on_report), False
    try:
        yield crew
    except BaseException as error:
        with suppress(Exception):
            crew.look(_LAST_LOOK_SECONDS)
        # What Workspace does with the driver's directory.
        mistake = isinstance(error, OctavoError) and not isinstance(error, WriteError)
        begun = any(report.layers for report in crew.reports)
        keep = orders[0].resumed or (begun and not mistake)
        raise
    finally:
        crew.stop()
        if crew.scattered and not keep:
            _clear_machines(ray, orders)


def _clear_machines(ray: Any, orders: Sequence[Order]) -> None:
    """Have what workers made in directories of their own removed from all other machines: some may have been
    elsewhere before."""
    clear = ray.remote(num_cpus=0)(clear_machine)
    place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    told = [order._replace(tokens=None) for order in orders]
    here = ray.get_runtime_context().get_node_id()
    with suppress(ray.exceptions.RayError):
        asked = [
            clear.options(scheduling_strategy=place(node["NodeID"], soft=False)).remote(told)
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] != here
        ]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=_CLEAR_SECONDS)


def _tensors(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Digests of what a stage has written, by name."""
    tensors: dict[str, str] = {}
    for record in records:
        tensors |= record.get("tensors", {})
    return tensors


def _gather(ray: Any, worker: Any, tensors: Mapping[str, str], writer: CheckpointWriter) -> None:
    """Fetch a stage's tensors from the worker's machine."""
    for name, digest in tensors.items():
        if writer.holds(name, digest):
            continue
        offset = 0
        while piece := ray.get(worker.read.remote(name, offset)):
            writer.write_bytes(name, offset, torch.frombuffer(bytearray(piece), dtype=torch.uint8))
            offset += len(piece)
        writer.finish(name)
        if writer.digests[name] != digest:
            raise WriteError(
                f"tensor {name!r} arrived from {ray.get(worker.report.remote()).node} other than it was written "
                "there. Check that machine's disk, and the network."
            )
