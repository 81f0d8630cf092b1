"""One stage of a run, and what its machine holds for it.

Its methods are called from several threads at a time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.allocator import keep_freed_memory
from octavo.calibration import CalibrationStream, HiddenStates
from octavo.checkpoint import CheckpointWriter, Journal, Place
from octavo.checkpoint.disk import explained
from octavo.cluster.orders import AHEAD, Order, files_of
from octavo.errors import OctavoError
from octavo.job import Job, open_job
from octavo.memory import peak_resident, release
from octavo.preflight import pick_device
from octavo.stage import Stage
from octavo.stopwatch import Stopwatch
from octavo.threads import one_thread_each

# Bytes of a tensor that are sent at a time.
_GATHER_BYTES = 64 << 20


class Report(NamedTuple):
    """How far a worker is.

    Attributes:
        layers: finished.
        batches: gone through its last pass.
        node: name of its machine.
        shared: whether it writes to the driver's directory.
        process: its number.
        peak_memory: the most bytes it has taken.
    """

    layers: int
    batches: int
    node: str
    shared: bool
    process: int
    peak_memory: int


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
        return self._states.read_all(index).view(-1).view(torch.uint8).numpy()

    def report(self) -> Report:
        """How far it is, once it has begun."""
        self._began.wait()
        node = socket.gethostname()
        return Report(
            self._layers,
            len(self._batches),
            node,
            self._shared,
            os.getpid(),
            peak_resident(),
        )

    def read(self, name: str, offset: int) -> bytes:
        """The next bytes of a tensor of the stage, up to a limit; empty behind its end."""
        self.result()
        assert self._writer is not None
        return self._writer.read_bytes(name, offset, _GATHER_BYTES)

    def _run(self, order: Order, before: Any) -> Outcome:
        self._shared = (order.directory / order.mark).exists()
        self._began.set()
        home = order.home
        keep_small = partial(release, order.settings.threshold)
        with ExitStack() as stack:
            stack.enter_context(one_thread_each())
            job = open_job(order.model, order.scheme, order.format, pick_device(order.device))
            stack.callback(job.checkpoint.close)
            _check_files(order, files_of(job.checkpoint))
            with explained(order.target, 0):
                order.directory.mkdir(parents=True, exist_ok=True)
                hold(order.lock)
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
                    scales=job.scheme.scales,
                    workers=order.at_once,
                    before_batch=keep_small,
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
                read_ahead=order.settings.read_ahead,
                cores=order.threads,
                clock=Stopwatch(),
                before_unit=keep_small,
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


class _Ahead:
    """Batches of the worker before, some of them asked for before they are wanted."""

    def __init__(self, before: Any, order: Order) -> None:
        assert order.shape is not None
        self._before, self._shape = before, order.shape
        self._window = AHEAD * order.at_once
        self._asked: dict[int, Any] = {}
        self._lock = threading.Lock()

    def read(self, index: int) -> Tensor:
        """Batch ``index``: ``[streams, samples, seq_len, width]``."""
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
        return data.view(self._shape.dtype).view(self._shape.batch(index))


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


def _check_files(order: Order, found: Mapping[str, str]) -> None:
    for name in {**order.files, **found}:
        here, there = order.files.get(name, "absent"), found.get(name, "absent")
        if here != there:
            raise OctavoError(
                f"{order.model} is not the same checkpoint on every machine: {name} is {there} on "
                f"{socket.gethostname()}, and {here} on {order.machine}. Put the same files there at the same path."
            )


def clear_machine(orders: Sequence[Order]) -> None:
    """Remove the stages' directories from a machine that does not see the driver's, and the directories around
    them that are empty then."""
    directory = orders[0].directory
    if (directory / orders[0].mark).exists():
        return
    for order in orders:
        if order.lock.exists():
            # When the worker has ended.
            os.close(hold(order.lock))
            shutil.rmtree(order.home, ignore_errors=True)
            order.lock.unlink(missing_ok=True)
    with suppress(OSError):  # the first that is not empty ends it
        for path in (directory, *directory.parents):
            path.rmdir()


def hold(path: Path) -> int:
    """Lock a file until the returned descriptor is closed, or this process ends. Waits for whoever has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
