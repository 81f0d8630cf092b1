"""The same run on many machines: stages of decoder layers on Ray.

Each worker owns a contiguous run of layers. It reads only those and writes only those, and holds as many of
them in memory at a time as fit. The calibration samples flow from worker to worker a batch at a time: a worker
asks the one before it for a few batches ahead and computes on those it has, so that stages overlap and nobody
is flooded. Batches stay in the files of the worker that made them until the end. A worker that dies is
started again by Ray, goes on from its journal, and finds or makes again whatever it is asked for. A lock on
each stage keeps a worker that lives on unnoticed, its driver killed or its network cut, from writing beside
its successor.

Statistics are maxima and batches are those of a single process, so the edition is the same to the last byte.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import xxhash
from torch import Tensor

from octavo.allocator import keep_freed_memory
from octavo.calibration import CalibrationStream, HiddenShape, HiddenStates, batches_at_once
from octavo.checkpoint import Checkpoint, CheckpointWriter, Journal, Place, Workspace
from octavo.checkpoint.disk import explained
from octavo.errors import OctavoError, WriteError, one_line
from octavo.job import Job, hidden_shape, layer_shape, open_job
from octavo.memory import Settings, peak_memory
from octavo.preflight import pick_device
from octavo.scheme import Scheme
from octavo.stage import Stage
from octavo.stopwatch import Stopwatch
from octavo.threads import one_thread_each

# Batches a worker asks for ahead, for each that it computes at a time.
_AHEAD = 2

# How often a worker may die. One that cannot live at all should not be tried for ever.
_RESTARTS = 10

_POLL_SECONDS = 0.5

# Which of a worker's threads answer what.
_GROUPS = {"fetch": "serve", "read": "serve", "result": "wait", "report": "tell"}

# Of a worker's GPU, where the driver has none to ask; how much of a GPU layers and batches may take.
_GPU_BYTES = 80_000_000_000
GPU_SHARE = 0.85
_GATHER_BYTES = 64 << 20

# Pieces of a weight file that stand for all of it, and their bytes.
_PIECES, _PIECE_BYTES = 8, 4096

# How long to wait for a cluster to answer, for workers' last words, and for machines to clear up.
_KNOCK_SECONDS = 10.0
_LAST_LOOK_SECONDS = 5.0
_CLEAR_SECONDS = 60.0

# What Ray would do otherwise: send statistics home, tell on stdout of every worker and machine that dies, and
# leave workers on this machine what other programs do not use.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"^(Task Worker\.|A worker died|Raylet is|The node with)|low on memory",
    "RAY_worker_niceness": "0",
}


class Order(NamedTuple):
    """One stage of a run, as its worker is told.

    Attributes:
        number: of the stage, from 0.
        stages: how many there are.
        model: the checkpoint's directory, on every machine.
        target: the output, on the driver's machine.
        machine: the driver's, by name.
        directory: where it is made there; a worker that does not see it uses the same path of its own.
        mark: a file in it, to tell whether a worker sees it.
        resumed: whether it holds what an earlier run has finished.
        scheme: what is quantized and how.
        format: a dialect's name.
        device: ``cpu`` or ``cuda``.
        threads: of the worker.
        limited: whether no more threads may be given to it, for the memory they take.
        passes: numbers of the layers of each pass.
        read_ahead: read the next pass while one computes.
        shape: of the hidden states; None without calibration.
        tokens: the samples, for the first stage.
        shard_size: as for the whole edition.
        files: what stands for the content of each of the checkpoint's files.
        begin: what the stage's results depend on; a journal that began otherwise is not its own.
    """

    number: int
    stages: int
    model: Path
    target: Path
    machine: str
    directory: Path
    mark: str
    resumed: bool
    scheme: Scheme
    format: str
    device: str
    threads: int
    limited: bool
    passes: list[list[int]]
    read_ahead: bool
    shape: HiddenShape | None
    tokens: Tensor | None
    shard_size: int
    files: dict[str, str]
    begin: dict[str, Any]

    @property
    def at_once(self) -> int:
        """Batches that the worker computes at a time."""
        return batches_at_once(torch.device(self.device), self.threads)


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


class Outcome(NamedTuple):
    """A stage that is done.

    Attributes:
        records: of its journal.
        report: the last.
    """

    records: list[dict[str, Any]]
    report: Report


class Worker:
    """One stage; an actor on Ray. Its methods are called from several threads at a time."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._began = threading.Event()
        self._shared = True
        self._writer: CheckpointWriter | None = None
        self._states: HiddenStates | None = None
        self._layers = 0
        self._batches: set[int] = set()
        self._changed = threading.Condition()
        self._outcome: Future[Outcome] = Future()

    def run(self, order: Order, before: Any) -> None:
        """Do the stage, or what is left of it. Does not return: calls under way are what Ray makes anew of a
        worker that took the place of one that died, and as long as there are other stages, this one is needed.

        Args:
            order: what to do.
            before: handle of the worker before it; None for the first.
        """
        try:
            self._outcome.set_result(self._run(order, before))
        except BaseException as error:
            machine = socket.gethostname()
            if machine != order.machine and machine not in str(error):
                error.add_note(f"That was on {machine}.")
            self._outcome.set_exception(error)
        threading.Event().wait()

    def result(self) -> Outcome:
        """What came out of the stage, once it is done."""
        return self._outcome.result()

    def fetch(self, index: int) -> Any:
        """Batch ``index`` behind the last layer of the stage, once it is there: its bytes, ``uint8``."""
        with self._changed:
            self._changed.wait_for(lambda: index in self._batches)
        assert self._states is not None
        return self._states.read(index).view(-1).view(torch.uint8).numpy()

    def report(self) -> Report:
        """How far it is, once it has begun."""
        self._began.wait()
        node = socket.gethostname()
        return Report(self._layers, len(self._batches), node, self._shared, os.getpid())

    def read(self, name: str, offset: int) -> bytes:
        """The next bytes of a tensor of the stage, up to a limit; empty behind its end."""
        self.result()
        assert self._writer is not None
        return self._writer.read_bytes(name, offset, _GATHER_BYTES)

    def _run(self, order: Order, before: Any) -> Outcome:
        self._shared = (order.directory / order.mark).exists()
        self._began.set()
        home = _home_of(order)
        with ExitStack() as stack:
            stack.enter_context(one_thread_each())
            job = open_job(order.model, order.scheme, order.format, pick_device(order.device))
            stack.callback(job.checkpoint.close)
            _check_files(order, files_of(job.checkpoint))
            with explained(order.target, 0):
                order.directory.mkdir(parents=True, exist_ok=True)
                _hold(_lock_of(order))
            journal = stack.enter_context(_open_journal(order, home))
            self._writer = self._open_writer(job, order, home)
            stream = None
            if order.shape is not None:
                source = None if before is None else _Ahead(before, order).read
                stream = CalibrationStream(
                    job.decoder,
                    order.shape,
                    home,
                    order.target,
                    workers=order.at_once,
                    source=source,
                )
                stack.enter_context(stream)
                # Of its own: others read there when the stage has ended.
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
                cores=order.threads,
                clock=Stopwatch(),
            ).run(self._on_layer, self._on_batch)
            return Outcome(journal.records, self.report())

    def _open_writer(self, job: Job, order: Order, home: Path) -> CheckpointWriter:
        """Into the driver's files, or where these are out of reach into some of its own."""
        own = [index for layers in order.passes for index in layers]
        edition = (order.directory if self._shared else home) / "edition"
        with explained(order.target, 0):
            edition.mkdir(exist_ok=True)
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
    begin = {"begin": order.begin}
    while True:
        with explained(order.target, 0):
            home.mkdir(exist_ok=True)
        journal = Journal(home / "journal", order.target)
        if not journal.records:
            journal.append(begin)
        if journal.records[0] == begin:
            return journal
        # Of another run, on a machine that its driver could not clean up.
        journal.close()
        shutil.rmtree(home)


def _home_of(order: Order) -> Path:
    """What is only the stage's: its journal and hidden states."""
    return order.directory / f"stage-{order.number}"


def _lock_of(order: Order) -> Path:
    """Locked by the one process that does the stage. Not in its directory, which may be removed."""
    return order.directory / f"stage-{order.number}.lock"


def _hold(path: Path) -> int:
    """Lock a file until the returned descriptor is closed, or this process ends. Waits for whoever has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


class _Ahead:
    """Batches of the worker before, some of them asked for before they are wanted."""

    def __init__(self, before: Any, order: Order) -> None:
        assert order.shape is not None
        self._before, self._shape = before, order.shape
        self._window = _AHEAD * order.at_once
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
    # Without calibration nothing is gained by holding several.
    size = 1
    if tokens is not None:
        size = layers_in_memory(job, device, workers, max_memory, settings, tokens.shape[1])
    (work.directory / (mark := f"mark-{uuid.uuid4().hex}")).touch()
    orders = []
    for number, layers in enumerate(stages):
        passes = passes_of(layers, size)
        orders.append(
            Order(
                number=number,
                stages=workers,
                model=job.checkpoint.directory.resolve(),
                target=work.target.resolve(),
                machine=socket.gethostname(),
                directory=work.directory.resolve(),
                mark=mark,
                resumed=work.resumed,
                scheme=job.scheme,
                format=job.format,
                device=device,
                threads=worker_threads(workers),
                limited=max_memory is not None,
                passes=passes,
                read_ahead=settings.read_ahead and size == 1,
                shape=None if tokens is None else hidden_shape(job, tokens, settings),
                tokens=None if number else tokens,
                shard_size=shard_size,
                files=files_of(job.checkpoint),
                begin={**begin, "passes": passes},
            )
        )
    return orders


def layers_in_memory(
    job: Job,
    device: str,
    workers: int,
    max_memory: int | None,
    settings: Settings,
    seq_len: int,
) -> int:
    """How many layers a worker holds at a time: as many as fit, one at least."""
    shape = layer_shape(job)
    limit = max_memory or _memory_of_one(device, workers)
    one = peak_memory(
        shape,
        settings._replace(read_ahead=False),
        seq_len=seq_len,
        cores=batches_at_once(torch.device(device), worker_threads(workers)),
        layers=1,
    )
    return 1 + max(0, limit - one) // shape.nbytes


def _memory_of_one(device: str, workers: int) -> int:
    """Bytes a worker may take if nothing else was said: of a GPU most, of a machine's memory its share
    of one half."""
    if device == "cuda":
        known = torch.cuda.is_available()
        whole = torch.cuda.get_device_properties(0).total_memory if known else _GPU_BYTES
        return int(whole * GPU_SHARE)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // workers


def split(layers: int, workers: int) -> list[list[int]]:
    """The layers of each worker: contiguous runs, as equal as can be."""
    if workers > layers:
        raise OctavoError(
            f"--workers {workers} is more than the model has decoder layers ({layers}). Ask for {layers} at most."
        )
    ends = [layers * number // workers for number in range(workers + 1)]
    return [list(range(*pair)) for pair in pairwise(ends)]


def passes_of(layers: Sequence[int], size: int) -> list[list[int]]:
    """A worker's layers in as few passes as hold ``size`` each, at most; all of about the same size."""
    parts = split(len(layers), -(-len(layers) // size))
    return [[layers[place] for place in part] for part in parts]


def files_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What stands for the content of each file of a checkpoint, by name: its size, and a digest of pieces of it.
    The same on every machine, and another for other weights of the same shapes."""
    paths = [checkpoint.directory / "config.json", *checkpoint.files]
    return {path.name: _fingerprint(path) for path in paths}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        for number in range(_PIECES):
            hasher.update(os.pread(file.fileno(), _PIECE_BYTES, size * number // _PIECES))
    return f"{size} bytes, {hasher.hexdigest()}"


def _check_files(order: Order, found: Mapping[str, str]) -> None:
    for name in {**order.files, **found}:
        here, there = order.files.get(name, "absent"), found.get(name, "absent")
        if here != there:
            raise OctavoError(
                f"{order.model} is not the same checkpoint on every machine: {name} is {there} on "
                f"{socket.gethostname()}, and {here} on {order.machine}. Put the same files there at the same path."
            )


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
        OSError: a worker's.
    """
    with ExitStack() as stack:
        ray = stack.enter_context(_connected(orders, address))
        orders = fit(orders, ray.nodes(), grow=address is not None)
        crew = stack.enter_context(_crew(ray, orders, on_report))
        stack.enter_context(_plain_errors(ray))
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
    return [record for outcome in outcomes for record in outcome.records]


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
            return [order._replace(threads=threads) for order in orders]
    kind, count = next(iter(needs.items()))
    offers = ", ".join(f"{offered.get(kind, 0):g}" for offered in machines)
    raise OctavoError(
        f"{len(orders)} workers take {count:g} {kind} each, and the machines of the Ray cluster ({offers} {kind}) "
        f"have room for {room}. Ask for fewer workers, or add machines to the cluster."
    )


def _places(offered: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers a machine has room for."""
    return min(int(offered.get(kind, 0) // count) for kind, count in needs.items())


class _Crew:
    """The workers of a run, and what each last reported."""

    def __init__(
        self, ray: Any, orders: Sequence[Order], on_report: Callable[[Sequence[Report]], None]
    ) -> None:
        self._ray, self._orders, self._on_report = ray, orders, on_report
        # While a worker runs, other threads of it answer.
        serving = 1 + _AHEAD * max(order.at_once for order in orders)
        for method, group in _GROUPS.items():
            ray.method(concurrency_group=group)(getattr(Worker, method))
        actor = ray.remote(
            max_restarts=_RESTARTS,
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
        self.reports = [Report(0, 0, "", True, 0)] * len(orders)
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
            if _lock_of(order).exists():
                os.close(_hold(_lock_of(order)))


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


def clear_machine(orders: Sequence[Order]) -> None:
    """Remove the stages' directories from a machine that does not see the driver's, and the directories around
    them that are empty then."""
    directory = orders[0].directory
    if (directory / orders[0].mark).exists():
        return
    for order in orders:
        if _lock_of(order).exists():
            # When the worker has ended.
            os.close(_hold(_lock_of(order)))
            shutil.rmtree(_home_of(order), ignore_errors=True)
            _lock_of(order).unlink(missing_ok=True)
    with suppress(OSError):  # the first that is not empty ends it
        for path in (directory, *directory.parents):
            path.rmdir()


def _needs(order: Order) -> dict[str, float]:
    """What a worker takes of a machine."""
    return {"GPU": 1, "CPU": 1} if order.device == "cuda" else {"CPU": order.threads}


@contextmanager
def _connected(orders: Sequence[Order], address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster."""
    if importlib.util.find_spec("ray") is None:
        raise OctavoError(
            "--workers needs Ray, which is not installed. Install it with `pip install 'octavo[cluster]'`."
        )
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": _cores(orders)}
    try:
        if address is not None:
            _knock(address)
        with _own_signals():
            ray.init(address=address or "local", **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise OctavoError(
            f"No Ray cluster can be used at {address or 'this machine'}: {one_line(error)}. Start one with `ray start "
            "--head`, and pass its address (with RAY_AUTH_MODE=token set, if the cluster asks for a token), or "
            "leave --cluster out to use this machine alone."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise if nothing listens at HOST:PORT. Ray would go on trying for a quarter of an hour."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), timeout=_KNOCK_SECONDS).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the program's way of taking SIGTERM, which Ray would replace by its own."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _cores(orders: Sequence[Order]) -> int:
    return max(os.cpu_count() or 1, sum(int(_needs(order)["CPU"]) for order in orders))


@contextmanager
def _plain_errors(ray: Any) -> Iterator[None]:
    """Workers' own errors, and what handlers of signals raise, without Ray's wrapping."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None or isinstance(error.__cause__, Exception):
            raise
        raise error.__cause__ from None
    except ray.exceptions.RayError as error:
        cause = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, (OctavoError, OSError)):
            raise cause from None
        if isinstance(cause, ray.exceptions.RayActorError):
            raise _given_up(str(cause)) from error
        if isinstance(cause, ray.exceptions.RayError):
            raise WriteError(
                f"The Ray cluster failed: {one_line(cause)}. Look at Ray's logs."
            ) from error
        raise


def _given_up(text: str) -> OctavoError:
    """What to say of a worker that Ray does not start again, from what Ray says."""
    found = re.search(r"\bip[:=] ?([\w.:]+)", text)
    place = f" on {found[1]}" if found else ""
    if "creation task" in text:
        return OctavoError(
            f"A worker{place} could not be started: {text.splitlines()[-1].strip()}. Install the same version of "
            "Octavo on every machine of the cluster."
        )
    return WriteError(
        f"A worker{place} died more than {_RESTARTS} times. If the system ended it for want of memory, which the "
        "kernel's log would tell, pass a smaller --max-memory; otherwise look at Ray's logs there."
    )


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
