"""Servers measured side by side, against a server whose delays are known."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.patches import Rectangle
from PIL import Image
from typer.testing import CliRunner, Result

from octavo import OctavoError, benchmarking
from octavo.benchmarking import bench
from octavo.cli import app
from octavo.servers import ServerCommand
from octavo.throughput import (
    METRICS,
    BenchResults,
    Candidate,
    Load,
    Pass,
    Request,
    Workload,
    compare,
    find_notes,
    measure,
    parse_concurrency,
    plan_loads,
)
from octavo.throughput.plot import figure
from octavo.throughput.stream import StreamError, read_completion

Write = Callable[[bytes], None]

VOCAB_SIZE = 300
POSITIONS = 64


class FakeServer:
    """The OpenAI completions API in a thread of its own; it waits where a model would compute.

    Attributes:
        url: where it answers, once it runs.
        requests: bodies received, in order.
        most: requests that were in flight at the same time, at most.
        events: shared by servers whose turns matter; the name goes in with every request.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        first: float = 0.0,
        gap: float = 0.0,
        fault: str = "",
        events: list[str] | None = None,
        slow_start: int = 0,
    ) -> None:
        self.name, self.first, self.gap, self.fault = name, first, gap, fault
        self.events = [] if events is None else events
        self.slow_start = slow_start
        self.requests: list[dict[str, Any]] = []
        self.most = self._in_flight = 0
        self.url = ""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", 0)
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.events.append(f"{self.name} starts")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._server.close()
        self._loop.run_until_complete(asyncio.sleep(0.001))
        self._loop.close()
        self.events.append(f"{self.name} stops")

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        ):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                length = head.partition("content-length: ")[2].split("\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                path = head.split()[1]
                if path == "/v1/completions":
                    await self._complete(json.loads(body), writer)
                elif path in ("/v1/models", "/version"):
                    _answer(writer, self._describe(path))
                else:
                    _answer(writer, {"detail": "Not Found"}, "404 Not Found")
                await writer.drain()
                if self.fault == "broken" and path == "/v1/completions":
                    writer.transport.abort()
                    return

    def _describe(self, path: str) -> object:
        if path == "/version":
            return {"version": "1.2.3"}
        card = {"id": "/models/fake-model", "owned_by": "fake-engine", "max_model_len": POSITIONS}
        return {"data": [card]}

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.requests.append(body)
        self.events.append(self.name)
        if self.fault == "refuses":
            _answer(writer, {"error": {"message": "the model is out of soup"}}, "400 Bad Request")
            return
        self._in_flight += 1
        self.most = max(self.most, self._in_flight)
        await asyncio.sleep(self.first + 0.3 * (len(self.requests) <= self.slow_start))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for index in range(body["max_tokens"]):
            if index:
                await asyncio.sleep(self.gap)
            _send(writer, {"choices": [{"text": "", "finish_reason": None}]})
            if self.fault == "broken":
                self._in_flight -= 1
                return
        if self.fault == "errs":
            _send(writer, {"error": {"message": "the engine is dead"}})
        if self.fault != "no usage":
            count = len(body["prompt"])
            usage = {"prompt_tokens": count, "completion_tokens": body["max_tokens"]}
            _send(writer, {"choices": [], "usage": usage})
        if self.fault != "early":
            _chunk(writer, b"data: [DONE]\n\n")
        self._in_flight -= 1
        _chunk(writer, b"")


def _answer(writer: asyncio.StreamWriter, value: object, status: str = "200 OK") -> None:
    body = json.dumps(value).encode()
    writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


def _send(writer: asyncio.StreamWriter, event: object) -> None:
    _chunk(writer, f"data: {json.dumps(event)}\n\n".encode())


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@contextlib.contextmanager
def opened(server: FakeServer) -> Iterator[str]:
    with server:
        yield server.url


def candidate(server: FakeServer, **options: Any) -> Candidate:
    return Candidate(server.name, functools.partial(opened, server), **options)


def workload(
    *loads: tuple[int, int], rounds: int = 1, input_len: int = 8, output_len: int = 4
) -> Workload:
    """``loads`` are pairs of concurrency and requests."""
    return Workload(
        input_len=input_len,
        output_len=output_len,
        loads=tuple(Load(concurrency=count, requests=requests) for count, requests in loads),
        rounds=rounds,
        vocab_size=VOCAB_SIZE,
        seed=5,
    )


def made_up_pass(
    *, name: str = "a", round: int = 1, concurrency: int = 4, seed: int = 0, slow: float = 1.0
) -> tuple[Pass, np.ndarray, np.ndarray]:
    """A pass with random times; the sendings ``[requests]``, and the arrivals ``[requests, tokens]``
    after them, in seconds."""
    random = np.random.default_rng(seed)
    sent = np.sort(random.uniform(0, 3, size=20)) * slow
    arrivals = np.cumsum(random.uniform(0.01, 0.3, size=(20, 7)), axis=1) * slow
    requests = tuple(
        Request(
            sent=begin, arrivals=tuple(times.tolist()), prompt_tokens=11, output_tokens=len(times)
        )
        for begin, times in zip(sent.tolist(), arrivals, strict=True)
    )
    one = Pass(name=name, round=round, concurrency=concurrency, client_busy=0.1, requests=requests)
    return one, sent, arrivals


def length(sent: np.ndarray, arrivals: np.ndarray) -> float:
    """Seconds from the first sending to the last arrival."""
    return float((sent + arrivals[:, -1]).max() - sent.min())


class TestMetrics:
    def test_are_those_of_numpy(self) -> None:
        one, sent, arrivals = made_up_pass()
        seconds = length(sent, arrivals)
        samples = {
            "ttft": arrivals[:, 0],
            "tpot": (arrivals[:, -1] - arrivals[:, 0]) / 6,
            "itl": np.diff(arrivals, axis=1).ravel(),
        }
        expected = {
            "output_tokens_per_second": 20 * 7 / seconds,
            "total_tokens_per_second": 20 * (7 + 11) / seconds,
            **{
                f"{name}_p{percent}_ms": np.quantile(values, percent / 100) * 1000
                for name, values in samples.items()
                for percent in (50, 95)
            },
        }
        found = {name: metric.of(one.requests) for name, metric in METRICS.items()}
        assert found == pytest.approx(expected)

    def test_several_tokens_in_a_chunk_count_for_what_they_are(self) -> None:
        request = Request(sent=0, arrivals=(1.0, 2.0, 5.0), prompt_tokens=1, output_tokens=9)
        found = {name: metric.of([request]) for name, metric in METRICS.items()}
        assert found["output_tokens_per_second"] == pytest.approx(9 / 5)
        assert found["tpot_p50_ms"] == pytest.approx(4000 / 8)
        assert found["itl_p50_ms"] == pytest.approx(2000)

    def test_one_token_has_no_time_between_tokens(self) -> None:
        request = Request(sent=0, arrivals=(1.0,), prompt_tokens=1, output_tokens=1)
        passes = [
            Pass(name=name, round=1, concurrency=1, client_busy=0, requests=(request,))
            for name in "ab"
        ]
        (comparison,) = compare(passes, ["a", "b"])
        kept = {name for name in METRICS if not name.startswith(("tpot", "itl"))}
        assert set(comparison.values["a"]) == set(comparison.ratios["b"]) == kept

    def test_a_machine_that_slows_down_does_not_change_the_ratio(self) -> None:
        slowness = (1.0, 1.7, 4.0)
        passes = [
            made_up_pass(name=name, round=round, slow=slow * factor)[0]
            for round, slow in enumerate(slowness, 1)
            for name, factor in (("a", 1.0), ("b", 0.5))
        ]
        (comparison,) = compare(passes, ["a", "b"])
        seconds = length(*made_up_pass()[1:])
        rates = sorted(20 * 7 / (slow * seconds) for slow in slowness)
        values = comparison.values["a"]["output_tokens_per_second"]
        assert [values.low, values.median, values.high] == pytest.approx(rates)
        for metric, expected in (("output_tokens_per_second", 2), ("ttft_p95_ms", 0.5)):
            ratio = comparison.ratios["b"][metric]
            assert [ratio.low, ratio.median, ratio.high] == pytest.approx([expected] * 3)

    def test_ratios_are_taken_in_a_round_and_their_spread_over_rounds(self) -> None:
        factors = (0.5, 0.8, 0.4, 2.0)
        passes = [
            made_up_pass(name=name, round=round, slow=slow, concurrency=concurrency)[0]
            for concurrency in (1, 8)
            for round, factor in enumerate(factors, 1)
            for name, slow in (("a", 1.0), ("b", factor))
        ]
        for comparison in compare(passes, ["a", "b"]):
            ratio = comparison.ratios["b"]["ttft_p50_ms"]
            assert (ratio.low, ratio.median, ratio.high) == pytest.approx((0.4, 0.65, 2.0))
        assert [one.concurrency for one in compare(passes, ["a", "b"])] == [1, 8]


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'
TOKEN = b'data: {"choices": [{"text": "x"}]}\n\n'
DONE = b"data: [DONE]\n\n"


class TestStream:
    @given(cuts=st.sets(st.integers(1, len(TOKEN + TOKEN + USAGE + DONE) - 1)))
    def test_wherever_it_is_cut_a_token_arrives_with_its_last_byte(self, cuts: set[int]) -> None:
        stream = TOKEN + TOKEN + USAGE + DONE
        edges = [0, *sorted(cuts), len(stream)]
        reads = [(float(end), stream[begin:end]) for begin, end in itertools.pairwise(edges)]
        found = read_completion(reads)
        # The blank line after an event is not waited for.
        ends = [len(TOKEN) - 1, 2 * len(TOKEN) - 1]
        assert found.arrivals == [min(edge for edge in edges if edge >= end) for end in ends]
        assert (found.prompt_tokens, found.output_tokens) == (3, 2)

    def test_comments_and_carriage_returns_are_no_matter(self) -> None:
        stream = b": ping\n\n" + (TOKEN + TOKEN + USAGE + DONE).replace(b"\n", b"\r\n")
        assert len(read_completion([(0.0, stream)]).arrivals) == 2

    def test_a_closing_chunk_is_no_token(self) -> None:
        reads = [(1.0, TOKEN), (2.0, TOKEN), (3.0, TOKEN), (4.0, USAGE + DONE)]
        assert read_completion(reads).arrivals == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("stream", "reason"),
        [
            (TOKEN + USAGE, "ended a stream early, after 1 chunks"),
            (TOKEN + DONE, "no usage"),
            (USAGE + DONE, "no token"),
            (b'data: {"error": {"message": "out of memory"}}\n\n' + DONE, "out of memory"),
            (b"data: hello\n\n", "'hello'"),
            (b"data: []\n\n", "expected a chunk"),
            (b"", "ended a stream early, after 0 chunks"),
        ],
    )
    def test_what_is_wrong_is_said(self, stream: bytes, reason: str) -> None:
        with pytest.raises(StreamError, match=reason):
            read_completion([(0.0, stream)])


class TestMeasure:
    def test_known_delays_are_found(self) -> None:
        server = FakeServer(first=0.2, gap=0.02)
        measured = measure([candidate(server)], workload((2, 4), output_len=11))
        (comparison,) = compare(measured.passes, ["fake"])
        values = {name: value.median for name, value in comparison.values["fake"].items()}
        # Sleeping takes a little longer than asked for, and a busy machine lets both sides wait.
        assert 200 <= values["ttft_p50_ms"] < 270
        assert 19.5 <= values["tpot_p50_ms"] < 27
        assert 19 <= values["itl_p50_ms"] < 27
        # Two after one another on each of two connections, of 200 + 10 × 20 ms.
        seconds = 4 * 11 / values["output_tokens_per_second"]
        assert 0.8 < seconds < 1.1
        assert values["total_tokens_per_second"] == pytest.approx(
            values["output_tokens_per_second"] * (8 + 11) / 11
        )

    def test_each_load_has_its_concurrency_at_all_times(self) -> None:
        for concurrency, requests in ((1, 3), (3, 9), (16, 32)):
            server = FakeServer(first=0.1)
            measured = measure([candidate(server)], workload((concurrency, requests)))
            assert server.most == concurrency
            found = measured.passes[0].requests
            assert len(found) == requests
            # Little's law, from the raw times.
            seconds = max(one.sent + one.arrivals[-1] for one in found) - found[0].sent
            in_flight = sum(one.arrivals[-1] for one in found) / seconds
            assert 0.6 * concurrency < in_flight <= concurrency

    def test_warming_up_is_not_measured(self) -> None:
        server = FakeServer(slow_start=3)
        measured = measure([candidate(server)], workload((3, 5)))
        assert len(server.requests) == 3 + 5
        assert max(one.arrivals[-1] for one in measured.passes[0].requests) < 0.25

    def test_servers_take_turns(self) -> None:
        events: list[str] = []
        servers = [FakeServer(name, events=events) for name in "ab"]
        plan = workload((1, 2), (2, 2), rounds=3)
        measured = measure([candidate(server) for server in servers], plan)
        turns = [(name, count) for _ in range(3) for count in (1, 2) for name in "ab"]
        assert [(one.name, one.concurrency) for one in measured.passes] == turns
        assert [one.round for one in measured.passes] == [1] * 4 + [2] * 4 + [3] * 4
        assert events == [
            "a starts",
            "b starts",
            *(name for name, count in turns for _ in range(count + 2)),
            "b stops",
            "a stops",
        ]

    def test_one_at_a_time_is_started_anew_for_every_round(self) -> None:
        events: list[str] = []
        servers = [FakeServer(name, events=events) for name in "ab"]
        plan = workload((1, 1), (2, 2), rounds=2)
        measured = measure([candidate(server) for server in servers], plan, one_at_a_time=True)
        once = [[f"{name} starts", *[name] * (2 + 4), f"{name} stops"] for name in "ab"]
        assert events == 2 * [event for turn in once for event in turn]
        assert len(measured.passes) == 2 * 2 * 2

    def test_requests_are_what_makes_engines_comparable(self) -> None:
        servers = [FakeServer(name) for name in "ab"]
        measure([candidate(server) for server in servers], workload((2, 4), rounds=2))
        bodies = [body for server in servers for body in server.requests]
        assert len(bodies) == 2 * 2 * (2 + 4)
        for body in bodies:
            assert body.pop("prompt") != []
            assert body == {
                "model": "/models/fake-model",
                "max_tokens": 4,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }

    def test_no_prompt_is_asked_twice(self) -> None:
        def prompts() -> list[tuple[int, ...]]:
            servers = [FakeServer(name) for name in "ab"]
            measure([candidate(server) for server in servers], workload((2, 4), rounds=2))
            return [tuple(body["prompt"]) for server in servers for body in server.requests]

        found = prompts()
        assert len(set(found)) == len(found)
        assert {len(prompt) for prompt in found} == {8}
        ids = np.array(found)
        assert ids.min() >= 0
        assert VOCAB_SIZE * 0.9 < ids.max() < VOCAB_SIZE
        # The seed makes them, not chance; two requests in flight may arrive in either order.
        assert sorted(prompts()) == sorted(found)

    def test_progress_counts_every_request(self) -> None:
        steps: list[tuple[int, int]] = []
        servers = [FakeServer(name) for name in "ab"]
        measure(
            [candidate(server) for server in servers],
            workload((1, 2), (2, 3), rounds=2),
            on_request=lambda done, total: steps.append((done, total)),
        )
        assert steps == [(done, 32) for done in range(1, 33)]

    @pytest.mark.parametrize("fault", ["broken", "early"])
    def test_a_server_that_dies_leaves_its_last_lines(self, fault: str) -> None:
        server = FakeServer(fault=fault)
        with pytest.raises(OctavoError, match=r"broke off|ended a stream early") as caught:
            measure([candidate(server, log=["loading", "CUDA out of memory"])], workload((2, 2)))
        assert str(caught.value).endswith("Its last lines:\n  loading\n  CUDA out of memory")


class TestNotes:
    def request(self, chunks: int, tokens: int) -> Request:
        arrivals = tuple(float(time) for time in range(1, chunks + 1))
        return Request(sent=0, arrivals=arrivals, prompt_tokens=1, output_tokens=tokens)

    def notes(self, *requests: Request, busy: float = 0.1) -> list[str]:
        one = Pass(name="a", round=1, concurrency=1, client_busy=busy, requests=requests)
        return list(find_notes([one], output_len=4))

    def test_nothing_to_say(self) -> None:
        assert self.notes(self.request(4, 4)) == []

    def test_something_to_say(self) -> None:
        assert "8 tokens in 6 chunks" in self.notes(self.request(4, 4), self.request(2, 4))[0]
        assert "in 1 of 2 requests" in self.notes(self.request(4, 4), self.request(3, 3))[0]
        assert "busy 95%" in self.notes(self.request(4, 4), busy=0.95)[0]


@pytest.fixture
def servers() -> Iterator[tuple[FakeServer, FakeServer]]:
    """Two servers, the second faster."""
    with FakeServer("slow", first=0.02, gap=0.004) as slow, FakeServer("fast", gap=0.002) as fast:
        yield slow, fast


QUICK: dict[str, Any] = {"input_len": 6, "output_len": 5, "rounds": 2, "requests": 4}


class Run(NamedTuple):
    """A comparison of two URLs: what came back, what was written, and what the first server was
    asked."""

    results: BenchResults
    output: Path
    url: str
    requests: list[dict[str, Any]]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("bench") / "out"
    with FakeServer(first=0.02, gap=0.004) as slow, FakeServer(gap=0.002) as fast:
        urls = [f"bf16={slow.url}/v1/", f"fp8={fast.url}"]
        results = bench(urls, concurrency=[1, 2], seed=1, output=output, **QUICK)
    return Run(results, output, slow.url, slow.requests)


class TestBench:
    def test_results_hold_what_it_takes_to_get_them_again(self, compared: Run) -> None:
        text = (compared.output / "results.json").read_text()
        read = BenchResults.model_validate_json(text)
        assert read == compared.results
        assert compare(read.passes, ["bf16", "fp8"]) == read.comparisons
        assert [len(one.requests) for one in read.passes] == [4] * 8
        assert {request.output_tokens for one in read.passes for request in one.requests} == {5}
        assert read.comparisons[0].ratios["fp8"]["output_tokens_per_second"].low > 1.3
        assert read.contenders[0].model_dump() == {
            "name": "bf16",
            "source": compared.url,
            "model": "fake-model",
            "engine": "fake-engine",
            "version": "1.2.3",
            "command": None,
        }
        assert [one.name for one in read.contenders] == ["bf16", "fp8"]
        assert read.machine.cores >= 1
        assert read.workload.seed == 1

    def test_a_server_that_does_not_say_what_it_knows_gets_low_ids(self, compared: Run) -> None:
        assert "below 10,000" in compared.results.notes[0]
        ids = np.array([body["prompt"] for body in compared.requests])
        assert 5_000 < ids.max() < 10_000

    def test_the_figure_shows_medians(self, compared: Run) -> None:
        throughput, ttft, tpot = figure(compared.results).axes
        for axes, keys in (
            (throughput, ["output_tokens_per_second"]),
            (ttft, ["ttft_p95_ms", "ttft_p50_ms"]),
            (tpot, ["tpot_p95_ms", "tpot_p50_ms"]),
        ):
            bars = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
            assert bars == [
                comparison.values[name][key].median
                for name in ("bf16", "fp8")
                for key in keys
                for comparison in compared.results.comparisons
            ]
        ratio = compared.results.comparisons[0].ratios["fp8"]["output_tokens_per_second"].median
        assert f"{ratio:.2f}×" in [text.get_text() for text in throughput.texts]

    def test_the_figure_is_written_twice(self, compared: Run) -> None:
        with Image.open(compared.output / "throughput.png") as image:
            assert image.width > 1600
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
        root = ElementTree.fromstring((compared.output / "throughput.svg").read_text())
        assert root.tag.endswith("svg")
        assert {path.name for path in compared.output.iterdir()} == {
            "results.json",
            "throughput.png",
            "throughput.svg",
        }

    def test_prompts_are_new_every_time(self, servers: tuple[FakeServer, FakeServer]) -> None:
        # The server may still have the prompts of the last run in its cache.
        seeds = {bench([servers[1].url], concurrency=[1], **QUICK).workload.seed for _ in range(2)}
        assert len(seeds) == 2


class FakeProcess:
    """In the place of :class:`octavo.servers.Server`: what it is told to start, a fake answers for."""

    started: list[ServerCommand]

    def __init__(
        self, command: ServerCommand, *, on_line: Callable[[str], None], start_timeout: float
    ) -> None:
        self.started.append(command)
        self._server, self._on_line = FakeServer(fault=command.env["fault"]), on_line

    def __enter__(self) -> Self:
        self.url = self._server.__enter__().url
        for number in range(30):
            self._on_line(f"line {number}")
        return self

    def __exit__(self, *args: object) -> None:
        self._server.__exit__(*args)


def fake_command(
    engine: str, model: Path, *, host: str = "127.0.0.1", port: int, extra: Sequence[str] = ()
) -> ServerCommand:
    fault = (model / "fault").read_text() if (model / "fault").exists() else ""
    return ServerCommand(
        name="Fake",
        argv=(engine, "serve", str(model), "--port", str(port), *extra),
        env={"fault": fault},
        url="",
        health="/health",
        install="",
        model=model.name,
        notes=("the cache is FP8.",) if model.name == "fp8" else (),
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerCommand]:
    """What ``octavo.bench`` starts, fakes all; vLLM is installed."""
    commands: list[ServerCommand] = []
    monkeypatch.setattr(FakeProcess, "started", commands, raising=False)
    monkeypatch.setattr(benchmarking, "Server", FakeProcess)
    monkeypatch.setattr(benchmarking, "server_command", fake_command)
    monkeypatch.setattr(benchmarking, "choose_engine", lambda: ("vllm", None))
    return commands


def checkpoint(directory: Path, *, fault: str = "", **config: Any) -> Path:
    directory.mkdir()
    values = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": POSITIONS, **config}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "fault").write_text(fault)
    return directory


class TestCheckpoints:
    def test_servers_are_started_side_by_side(
        self, started: list[ServerCommand], tmp_path: Path
    ) -> None:
        models = [checkpoint(tmp_path / name) for name in ("bf16", "fp8")]
        results = bench(models, concurrency=[2], **QUICK)
        assert len(started) == 2
        ports = [command.argv[command.argv.index("--port") + 1] for command in started]
        assert len(set(ports)) == 2
        for command in started:
            assert command.argv[-2:] == ("--gpu-memory-utilization", "0.450")
        for port in ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", int(port)))
        assert results.workload.vocab_size == VOCAB_SIZE
        assert results.notes[:2] == (
            "fp8: the cache is FP8.",
            "2 servers share this machine, each with --gpu-memory-utilization 0.450.",
        )
        fp8 = results.contenders[1]
        assert fp8.command == f"vllm serve fp8 --port {ports[1]} --gpu-memory-utilization 0.450"
        # Results name files, never where they lie.
        assert str(tmp_path) not in results.model_dump_json()

    def test_one_at_a_time_each_has_all_memory(
        self, started: list[ServerCommand], tmp_path: Path
    ) -> None:
        models = [checkpoint(tmp_path / name) for name in ("a", "b")]
        results = bench(models, concurrency=[1], one_at_a_time=True, **QUICK)
        assert [command.argv[2] for command in started] == 2 * [str(model) for model in models]
        assert {command.argv[-1] for command in started} == {"0.900"}
        assert results.one_at_a_time

    def test_a_checkpoint_and_a_url(
        self,
        started: list[ServerCommand],
        servers: tuple[FakeServer, FakeServer],
        tmp_path: Path,
    ) -> None:
        model = checkpoint(tmp_path / "m", vocab_size=70)
        lines: list[str] = []
        results = bench(
            [servers[1].url, f"x={model}"], concurrency=[1], on_line=lines.append, **QUICK
        )
        assert len(started) == 1
        assert started[0].argv[-1] == "0.900"
        assert [one.name for one in results.contenders] == [servers[1].url[7:], "x"]
        assert results.workload.vocab_size == 70
        assert [line.split(":")[0] for line in lines] == ["starting x", "x is ready"]

    def test_without_vllm_our_own_engine_is_measured(
        self, started: list[ServerCommand], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(benchmarking, "choose_engine", lambda: ("torch", "no vLLM."))
        model = checkpoint(tmp_path / "m")
        chosen = bench([model], concurrency=[1], **QUICK)
        assert started[0].argv[0] == "torch"
        assert chosen.notes[0] == "no vLLM."
        for engine in ("torch", "vllm"):
            asked_for = bench([model], concurrency=[1], engine=engine, **QUICK)
            assert started[-1].argv[0] == engine
            assert "no vLLM." not in asked_for.notes

    def test_a_server_of_ours_that_dies_is_quoted(
        self, started: list[ServerCommand], tmp_path: Path
    ) -> None:
        with pytest.raises(OctavoError, match="line 29"):
            bench([checkpoint(tmp_path / "m", fault="broken")], concurrency=[1], **QUICK)

    def test_text_models_inside_others(self, started: list[ServerCommand], tmp_path: Path) -> None:
        inner = {"vocab_size": 90, "max_position_embeddings": POSITIONS}
        model = checkpoint(tmp_path / "m", text_config=inner)
        assert bench([model], concurrency=[1], **QUICK).workload.vocab_size == 90

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"max_position_embeddings": 10}, "at most 10 tokens.* 6 and --output-len 5 make 11"),
            ({"vocab_size": "many"}, "vocab_size 'many'"),
            ({"max_position_embeddings": -1}, "max_position_embeddings -1"),
        ],
    )
    def test_a_config_that_does_not_allow_it(
        self,
        config: dict[str, Any],
        reason: str,
        started: list[ServerCommand],
        tmp_path: Path,
    ) -> None:
        with pytest.raises(OctavoError, match=reason):
            bench([checkpoint(tmp_path / "m", **config)], concurrency=[1], **QUICK)
        assert not started


def run(*arguments: object) -> Result:
    """``octavo bench``, quick unless ``arguments`` say otherwise."""
    quick = ("--input-len", 6, "--output-len", 5, "--rounds", 2, "--requests", 4)
    given = ("bench", *quick, "--concurrency", 1, *arguments)
    return CliRunner().invoke(app, [str(one) for one in given])


class TestCommand:
    def test_table(self, servers: tuple[FakeServer, FakeServer]) -> None:
        result = run(f"bf16={servers[0].url}", f"fp8={servers[1].url}", "--concurrency", "1, 2")
        assert result.exit_code == 0, result.output
        for text in ("1 in flight", "2 in flight", "bf16", "fp8 / bf16", "p95, ms"):
            assert text in result.stdout
        assert result.stdout.count("output tokens/s") == 2
        assert "requests 44/44" in result.stderr
        assert "token ids below 10,000" in " ".join(result.stderr.split())

    def test_json_is_all_there_is_on_stdout(self, servers: tuple[FakeServer, FakeServer]) -> None:
        result = run(f"a={servers[0].url}", "--concurrency", 2, "--json", "--quiet")
        assert result.exit_code == 0, result.output
        found = BenchResults.model_validate_json(result.stdout)
        assert found.comparisons[0].ratios == {}

    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            ("refuses", "refused a request with status 400: the model is out of soup."),
            ("errs", "refused a request: the engine is dead."),
            ("early", "ended a stream early"),
            ("no usage", "sent no usage"),
            ("broken", "broke off"),
        ],
    )
    def test_faults_of_servers(self, fault: str, reason: str, tmp_path: Path) -> None:
        with FakeServer(fault=fault) as server:
            result = run(server.url, "--concurrency", 2, "-o", tmp_path / "out")
        assert result.exit_code == 2, result.output
        message = " ".join(result.stderr.split())
        assert reason in message
        assert server.url in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("http://127.0.0.1:9",), "is not reachable"),
            (("http://[",), "is not reachable"),
            (("{url}/docs",), "/docs/v1/models answered 404, 'Not Found'"),
            (("{url}", "--concurrency", "1,two"), "'1,two' is not a list of concurrencies"),
            (("{url}", "--concurrency", "1,,2"), "is not a list of concurrencies"),
            (("{url}", "--concurrency", "0"), "is not a list of concurrencies"),
            (("{url}", "--concurrency", "2,2"), "is not a list of concurrencies"),
            (("{url}", "--concurrency", "5"), "--requests 4 cannot keep 5 requests in flight"),
            (("{url}", "{url}"), "2 of the checkpoints are called '127.0.0.1"),
            (("a={url}", "a={url}/v1"), "2 of the checkpoints are called 'a'"),
            (("{url}", "--output-len", "100"), "takes at most 64 tokens"),
            (("nowhere",), "not a directory"),
            (("{directory}", "--engine", "abacus"), "Unknown engine 'abacus'"),
            (("{url}", "-o", "{directory}/config.json"), "is a file"),
        ],
    )
    def test_mistakes(self, arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
        model = checkpoint(tmp_path / "model")
        with FakeServer() as server:
            result = run(*(one.format(url=server.url, directory=model) for one in arguments))
        assert result.exit_code == 2, result.output
        assert reason in " ".join(result.stderr.split())
        assert not server.requests

    def test_results_are_not_replaced_unasked(
        self, servers: tuple[FakeServer, FakeServer], tmp_path: Path
    ) -> None:
        (tmp_path / "results.json").write_text("precious")
        arguments = (servers[1].url, "--concurrency", 1, "-o", tmp_path)
        result = run(*arguments)
        assert result.exit_code == 2
        assert "--overwrite" in result.stderr
        assert (tmp_path / "results.json").read_text() == "precious"
        assert not servers[1].requests
        assert run(*arguments, "--overwrite").exit_code == 0
        assert json.loads((tmp_path / "results.json").read_text())["passes"]


def test_loads() -> None:
    assert parse_concurrency("1, 8,32") == (1, 8, 32)
    planned = plan_loads((1, 2, 32), None)
    assert [(one.concurrency, one.requests) for one in planned] == [(1, 8), (2, 8), (32, 128)]
    assert {one.requests for one in plan_loads((1, 4), 4)} == {4}
    with pytest.raises(OctavoError, match="list of concurrencies"):
        plan_loads((), None)
