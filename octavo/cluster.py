"""The same run on many machines: stages of decoder layers on Ray.

Each worker owns a contiguous run of layers. It reads only those and writes only those, and holds as many of
them in memory at a time as fit. The calibration samples flow from worker to worker a batch at a time: a worker
asks the one before it for a few batches ahead and computes on those it has, so that stages overlap and nobody
is flooded. Batches stay in the files of the worker that made them until the end. A worker that dies is
started again by Ray, goes on from its journal, and finds or makes again whatever it is asked for.

Statistics are maxima and batches are those of a single process, so the edition is the same to the last byte.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.allocator import keep_freed_memory
from octavo.calibration import CalibrationStream, HiddenShape, HiddenStates
from octavo.checkpoint import CheckpointWriter, Journal, Place, Workspace
from octavo.errors import OctavoError, WriteError
from octavo.job import Job, hidden_shape, layer_shape, open_job
from octavo.memory import Settings, peak_memory
from octavo.preflight import pick_device
from octavo.scheme import Scheme
from octavo.stage import Stage
from octavo.stopwatch import Stopwatch

# Batches a worker asks for ahead, for each of its threads.
_AHEAD = 2

# How often a worker may die. One that cannot live at all should not be tried for ever.
_RESTARTS = 10

_POLL_SECONDS = 0.5

# Of a worker's GPU, where the driver has none to ask.
_GPU_BYTES = 80_000_000_000
_GATHER_BYTES = 64 << 20


class Order(NamedTuple):
    """One stage of a run, as its worker is told.

    Attributes:
        number: of the stage, from 0.
        stages: how many there are.
        model: the checkpoint's directory, on every machine.
        target: the output, on the driver's machine.
        directory: where it is made there; a worker that does not see it uses the same path of its own.
        mark: a file in it, to tell whether a worker sees it.
        scheme: what is quantized and how.
        format: a dialect's name.
        device: ``cpu`` or ``cuda``.
        threads: of the worker.
        passes: numbers of the layers of each pass.
        read_ahead: read the next pass while one computes.
        shape: of the hidden states; None without calibration.
        tokens: the samples, for the first stage.
        shard_size: as for the whole edition.
        files: names and sizes of the checkpoint's files.
        begin: what the stage's results depend on; a journal that began otherwise is not its own.
    """

    number: int
    stages: int
    model: Path
    target: Path
    directory: Path
    mark: str
    scheme: Scheme
    format: str
    device: str
    threads: int
    passes: list[list[int]]
    read_ahead: bool
    shape: HiddenShape | None
    tokens: Tensor | None
    shard_size: int
    files: dict[str, int]
    begin: dict[str, Any]


class Report(NamedTuple):
    """How far a worker is.

    Attributes:
        layers: finished.
        batches: gone through its last pass.
        node: name of its machine.
        shared: whether it writes to the driver's directory.
        process: its number.
    """

    layers: int
    batches: int
    node: str
    shared: bool
    process: int


class Worker:
    """One stage; an actor on Ray. Its methods are called from several threads at a time."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._home: Path | None = None
        self._shared = True
        self._writer: CheckpointWriter | None = None
        self._states: HiddenStates | None = None
        self._layers = 0
        self._batches: set[int] = set()
        self._changed = threading.Condition()

    def run(self, order: Order, before: Any) -> list[dict[str, Any]]:
        """Do the stage, or what is left of it.

        Args:
            order: what to do.
            before: handle of the worker before it; None for the first.

        Returns:
            The records of its journal.
        """
        torch.set_num_threads(order.threads)
        self._shared = (order.directory / order.mark).exists()
        home = self._home = order.directory / f"stage-{order.number}"
        with ExitStack() as stack:
            job = open_job(order.model, order.scheme, order.format, pick_device(order.device))
            stack.callback(job.checkpoint.close)
            _check_files(order, files_of(job))
            journal = stack.enter_context(_open_journal(order, home))
            self._writer = self._open_writer(job, order, home)
            stream = None
            if order.shape is not None:
                source = None if before is None else _Ahead(before, order).read
                stream = CalibrationStream(
                    job.decoder, order.shape, home, order.target, source=source
                )
                stack.enter_context(stream)
                # Of its own: others read there when this method has ended.
                path = home / f"hidden-{len(order.passes) % 2}"
                self._states = HiddenStates(path, order.shape, order.target)
            Stage(
                job=job,
                passes=order.passes,
                stream=stream,
                tokens=order.tokens,
                keep_states=order.number + 1 < order.stages,
                writer=self._writer,
                journal=journal,
                read_ahead=order.read_ahead,
                clock=Stopwatch(),
            ).run(self._on_layer, self._on_batch)
            return journal.records

    def fetch(self, index: int) -> Any:
        """Batch ``index`` behind the last layer of the stage, once it is there: its bytes, ``uint8``."""
        with self._changed:
            self._changed.wait_for(lambda: index in self._batches)
        assert self._states is not None
        return self._states.read(index).view(-1).view(torch.uint8).numpy()

    def report(self) -> Report:
        """How far it is."""
        node = socket.gethostname()
        return Report(self._layers, len(self._batches), node, self._shared, os.getpid())

    def read(self, name: str, offset: int) -> bytes:
        """The next bytes of a tensor it has written, up to a limit; empty behind its end."""
        assert self._writer is not None
        return self._writer.read_bytes(name, offset, _GATHER_BYTES)

    def clear(self) -> None:
        """Remove what it has in a directory of its own."""
        if self._home is not None and not self._shared:
            shutil.rmtree(self._home, ignore_errors=True)

    def _open_writer(self, job: Job, order: Order, home: Path) -> CheckpointWriter:
        """Into the driver's files, or where these are out of reach into some of its own."""
        own = [index for layers in order.passes for index in layers]
        edition = (order.directory if self._shared else home) / "edition"
        edition.mkdir(parents=True, exist_ok=True)
        return CheckpointWriter(
            Place(order.target, edition, resumed=True),
            job.layout(None if self._shared else own),
            shard_size=order.shard_size,
            digest=True,
        )

    def _on_layer(self, index: int) -> None:
        self._layers += 1

    def _on_batch(self, index: int) -> None:
        with self._changed:
            self._batches.add(index)
            self._changed.notify_all()


def _open_journal(order: Order, home: Path) -> Journal:
    home.mkdir(parents=True, exist_ok=True)
    journal = Journal(home / "journal", order.target)
    begin = {"begin": order.begin}
    if journal.records and journal.records[0] != begin:
        # Of another run, on a machine that its driver could not clean up.
        journal.close()
        shutil.rmtree(home)
        return _open_journal(order, home)
    if not journal.records:
        journal.append(begin)
    return journal


class _Ahead:
    """Batches of the worker before, some of them asked for before they are wanted."""

    def __init__(self, before: Any, order: Order) -> None:
        assert order.shape is not None
        self._before, self._shape = before, order.shape
        self._window = _AHEAD * order.threads
        self._asked: dict[int, Any] = {}
        self._lock = threading.Lock()

    def read(self, index: int) -> Tensor:
        """Batch ``index``: ``[samples, seq_len, width]``."""
        import ray

        with self._lock:
            for number in range(index, min(index + self._window, len(self._shape.batches))):
                if number not in self._asked:
                    self._asked[number] = self._before.fetch.remote(number)
            asked = self._asked[index]
        data = torch.from_numpy(ray.get(asked).copy())
        with self._lock:
            # Done with: its memory in Ray's store is free again. None keeps it from being asked anew.
            self._asked[index] = None
        return data.view(self._shape.dtype).view(
            self._shape.batches[index], self._shape.seq_len, self._shape.width
        )


def worker_device(device: str) -> str:
    """The kind of device of every worker; the driver needs none."""
    return "cuda" if device.startswith("cuda") else pick_device(device).type


def worker_threads(workers: int) -> int:
    """Threads of each worker, where they share this machine."""
    return max(1, torch.get_num_threads() // workers)


def make_orders(
    job: Job,
    tokens: Tensor | None,
    settings: Settings,
    device: str,
    workers: int,
    max_memory: int | None,
    work: Workspace,
    shard_size: int,
    begin: Mapping[str, Any],
) -> list[Order]:
    """What each worker is told.

    Args:
        job: as the driver has opened it.
        tokens: the calibration samples.
        settings: how memory is used.
        device: ``cpu`` or ``cuda``.
        workers: how many.
        max_memory: bytes each of them may take.
        work: where the edition is made.
        shard_size: bytes of tensors in one file, at most.
        begin: what the results depend on.

    Raises:
        OctavoError: the model has fewer layers than that.
    """
    stages = split(len(job.plans), workers)
    size = _layers_in_memory(job, device, workers, max_memory, settings, tokens)
    (work.directory / (mark := f"mark-{uuid.uuid4().hex}")).touch()
    orders = []
    for number, layers in enumerate(stages):
        passes = [layers[start : start + size] for start in range(0, len(layers), size)]
        orders.append(
            Order(
                number=number,
                stages=workers,
                model=job.checkpoint.directory.resolve(),
                target=work.target.resolve(),
                directory=work.directory.resolve(),
                mark=mark,
                scheme=job.scheme,
                format=job.format,
                device=device,
                threads=worker_threads(workers),
                passes=passes,
                read_ahead=settings.read_ahead and size == 1,
                shape=None if tokens is None else hidden_shape(job, tokens, settings),
                tokens=None if number else tokens,
                shard_size=shard_size,
                files=files_of(job),
                begin={**begin, "passes": passes},
            )
        )
    return orders


def _layers_in_memory(
    job: Job,
    device: str,
    workers: int,
    max_memory: int | None,
    settings: Settings,
    tokens: Tensor | None,
) -> int:
    """How many layers a worker holds at a time: as many as fit, one at least."""
    shape = layer_shape(job)
    limit = max_memory or _memory_of_one(device, workers)
    one = peak_memory(
        shape,
        settings._replace(read_ahead=False),
        seq_len=0 if tokens is None else tokens.shape[1],
        cores=worker_threads(workers),
        layers=1,
    )
    return 1 + max(0, limit - one) // shape.nbytes


def _memory_of_one(device: str, workers: int) -> int:
    """Bytes a worker may take if nothing else was said: of a GPU most, of a machine's memory its share
    of one half."""
    if device == "cuda":
        known = torch.cuda.is_available()
        whole = torch.cuda.get_device_properties(0).total_memory if known else _GPU_BYTES
        return int(whole * 0.7)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // workers


def split(layers: int, workers: int) -> list[list[int]]:
    """The layers of each worker: contiguous runs, as equal as can be."""
    if workers > layers:
        raise OctavoError(
            f"--workers {workers} is more than the model has decoder layers ({layers}). Ask for {layers} at most."
        )
    ends = [layers * number // workers for number in range(workers + 1)]
    return [list(range(*pair)) for pair in pairwise(ends)]


def files_of(job: Job) -> dict[str, int]:
    """Names and sizes of a checkpoint's weight files: the same on every machine."""
    return {path.name: path.stat().st_size for path in job.checkpoint.files}


def run_stages(
    orders: Sequence[Order],
    address: str | None,
    writer: CheckpointWriter,
    beside: Callable[[], None],
    on_report: Callable[[Sequence[Report]], None],
) -> list[dict[str, Any]]:
    """Run all stages to their end.

    Args:
        orders: one for each worker.
        address: of a Ray cluster; None starts one on this machine.
        writer: of the edition; gets what workers wrote to directories of their own.
        beside: what the driver does itself while they work.
        on_report: called twice a second with every worker's report.

    Returns:
        The records of all journals.

    Raises:
        OctavoError: Ray is not installed or has not enough to offer, or a stage's own error.
    """
    with _connected(orders, address) as ray:
        workers = _start(ray, orders)
        runs = [
            worker.run.remote(order, before)
            for worker, order, before in zip(workers, orders, [None, *workers], strict=False)
        ]
        beside()
        pending = list(runs)
        while pending:
            with _plain_errors(ray):
                done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
                ray.get(done)
            on_report(_reports(ray, workers))
        with _plain_errors(ray):
            journals = ray.get(runs)
            for worker, records, report in zip(
                workers, journals, _reports(ray, workers), strict=True
            ):
                tensors = _tensors(records)
                if report.shared:
                    writer.accept(tensors)
                else:
                    _gather(ray, worker, tensors, writer)
                    ray.get(worker.clear.remote())
    return [record for records in journals for record in records]


def _start(ray: Any, orders: Sequence[Order]) -> list[Any]:
    """A worker for each stage."""
    # While a worker runs, other threads of it answer.
    groups = {"serve": 1 + _AHEAD * max(order.threads for order in orders), "tell": 1}
    ray.method(concurrency_group="serve")(Worker.fetch)
    ray.method(concurrency_group="tell")(Worker.report)
    actor = ray.remote(
        max_restarts=_RESTARTS,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
        concurrency_groups=groups,
    )(Worker)
    workers = []
    for order in orders:
        needs = _needs(order)
        options = {"num_cpus": needs.get("CPU", 0), "num_gpus": needs.get("GPU", 0)}
        workers.append(actor.options(**options).remote())
    return workers


def _needs(order: Order) -> dict[str, float]:
    """What a worker takes of a machine."""
    return {"GPU": 1, "CPU": 1} if order.device == "cuda" else {"CPU": order.threads}


@contextmanager
def _connected(orders: Sequence[Order], address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster that has room for all workers."""
    if importlib.util.find_spec("ray") is None:
        raise OctavoError(
            "--workers needs Ray, which is not installed. Install it with `pip install 'octavo[cluster]'`."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": _cores(orders)}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise OctavoError(
            f"No Ray cluster answers at {address or 'this machine'}: {error}. Start one with `ray start "
            "--head`, and pass its address, or leave --cluster out to use this machine alone."
        ) from error
    try:
        needed: dict[str, float] = {}
        for order in orders:
            for kind, count in _needs(order).items():
                needed[kind] = needed.get(kind, 0) + count
        offered = ray.cluster_resources()
        for kind, count in needed.items():
            if offered.get(kind, 0) < count:
                raise OctavoError(
                    f"{len(orders)} workers take {count:g} {kind}s, the Ray cluster has "
                    f"{offered.get(kind, 0):g}. Ask for fewer workers, or add machines to the cluster."
                )
        yield ray
    finally:
        ray.shutdown()


def _cores(orders: Sequence[Order]) -> int:
    return max(os.cpu_count() or 1, sum(int(_needs(order)["CPU"]) for order in orders))


@contextmanager
def _plain_errors(ray: Any) -> Iterator[None]:
    """Workers' own errors, without Ray's wrapping."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, OctavoError) else error) from None
    except ray.exceptions.RayActorError as error:
        raise WriteError(
            f"A worker died more than {_RESTARTS} times: {str(error).splitlines()[0]} "
            "Look at Ray's logs for why (memory?), and mend that."
        ) from error


def _reports(ray: Any, workers: Sequence[Any]) -> list[Report]:
    """Every worker's report; nothing of one that is being started."""
    asked = [worker.report.remote() for worker in workers]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=_POLL_SECONDS)
    nothing = Report(0, 0, "", True, 0)
    return [ray.get(one) if one in ready else nothing for one in asked]


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


def _check_files(order: Order, found: Mapping[str, int]) -> None:
    if found != order.files:
        raise OctavoError(
            f"{order.model} on {socket.gethostname()} has the weight files {found}, the driver's has "
            f"{order.files} (names and bytes). Give every machine the same checkpoint at the same path."
        )
