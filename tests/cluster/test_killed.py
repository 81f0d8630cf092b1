"""Workers and drivers that die: others go on from their journals, to the same bytes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.conftest import Alone, Quantize
from cluster.machines import Machines
from cluster.watched import Call, Fault, Watch
from octavo import OctavoError
from octavo.cluster.orders import AHEAD
from tiny import contents

pytestmark = pytest.mark.cluster

# Each of two workers has three layers, one to a pass. The first writes embedded tokens and what comes out of its
# second pass to hidden-0, the rest to hidden-1; the second gets its tokens from the first, and so begins with
# hidden-1.
BATCHES = 24


def hidden_writes(calls: list[Call], process: int) -> int:
    """Batches that a worker computed."""
    return sum(
        call.process == process and call.name == "pwritev" and "/hidden-" in call.path
        for call in calls
    )


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_killed_while_they_read_calibrate_and_write(
    spread: Quantize, alone: Alone, watch: Watch
) -> None:
    watch.arrange(
        Fault(1, "preadv", "model", 12, "kill"),  # its second layer
        Fault(0, "pwritev", "hidden-0", BATCHES + 7, "kill"),  # in its second pass
        # Its third layer: only the pass that comes next waits until a pass is in the journal.
        Fault(1, "pwritev", "edition", 70, "kill"),
    )
    spread(watch.target)
    assert contents(watch.target) == alone()
    assert watch.struck() == {0, 1, 2}
    # They went on where the last finished pass ended.
    _, first = watch.processes(0)
    *_, second = watch.processes(1)
    assert hidden_writes(watch.calls(), first) == 2 * BATCHES
    assert hidden_writes(watch.calls(), second) == 0


def test_a_worker_killed_while_the_next_still_needs_it_then_both(
    spread: Quantize, alone: Alone, watch: Watch
) -> None:
    watch.arrange(
        Fault(1, "pwritev", "hidden-1", 3, "when the first is done"),
        Fault(1, "pwritev", "hidden-1", 15, "until both are killed"),
    )
    journal = watch.kept / "stage-0" / "journal"

    def kill() -> None:
        wait_until(lambda: journal.exists() and journal.read_text().count('"layer"') == 3)
        wait_until(lambda: 0 in watch.struck())
        (first,) = watch.processes(0)
        given = [c for c in watch.calls() if c.name == "preadv" and c.path.endswith("hidden-1")]
        # Nobody is flooded: three batches are in use or have been, and a few wait.
        assert len(given) <= BATCHES + 3 + AHEAD
        os.kill(first, signal.SIGKILL)
        watch.release("when the first is done")
        wait_until(lambda: 1 in watch.struck())
        for process in (watch.processes(0)[-1], *watch.processes(1)):
            os.kill(process, signal.SIGKILL)

    def kill_and_release() -> None:
        try:
            kill()
        finally:
            for fault in watch.faults():
                watch.release(str(fault.effect))

    with ThreadPoolExecutor(1) as aside:
        killed = aside.submit(kill_and_release)
        spread(watch.target)
        killed.result()
    assert contents(watch.target) == alone()
    assert [len(watch.processes(stage)) for stage in (0, 1)] == [3, 2]
    # What the first had done it gave out again from its file.
    assert [hidden_writes(watch.calls(), process) > 0 for process in watch.processes(0)] == [
        *(True, False, False)
    ]


def test_workers_killed_at_random_moments(spread: Quantize, alone: Alone, watch: Watch) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    sites = [
        *(("preadv", "model", 27), ("pwritev", "edition", 80)),
        *(("pwritev", "hidden-0", BATCHES), ("pwritev", "hidden-1", BATCHES)),
    ]
    faults = []
    for _ in range(3):
        name, file, count = chance.choice(sites)
        faults.append(Fault(chance.randrange(2), name, file, chance.randint(1, count), "kill"))
    watch.arrange(*faults)
    spread(watch.target)
    assert contents(watch.target) == alone(), f"seed {seed}"
    assert watch.struck(), f"seed {seed}"


class Program:
    """``octavo quantize`` with two watched workers."""

    def __init__(self, models: Path, output: Path, *options: str) -> None:
        arguments = [str(models / "llama"), "-o", str(output), "--calib", str(models / "ids.npy")]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cluster.watched", "quantize", *arguments),
                *("--shard-size", "100000", "--workers", "2", *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit code, and what it printed to stdout and stderr."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@contextmanager
def program(models: Path, output: Path, *options: str) -> Iterator[Program]:
    """One that is killed, if it has not ended, with all that belongs to it."""
    started = Program(models, output, *options)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.end()


def lines_of_ours(text: str) -> bool:
    """Whether there is nothing of Ray's."""
    return all(line.startswith(("layers ", "error: ")) for line in text.splitlines())


def test_a_driver_killed_terminated_and_resumed(
    models: Path, machines: Machines, spread: Quantize, alone: Alone, watch: Watch
) -> None:
    watch.arrange(
        Fault(0, "pwritev", "hidden-0", BATCHES + 5, "never"),
        Fault(1, "pwritev", "hidden-1", 7, "never"),
    )
    address = ("--cluster", machines.address)
    with program(models, watch.target, *address) as first:
        wait_until(lambda: 0 in watch.struck())
        first.process.kill()
        code, out, err = first.end()
        assert (code, out, lines_of_ours(err)) == (-signal.SIGKILL, "", True)

    with pytest.raises(OctavoError, match="workers: 2 then, 3 now"):
        spread(watch.target, workers=3, resume=True)

    # As if a worker of the first driver lived on: the new one waits.
    lock = (watch.kept / "stage-0.lock").open("r+")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with program(models, watch.target, *address, "--resume") as second:
        wait_until(lambda: len(watch.processes(0)) == 2)
        time.sleep(1)
        released = time.monotonic()
        lock.close()
        wait_until(lambda: 1 in watch.struck())
        second.process.terminate()
        code, out, err = second.end()
    assert (code, out, lines_of_ours(err)) == (128 + signal.SIGTERM, "", True), err
    assert "of 6 layers are finished and kept" in err
    assert "--resume" in err

    spread(watch.target, resume=True)
    assert contents(watch.target) == alone()
    _, process, *_ = watch.processes(0)
    writes = [c.time for c in watch.calls() if c.process == process and c.name == "pwritev"]
    assert min(writes) > released


def test_a_cluster_of_its_own_ends_with_an_interrupted_driver(
    models: Path, spread: Quantize, alone: Alone, watch: Watch
) -> None:
    watch.arrange(Fault(0, "pwritev", "hidden-0", BATCHES + 5, "never"))
    with program(models, watch.target) as started:
        # The first layer is written beside the second pass.
        journal = watch.kept / "stage-0" / "journal"
        wait_until(lambda: 0 in watch.struck() and '"layer"' in journal.read_text())
        members = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal()]
        ours = [pid for pid in members if session(pid) == started.process.pid]
        assert len(ours) > 4  # the driver, Ray's own processes, and the workers
        os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does
        code, out, err = started.end()
    assert (code, out, lines_of_ours(err)) == (128 + signal.SIGINT, "", True)
    assert "interrupted; 1 of 6 layers are finished and kept" in err
    wait_until(lambda: not any(session(pid) == started.process.pid for pid in ours))
    spread(watch.target, resume=True)
    assert contents(watch.target) == alone()


def session(process: int) -> int | None:
    """That a process belongs to; None if it has ended."""
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None
