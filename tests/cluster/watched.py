"""Workers whose reads and writes are written down, and that are killed or held up at a chosen one.

Run as a program, this module is ``octavo`` with such workers.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from octavo import pipeline
from octavo.cluster import Order, crew, worker
from octavo.memory import Settings

# Names the directory for what is written down, in the environment of all machines.
VARIABLE = "OCTAVO_WATCHED"


class Fault(NamedTuple):
    """What happens, once, at a call.

    Attributes:
        stage: whose worker.
        call: ``preadv`` or ``pwritev``.
        file: ``model`` for any of the checkpoint's, ``edition`` for any of the output's, or else its path in the
            stage's own directory.
        nth: which of those calls of one process, from 1.
        effect: ``kill``; ``pass``, for what others wait for; the number of a fault, to wait for; or a word, to
            wait for :meth:`Watch.release`.
    """

    stage: int
    call: str
    file: str
    nth: int
    effect: str | int


class Call(NamedTuple):
    """A call that was about to be made.

    Attributes:
        time: seconds of a clock that all processes share.
        stage: of the worker.
        process: its number.
        name: ``preadv``, ``pwritev``, or ``begin`` where its stage begins.
        path: of the file.
        start: of the bytes.
        end: behind them.
    """

    time: float
    stage: int
    process: int
    name: str
    path: str
    start: int
    end: int


class Watch:
    """What the workers of one output did, and what is to happen to them."""

    def __init__(self, target: Path) -> None:
        """Those of the output ``target``, whose name no other has."""
        self.target = target
        self.directory = Path(os.environ[VARIABLE]) / target.name
        self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def kept(self) -> Path:
        """Where a run keeps what it has finished."""
        return self.target.parent / f".{self.target.name}.octavo"

    def arrange(self, *faults: Fault) -> None:
        """Choose what happens, before the run begins."""
        (self.directory / "faults").write_text(json.dumps(faults))

    def faults(self) -> list[Fault]:
        """What was chosen."""
        path = self.directory / "faults"
        return [Fault(*fault) for fault in json.loads(path.read_text())] if path.exists() else []

    def strike(self, number: int) -> bool:
        """Claim a fault for the calling process; false if another was there first."""
        try:
            (self.directory / f"struck-{number}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def struck(self) -> set[int]:
        """Numbers of the faults that have happened."""
        return {int(path.name.split("-")[1]) for path in self.directory.glob("struck-*")}

    def release(self, word: str) -> None:
        """Let those go on that wait for it."""
        (self.directory / f"released-{word}").touch()

    def released(self, effect: str | int) -> bool:
        """Whether what waits need not wait any more."""
        if isinstance(effect, int):
            return effect in self.struck()
        return (self.directory / f"released-{effect}").exists()

    def processes(self, stage: int) -> list[int]:
        """Numbers of all workers that the stage has had, in order."""
        return [
            call.process for call in self.calls() if call.stage == stage and call.name == "begin"
        ]

    def calls(self) -> list[Call]:
        """All that were made, in order."""
        return sorted(self._calls())

    def _calls(self) -> Iterator[Call]:
        for path in self.directory.glob("calls-*"):
            # The last line of a process that was killed may be torn.
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    yield Call(*json.loads(line))


class Worker(worker.Worker):
    """A worker that is watched."""

    def run(self, order: Order, before: Any) -> None:
        _watch(order)
        super().run(order, before)


def _watch(order: Order) -> None:
    """Have the calls of this process written down, and faults strike."""
    watch, stage, process = Watch(order.target), order.number, os.getpid()
    faults = dict(enumerate(watch.faults()))
    log = os.open(watch.directory / f"calls-{stage}-{process}", os.O_WRONLY | os.O_CREAT)
    counts: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()
    home = order.directory / f"stage-{stage}"

    def write_down(name: str, path: Path, start: int, end: int) -> None:
        made = Call(time.monotonic(), stage, process, name, str(path), start, end)
        os.write(log, f"{json.dumps(made)}\n".encode())

    def site(path: Path) -> str:
        if path.parent == order.model:
            return "model"
        return "edition" if path.parent.name == "edition" else str(path.relative_to(home))

    def call(
        name: str,
        original: Callable[..., int],
        descriptor: int,
        buffers: Sequence[memoryview],
        start: int,
    ) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        end = start + sum(len(buffer) for buffer in buffers)
        with lock:
            write_down(name, path, start, end)
            counts[name, site(path)] += 1
            nth = counts[name, site(path)]
        for number, fault in faults.items():
            if fault[:4] == (stage, name, site(path), nth) and watch.strike(number):
                _happen(watch, fault)
        return original(descriptor, buffers, start)

    write_down("begin", home, 0, 0)
    for name in ("preadv", "pwritev"):
        setattr(os, name, partial(call, name, getattr(os, name)))


def _happen(watch: Watch, fault: Fault) -> None:
    if fault.effect == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while fault.effect != "pass" and not watch.released(fault.effect):
        time.sleep(0.02)


def _fit_few(
    orders: Sequence[Order], nodes: Sequence[Mapping[str, Any]], *, grow: bool
) -> list[Order]:
    return [
        order._replace(threads=1, settings=order.settings._replace(workers=1)) for order in orders
    ]


def _hold_one(job: object, settings: Settings, *_: object) -> Settings:
    return settings


# What is put in the place of a module's attributes: watched workers, which take one layer and one batch at a
# time.
SLOW: list[tuple[ModuleType, str, Any]] = [
    (crew, "Worker", Worker),
    (crew, "fit", _fit_few),
    (pipeline, "hold_layers", _hold_one),
]


def main() -> None:
    """The ``octavo`` program, with watched workers."""
    from cluster import watched
    from octavo import cli

    for module, name, value in watched.SLOW:
        setattr(module, name, value)
    cli.main()


if __name__ == "__main__":
    main()
