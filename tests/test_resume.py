"""Runs that are killed, fail or lose power anywhere, and are resumed: the bytes of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
import xxhash
from safetensors.torch import load_file

import tiny
from faults import Ended, Fault, Run, Server, Site
from octavo.checkpoint import Journal
from octavo.memory import PROGRAM
from spoiling import edit_json

pytestmark = pytest.mark.faults

LAYERS = 3
WORK = ".out.octavo"
JOURNAL, LOCK, EDITION = f"{WORK}/journal", f"{WORK}/lock", f"{WORK}/edition"
SHARD = f"{EDITION}/model.safetensors"
WRITES = ("pwritev", "sendfile")
# What decides what is found afterwards.
DECISIVE = ("mkdir", "rename", "unlink", "rmdir")
SYNCS = ("fsync", "fdatasync")
# Two layers are calibrated, one of them is written.
MIDWAY = Fault(Site("pwritev", JOURNAL), 6, "kill")
# Everything is written, and neither of the two renames done.
AT_THE_END = Fault(Site("open", f"{WORK}/whole"), 1, "kill")

VARIANTS: dict[str, tuple[str, ...]] = {
    "static": (),
    "dynamic": ("--scheme", "fp8-dynamic", "--shard-size", "60kB"),
    "tensorrt-llm": ("--format", "tensorrt-llm"),
    "gptq": ("--rounding", "gptq"),
    "learned": ("--rounding", "learned"),
}
# Those that quantize a layer while they calibrate it.
IN_TURN = ("gptq", "learned")

T = TypeVar("T")
Contents = Mapping[str, bytes | None]


class Whole(NamedTuple):
    """What an uninterrupted run does: what it leaves, and its calls."""

    contents: Contents
    calls: list[Site]


class Laboratory:
    """Where runs are made.

    Attributes:
        model: the checkpoint.
        ids: calibration tokens.
        server: starts runs.
        whole: an uninterrupted run of each variant.
    """

    def __init__(self, root: Path, model: Path, ids: Path, server: Server) -> None:
        self.model, self.ids, self.server = model, ids, server
        self._root, self._numbers = root, itertools.count()
        self.whole: dict[str, Whole] = {}
        for variant in VARIANTS:
            bench = self.bench(variant)
            ended = bench.run()
            assert ended.code == 0, ended.stderr
            self.whole[variant] = Whole(bench.contents(), ended.calls)

    def bench(self, variant: str = "static") -> Bench:
        """A place for runs of their own."""
        directory = self._root / f"{next(self._numbers)}"
        (directory / "disk").mkdir(parents=True)
        return Bench(self, directory, variant)


class Bench:
    """A directory in which one output is made.

    Attributes:
        root: holds the output and what is beside it, nothing else.
        out: the output.
        model: the checkpoint.
        ids: calibration tokens.
        variant: which options.
    """

    def __init__(self, laboratory: Laboratory, directory: Path, variant: str) -> None:
        self._laboratory, self._directory, self.variant = laboratory, directory, variant
        self.root = directory / "disk"
        self.out = self.root / "out"
        self.model, self.ids = laboratory.model, laboratory.ids

    def copy(self) -> Bench:
        """Another like it."""
        other = self._laboratory.bench(self.variant)
        shutil.copytree(self.root, other.root, dirs_exist_ok=True)
        other.model, other.ids = self.model, self.ids
        return other

    def own_input(self) -> None:
        """Give it a checkpoint and calibration tokens of its own."""
        self.model = Path(shutil.copytree(self.model, self._directory / "own" / self.model.name))
        self.ids = Path(shutil.copy(self.ids, self._directory / "own"))

    def command(self, *options: object) -> list[str]:
        """Arguments of the program."""
        given = ["quantize", self.model, "-o", self.out, "--quiet", "--calib", self.ids]
        return [*map(str, given), *VARIANTS[self.variant], *map(str, options)]

    def start(self, *options: object, fault: Fault | None = None) -> Run:
        """Begin a run with further options."""
        log = self._directory / f"log-{len(list(self._directory.iterdir()))}"
        return self._laboratory.server.start(self.command(*options), log, self.root, fault)

    def run(self, *options: object, fault: Fault | None = None) -> Ended:
        """Run, and be killed if that is the fault. What a loss of power takes away is gone then."""
        ended = self.start(*options, fault=fault).wait()
        assert ended.struck == (fault is not None)
        if fault and fault.effect in ("kill", "late", "tear", "power"):
            assert ended.code == -signal.SIGKILL, ended.stderr
        if fault and fault.effect == "power":
            shutil.rmtree(self.root)
            next(self._directory.glob("log-*/disk")).rename(self.root)
        return ended

    def contents(self) -> Contents:
        """All that is there."""
        return tiny.contents(self.root)

    @property
    def expected(self) -> Contents:
        """All that is there after an uninterrupted run."""
        return self._laboratory.whole[self.variant].contents

    def holds_new(self, place: str) -> bool:
        """Whether all files of the output are whole in ``place``."""
        found = self.contents()
        names = [name.removeprefix("out/") for name in self.expected if name != "out"]
        return all(found.get(f"{place}/{name}") == self.expected[f"out/{name}"] for name in names)

    def records(self) -> list[dict[str, Any]]:
        """What the journal holds."""
        path = self.root / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line.split(b" ", 1)[1]) for line in lines if line.endswith(b"}\n")]

    def recorded(self, kind: str) -> set[int]:
        """Numbers of each ``pass`` or ``layer`` in the journal."""
        return {record[kind] for record in self.records() if kind in record}

    def edit(self, file: str, change: Callable[[bytes], bytes]) -> None:
        """Change a file in the root."""
        path = self.root / file
        path.write_bytes(change(path.read_bytes()))


def complete(bench: Bench, ended: Ended) -> None:
    """Check that a run has left what it should and nothing else."""
    assert ended.code == 0, ended.stderr
    assert bench.contents() == bench.expected


def message(ended: Ended) -> str:
    """The message of a run that failed as a run should."""
    assert ended.code == 2, ended
    assert re.fullmatch(r"error: \S[^\n]*\S\n", ended.stderr), ended.stderr
    return ended.stderr


def refusal(bench: Bench, *options: object) -> str:
    """The message of a run that refuses to begin and changes nothing."""
    before = bench.contents()
    told = message(bench.run(*options))
    # The lock has the number of the process that held it last.
    assert {**bench.contents(), LOCK: None} == {**before, LOCK: None}
    return told


def numbered(calls: Sequence[Site]) -> list[tuple[Site, int]]:
    """Each call with which of those there it is, from 1."""
    return [(site, calls[: index + 1].count(site)) for index, site in enumerate(calls)]


def spread(
    calls: Sequence[Site], every: int, *effects: str, always: Collection[str] = ("rename", "rmdir")
) -> list[Fault]:
    """Faults all over a run, and at some kinds of calls ``always``; effects take turns at writes, which
    alone can be torn."""
    return [
        Fault(site, nth, effects[index // every % len(effects) if site.call in WRITES else 0])
        for index, (site, nth) in enumerate(numbered(calls))
        if index % every == 0 or site.call in always
    ]


def together(check: Callable[[T], object], cases: Iterable[T]) -> None:
    """Check all cases, a few at a time, and tell of every one that fails."""
    with ThreadPoolExecutor(4) as pool:
        futures = [(case, pool.submit(check, case)) for case in cases]
    errors = []
    for case, future in futures:
        if error := future.exception():
            error.add_note(f"case: {case}")
            errors.append(error)
    if errors:
        raise BaseExceptionGroup(f"{len(errors)} of {len(futures)} cases", errors)


def check_resumes(bench: Bench, *options: str) -> None:
    """Check that a run resumes: it does the rest and no more, and leaves the same bytes."""
    passes, layers = bench.recorded("pass"), bench.recorded("layer")
    ended_well = bench.out.exists() and not (bench.root / JOURNAL).exists()
    ended = bench.run("--resume", *options)
    if ended_well:
        assert "already exists and no interrupted run of it is left to resume" in message(ended)
    else:
        assert ended.code == 0, ended.stderr
        if bench.variant in IN_TURN:
            # Samples move on through a quantized layer, and need not behind the last. One they have not moved on from
            # is quantized again.
            calibrated, layers = range(LAYERS - 1), layers & passes
        else:
            calibrated = range(LAYERS if bench.variant != "dynamic" else 0)
        assert ended.calibrated == [number for number in calibrated if number not in passes]
        assert ended.quantized == [index for index in range(LAYERS) if index not in layers]
    assert bench.contents() == bench.expected


def check_killed(bench: Bench, ended: Ended) -> None:
    """Check what is left of a killed run: no half of an output, and at most one layer done in vain."""
    if bench.out.exists():
        assert bench.holds_new("out")
    else:
        assert len(set(ended.calibrated) - bench.recorded("pass")) <= 1
        assert len(set(ended.quantized[:-1]) - bench.recorded("layer")) <= 1


def check_journal(bench: Bench) -> None:
    """Check that all tensors are on disk that the journal says are."""
    known: dict[str, str] = {}
    for record in bench.records():
        known |= record.get("carried", {}) | record.get("tensors", {})
    # Where it is made, or where it was put in the end.
    edition = bench.root / EDITION if (bench.root / EDITION).exists() else bench.out
    for shard in edition.glob("*.safetensors") if known else ():
        for name, tensor in load_file(shard).items():
            found = xxhash.xxh3_128_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
            assert known.pop(name, found) == found, name
    assert not known


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    root = tmp_path_factory.mktemp("resume")
    model = tiny.save_tokenizer(tiny.build("llama", root / "model", layers=LAYERS))
    ids = tiny.save_ids(root / "ids.npy", samples=8)
    with Server("quantize", model, "-o", root / "warm", "--quiet", "--calib", ids) as server:
        yield Laboratory(root, model, ids, server)


def mount(*arguments: object) -> bool:
    """Whether ``mount`` did it."""
    command = ["mount", *map(str, arguments)]
    return subprocess.run(command, capture_output=True).returncode == 0


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes in ``directory``."""
    if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory):
        pytest.skip("cannot mount a small tmpfs here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def with_old(laboratory: Laboratory) -> Bench:
    """A place where an older output is."""
    bench = laboratory.bench()
    bench.out.mkdir()
    (bench.out / "old").write_bytes(b"precious")
    return bench


@pytest.fixture(scope="module")
def interrupted(laboratory: Laboratory) -> Bench:
    """A run that was killed midway; copy it to go on."""
    bench = laboratory.bench()
    bench.run(fault=MIDWAY)
    assert (bench.recorded("pass"), bench.recorded("layer")) == ({0, 1}, {0})
    return bench


@pytest.fixture(scope="module")
def unpublished(laboratory: Laboratory) -> Bench:
    """A run that was killed when nothing but the renames was left; copy it to go on."""
    bench = laboratory.bench()
    bench.run(fault=AT_THE_END)
    assert bench.holds_new(EDITION)
    return bench


class TestKilled:
    @pytest.mark.parametrize(
        ("variant", "every", "always"),
        [
            ("static", 8, DECISIVE),
            ("dynamic", 20, ["rename"]),
            ("tensorrt-llm", 20, ["rename"]),
            ("gptq", 12, ["rename"]),
            ("learned", 16, ["rename"]),
        ],
        ids=VARIANTS,
    )
    def test_anywhere(
        self, variant: str, every: int, always: Collection[str], laboratory: Laboratory
    ) -> None:
        def check(fault: Fault) -> None:
            bench = laboratory.bench(variant)
            check_killed(bench, bench.run(fault=fault))
            check_resumes(bench)

        calls = laboratory.whole[variant].calls
        together(check, spread(calls, every, "kill", "tear", always=always))

    @pytest.mark.parametrize(
        ("variant", "every"), [("static", 11), ("dynamic", 30), ("gptq", 20), ("learned", 30)]
    )
    def test_by_a_loss_of_power(self, variant: str, every: int, laboratory: Laboratory) -> None:
        def check(fault: Fault) -> None:
            bench = laboratory.bench(variant)
            check_killed(bench, bench.run(fault=fault))
            check_journal(bench)
            check_resumes(bench)

        together(check, spread(laboratory.whole[variant].calls, every, "power"))

    @pytest.mark.parametrize(("variant", "records"), [("static", 10), ("dynamic", 6)])
    def test_while_the_disk_is_slow(
        self, variant: str, records: int, laboratory: Laboratory, tmp_path: Path
    ) -> None:
        model = tiny.build("llama", tmp_path / "model", layers=4)

        def check(record: int) -> None:
            bench = laboratory.bench(variant)
            bench.model = model
            check_killed(bench, bench.run(fault=Fault(Site("pwritev", JOURNAL), record, "late")))
            passes = bench.recorded("pass")
            ended = bench.run("--resume")
            assert ended.code == 0, ended.stderr
            calibrated = range(4 if variant == "static" else 0)
            assert ended.calibrated == [number for number in calibrated if number not in passes]

        together(check, range(3, records + 1))

    def test_again_and_again(self, laboratory: Laboratory) -> None:
        bench = laboratory.bench()
        records = 2 + 2 * LAYERS
        for known in range(records):
            # Each run adds one record to those that are there.
            fault = Fault(Site("pwritev", JOURNAL), 2 if known else 1, "tear")
            bench.run("--resume", fault=fault)
            assert len(bench.records()) == known
        check_resumes(bench)

    def test_at_any_time(self, laboratory: Laboratory) -> None:
        bench = laboratory.bench()
        begin = time.perf_counter()
        complete(bench, bench.run())
        usual = time.perf_counter() - begin

        def check(seed: int) -> None:
            bench, rng = laboratory.bench(), random.Random(seed)
            for _ in range(3):
                run = bench.start("--resume")
                time.sleep(rng.uniform(0, usual))
                run.signal(signal.SIGKILL)
                run.wait()
            check_resumes(bench)

        together(check, range(6))

    def test_as_a_program_of_its_own(self, laboratory: Laboratory, tmp_path: Path) -> None:
        bench, whole = laboratory.bench(), laboratory.bench()
        bench.ids = whole.ids = tiny.save_ids(tmp_path / "ids.npy", samples=1000, seq_len=64)
        program = [sys.executable, "-m", "octavo.cli"]
        process = subprocess.Popen([*program, *bench.command()])
        while not bench.recorded("pass") and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        subprocess.run([*program, *bench.command("--resume")], check=True)
        assert whole.run().code == 0
        assert bench.contents() == whole.contents()

    def test_while_an_output_is_replaced(self, laboratory: Laboratory) -> None:
        def check(fault: Fault) -> None:
            bench = with_old(laboratory)
            bench.run("--overwrite", fault=fault)
            found = bench.contents()
            old = b"precious" in (found.get("out/old"), found.get(f"{WORK}/replaced/old"))
            assert old or bench.holds_new("out") or bench.holds_new(EDITION)
            for options in (("--resume", "--overwrite"), ("--overwrite",)):
                again = bench.copy()
                complete(again, again.run(*options))
            ended = bench.run("--resume")
            if ended.code == 0:
                complete(bench, ended)
            else:
                assert "exists" in message(ended)
                assert bench.contents() == bench.expected or bench.contents()["out/old"]

        calls = with_old(laboratory).run("--overwrite").calls
        assert Site("unlink", f"{WORK}/replaced/old") in calls
        end = numbered(calls)[calls.index(AT_THE_END.site) :]
        decisive = [Fault(site, nth, "kill") for site, nth in end if site.call in DECISIVE]
        together(check, [MIDWAY, AT_THE_END, *decisive])

    def test_before_the_new_output_is_in_the_place_of_the_old(self, laboratory: Laboratory) -> None:
        bench = with_old(laboratory)
        bench.run("--overwrite", fault=Fault(Site("rename", EDITION), 1, "kill"))
        assert not bench.out.exists()
        # The run that starts over puts the old one back first.
        bench.run("--overwrite", fault=MIDWAY)
        assert bench.contents()["out/old"] == b"precious"


class TestRefusedByTheSystem:
    """A write, or anything else that changes the disk, fails."""

    def test_anywhere(self, laboratory: Laboratory) -> None:
        counts = Counter(laboratory.whole["static"].calls)
        tried = [site for site in counts if site.call not in ("unlink", "rmdir")]
        often = [site for site in tried if site.call in ("pwritev", *SYNCS) and counts[site] > 1]
        errors = itertools.cycle(["ENOSPC", "EIO"])
        faults = [Fault(site, 1, error) for site, error in zip(tried, errors, strict=False)]
        faults += [
            Fault(site, counts[site], error) for site, error in zip(often, errors, strict=False)
        ]

        def check(fault: Fault) -> None:
            bench = laboratory.bench()
            ended = bench.run(fault=fault)
            if ended.code == 0:
                # Python copies a file in another way if need be, and a directory that is there will do.
                assert fault.site.call in ("sendfile", "mkdir")
                complete(bench, ended)
                return
            told, finished = message(ended), len(bench.recorded("layer"))
            assert str(bench.out) in told
            assert ("is full" if fault.effect == "ENOSPC" else "Input/output error") in told
            assert not bench.out.exists() or bench.holds_new("out")
            if bench.contents():
                assert finished
                assert f"{finished} of {LAYERS} layers are finished" in told
                assert "--resume" in told
                check_resumes(bench)

        together(check, faults)

    # Room for the shard, the hidden states, and so many KiB: not for the whole journal, or not for the
    # small files of the end.
    @pytest.mark.parametrize("room", [12, 24])
    def test_a_disk_that_is_really_full(self, room: int, laboratory: Laboratory) -> None:
        bench = laboratory.bench()
        hidden = 2 * 8 * 16 * 64 * 2
        shard = bench.expected["out/model.safetensors"]
        assert shard
        pages = -(-len(shard) // 4096) * 4096 + hidden + room * 1024
        with small_disk(bench.root, pages):
            told = message(bench.run())
            assert "is full" in told
            assert f"{len(bench.recorded('layer'))} of {LAYERS} layers are finished" in told
            assert "is full" in message(bench.run("--resume"))
            mount("-o", "remount,size=1m", bench.root)
            check_resumes(bench)

    def test_at_the_end_of_a_resumed_run(self, unpublished: Bench) -> None:
        bench = unpublished.copy()
        told = message(bench.run("--resume", fault=Fault(Site("rename", EDITION), 1, "EIO")))
        assert f"{LAYERS} of {LAYERS} layers are finished" in told
        check_resumes(bench)

    def test_a_copy_that_fails_halfway(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        site = Site("sendfile", f"{EDITION}/tokenizer.json")
        assert str(bench.out) in message(bench.run("--resume", fault=Fault(site, 2, "EIO")))
        check_resumes(bench)

    @pytest.mark.parametrize("site", [Site("unlink", JOURNAL), Site("unlink", LOCK)])
    def test_while_cleaning_up(self, site: Site, laboratory: Laboratory) -> None:
        bench = laboratory.bench()
        last = laboratory.whole["static"].calls.count(site)
        assert bench.run(fault=Fault(site, last, "EIO")).code == 0
        assert bench.holds_new("out")
        assert (bench.root / WORK).exists()
        check_resumes(bench)


class TestDamagedWork:
    """What was finished is found to be other than it was left."""

    def test_a_journal_that_ends_anywhere(self, tmp_path: Path) -> None:
        path, records = tmp_path / "journal", [{"pass": number} for number in range(3)]
        with Journal(path, tmp_path / "out") as journal:
            for record in records:
                journal.append(record)
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [b"".join(lines[:count]) for count in range(4)]
        for size in range(len(whole[3]) + 1):
            path.write_bytes(whole[3][:size])
            with Journal(path, tmp_path / "out") as journal:
                known = sum(len(lines) <= size for lines in whole[1:])
                assert journal.records == records[:known]
                assert path.read_bytes() == whole[known]
                journal.append({"pass": "next"})
            with Journal(path, tmp_path / "out") as journal:
                assert journal.records == [*records[:known], {"pass": "next"}]

    @pytest.mark.parametrize("cut", [1, 70, 5000, 10**9])
    def test_a_journal_cut(self, cut: int, unpublished: Bench) -> None:
        bench = unpublished.copy()
        bench.edit(JOURNAL, lambda content: content[:-cut])
        complete(bench, bench.run("--resume"))

    def test_a_journal_altered_in_any_line(self, unpublished: Bench) -> None:
        def check(line: int) -> None:
            bench = unpublished.copy()
            lines = (bench.root / JOURNAL).read_bytes().splitlines(keepends=True)
            lines[line] = lines[line].replace(b"e", b"E", 1)
            bench.edit(JOURNAL, lambda _: b"".join(lines))
            ended = bench.run("--resume")
            complete(bench, ended)
            assert set(ended.quantized) >= {
                json.loads(later.split(b" ", 1)[1])["layer"]
                for later in lines[line + 1 :]
                if b'"layer"' in later
            }

        together(check, range(len(unpublished.records())))

    @pytest.mark.parametrize("name", ["q_proj.weight", "down_proj.weight", "q_proj.weight_scale"])
    def test_a_torn_tensor(self, name: str, unpublished: Bench) -> None:
        bench = unpublished.copy()
        raw = (bench.root / SHARD).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        offsets = {
            tensor: record["data_offsets"]
            for tensor, record in json.loads(raw[8:end]).items()
            if tensor.startswith("model.layers.2.") and tensor.endswith(name)
        }
        ((start, stop),) = offsets.values()
        middle, last = end + (start + stop) // 2, end + stop
        bench.edit(SHARD, lambda raw: raw[:middle] + bytes(last - middle) + raw[last:])
        ended = bench.run("--resume")
        complete(bench, ended)
        assert (ended.calibrated, ended.quantized) == ([], [2])

    def test_a_torn_header(self, unpublished: Bench) -> None:
        bench = unpublished.copy()
        bench.edit(SHARD, lambda raw: bytes(100) + raw[100:])
        check_resumes(bench)

    def test_a_shard_that_is_shorter(self, unpublished: Bench) -> None:
        bench = unpublished.copy()
        bench.edit(SHARD, lambda raw: raw[:-1000])
        ended = bench.run("--resume")
        complete(bench, ended)
        assert not ended.calibrated
        assert 0 < len(ended.quantized) < LAYERS

    def test_a_shard_that_is_gone(self, unpublished: Bench) -> None:
        bench = unpublished.copy()
        (bench.root / SHARD).unlink()
        ended = bench.run("--resume")
        complete(bench, ended)
        assert (ended.calibrated, ended.quantized) == ([], [*range(LAYERS)])

    @pytest.mark.parametrize("spoil", ["torn", "shorter", "gone"])
    @pytest.mark.parametrize(
        ("files", "calibrated"),
        [(["hidden-1"], [2]), (["hidden-0"], [1, 2]), (["hidden-0", "hidden-1"], [0, 1, 2])],
    )
    def test_hidden_states(
        self, files: list[str], calibrated: list[int], spoil: str, interrupted: Bench
    ) -> None:
        bench = interrupted.copy()
        for file in files:
            path = bench.root / WORK / file
            content = path.read_bytes()[:-64]
            path.unlink()
            if spoil != "gone":
                path.write_bytes(content + bytes(64 if spoil == "torn" else 0))
        ended = bench.run("--resume")
        complete(bench, ended)
        assert (ended.calibrated, ended.quantized) == (calibrated, [1, 2])

    def test_no_edition(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        shutil.rmtree(bench.root / EDITION)
        complete(bench, bench.run("--resume"))

    def test_something_else_in_the_place_of_the_edition(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        shutil.rmtree(bench.root / EDITION)
        bench.out.mkdir()
        (bench.out / "theirs").write_bytes(b"precious")
        told = message(bench.run("--resume"))
        assert "already exists and no interrupted run of it is left to resume" in told
        assert bench.contents() == {"out": None, "out/theirs": b"precious"}


class TestChanged:
    """The run that is to be resumed is not the one that was interrupted."""

    @pytest.fixture
    def own(self, laboratory: Laboratory) -> Bench:
        """A run with input of its own that was killed midway."""
        bench = laboratory.bench()
        bench.own_input()
        bench.run(fault=MIDWAY)
        return bench

    @pytest.mark.parametrize(
        ("file", "change", "told"),
        [
            (
                "config.json",
                lambda path: edit_json(path, lambda config: config.update(note="new")),
                ("its input differ", "config.json: ", "bytes", "Restore the input"),
            ),
            (
                "model.safetensors",
                lambda path: os.utime(path),
                ("its input differ", "model.safetensors: ", "modified", "Restore the input"),
            ),
            (
                "../ids.npy",
                lambda path: tiny.save_ids(path, samples=8, seed=1),
                ("its calibration tokens differ", "Restore the calibration data"),
            ),
        ],
    )
    def test_input(
        self, file: str, change: Callable[[Path], object], told: tuple[str, ...], own: Bench
    ) -> None:
        path = own.model / file
        before, times = path.read_bytes(), path.stat()
        change(path)
        found = refusal(own, "--resume")
        assert [part for part in (*told, "--overwrite without --resume") if part not in found] == []
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        check_resumes(own)

    def test_options(self, laboratory: Laboratory, interrupted: Bench) -> None:
        bench = interrupted.copy()
        changes = {
            ("--scheme", "fp8-dynamic"): "scheme weights: tensor then, channel now",
            ("--format", "quark"): "format: modelopt then, quark now",
            ("--samples", "4"): "calibration samples: None then, 4 now",
            ("--seq-len", "8"): "calibration seq_len: None then, 8 now",
            ("--seed", "1"): "calibration seed: 0 then, 1 now",
            # Too little for a batch of the usual size.
            ("--max-memory", f"{PROGRAM // 1000 + 1530}kB"): "tokens in a batch",
            ("--shard-size", "60kB"): "shard size: 5000000000 then, 60000 now",
            ("--kv-cache", "none"): "scheme kv_cache: fp8 then, none now",
            ("--exclude", "*.q_proj"): "scheme exclude: [] then, ['*.q_proj'] now",
            ("--merge-scales",): "scheme merge_scales: False then, True now",
            ("--rounding", "gptq"): "scheme rounding: nearest then, gptq now",
        }
        for options, told in changes.items():
            found = refusal(bench, "--resume", *options)
            assert told in found
            assert "--overwrite without --resume" in found
        check_resumes(bench)

    def test_versions(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        records = bench.records()
        records[0]["begin"]["versions"]["torch"] = "1.0"
        (bench.root / JOURNAL).unlink()
        with Journal(bench.root / JOURNAL, bench.out) as journal:
            for record in records:
                journal.append(record)
        found = refusal(bench, "--resume")
        assert "its versions differ" in found
        assert f"torch: 1.0 then, {torch.__version__} now" in found

    def test_neither_option(self, interrupted: Bench) -> None:
        found = refusal(interrupted)
        assert all(option in found for option in ("--resume", "--overwrite", WORK))

    def test_to_start_over(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        bench.variant = "dynamic"
        ended = bench.run("--overwrite")
        complete(bench, ended)
        assert ended.quantized == [*range(LAYERS)]

    def test_an_output_beside_an_interrupted_run(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        bench.out.mkdir()
        (bench.out / "theirs").write_bytes(b"precious")
        assert "--overwrite" in refusal(bench, "--resume")
        complete(bench, bench.run("--resume", "--overwrite"))


class TestTwoAtOnce:
    @pytest.mark.parametrize("point", [Fault(Site("open", JOURNAL), 1, ""), MIDWAY])
    def test_the_second_is_refused(self, point: Fault, laboratory: Laboratory) -> None:
        bench = laboratory.bench()
        first = bench.start(fault=point._replace(effect="SIGSTOP"))
        first.wait_until_stopped()
        for options in ((), ("--resume",), ("--overwrite",)):
            told = refusal(bench, *options)
            assert f"another process (number {first.process})" in told
            assert str(bench.root / LOCK) in told
        first.signal(signal.SIGCONT)
        complete(bench, first.wait())

    def test_a_lock_nobody_holds(self, interrupted: Bench) -> None:
        bench = interrupted.copy()
        bench.edit(LOCK, lambda _: str(os.getpid()).encode())
        check_resumes(bench)


@pytest.mark.parametrize(
    ("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)], ids=["SIGINT", "SIGTERM"]
)
def test_signals_anywhere(number: str, code: int, laboratory: Laboratory) -> None:
    def check(fault: Fault) -> None:
        bench = laboratory.bench()
        ended = bench.run(fault=fault)
        assert ended.code == code, ended.stderr
        told = re.fullmatch(r"error: interrupted; (.*)\n", ended.stderr)
        assert told, ended.stderr
        if told[1] == "nothing is left behind.":
            assert bench.contents() == {}
        elif told[1] == f"{bench.out} is complete.":
            assert bench.holds_new("out")
        else:
            finished = len(bench.recorded("layer"))
            assert finished
            assert told[1].startswith(f"{finished} of {LAYERS} layers are finished and kept in ")
            assert "--resume" in told[1]
            check_resumes(bench)

    together(check, spread(laboratory.whole["static"].calls, 20, number))
