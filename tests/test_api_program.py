"""``python -m octavo.api`` as a process: loading, draining, ending."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

import tiny
from octavo import __version__, bench, complete

# The program, with a model that takes its time: 20 ms a token, and as long to load as it is told.
PROGRAM = """
import os, time
import octavo.engines.torch as engine
from octavo.engines.torch.runner import Runner
from octavo.errors import OctavoError
from scripted import ScriptedModel

def open_runner(directory, device, *, kv_cache_memory, **options):
    time.sleep(float(os.environ["LOADS"]))
    if "FAILS" in os.environ:
        raise OctavoError("it is no model. Take another.")
    chosen = {name: value for name, value in options.items() if value is not None}
    return Runner(ScriptedModel([65], seconds=0.02), blocks=64, **chosen)

engine.open_runner = open_runner
from octavo.api.__main__ import main
main()
"""


class Program:
    """A server as a process, which answers as soon as this is there."""

    def __init__(self, model: Path, *, loads: float = 0.0, fails: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "LOADS": str(loads), "PYTHONPATH": str(Path(__file__).parent)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(model), "--port", str(self.port)],
            env=environment | ({"FAILS": "1"} if fails else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.http = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False)

    def status(self) -> int | None:
        """Of its health; None while nobody listens."""
        try:
            return self.http.get("/health").status_code
        except httpx2.TransportError:
            return None

    def ends(self) -> tuple[int, str]:
        """Its exit code and standard error."""
        _, error = self.process.communicate(timeout=30)
        return self.process.returncode, error


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the program; what a failed test leaves running is killed."""
    model = tiny.save_tokenizer(tiny.build("llama", tmp_path / "tiny", layers=1))
    with ExitStack() as started:

        def begin(loads: float = 0.0, fails: bool = False) -> Program:
            program = Program(model, loads=loads, fails=fails)
            started.callback(program.process.kill)
            started.callback(program.http.close)
            return program

        yield begin


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_loads_serves_and_drains(start: Start) -> None:
    program = start(loads=1.0)
    eventually(lambda: program.status() == 503)
    eventually(lambda: program.status() == 200)
    assert program.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    body = {"model": "tiny", "prompt": "a", "max_tokens": 60, "stream": True}
    with program.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        program.process.send_signal(signal.SIGTERM)
        eventually(lambda: program.status() == 503)
        refused = program.http.post("/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        events = [line for line in lines if line]
    assert len(events) == 60
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert events[-1] == "data: [DONE]"
    assert program.ends() == (0, "")


def test_a_second_signal_ends_it_at_once(start: Start) -> None:
    program = start()
    eventually(lambda: program.status() == 200)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 120}

    def ask() -> None:
        with pytest.raises(httpx2.TransportError):
            program.http.post("/v1/completions", json=body)

    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: "octavo_running 1" in program.http.get("/metrics").text)
    for _ in range(2):
        program.process.send_signal(signal.SIGTERM)
        eventually(lambda: program.status() != 200)
    assert program.ends()[0] == 128 + signal.SIGTERM
    thread.join()


def test_a_signal_while_it_loads(start: Start) -> None:
    program = start(loads=60)
    eventually(lambda: program.status() == 503)
    program.process.send_signal(signal.SIGINT)
    assert program.ends() == (0, "")


def test_a_model_that_cannot_be_opened(start: Start) -> None:
    assert start(fails=True).ends() == (2, "error: it is no model. Take another.\n")


def test_octavo_serve_and_bench(tmp_path: Path) -> None:
    """Both start it on the embedded engine itself."""
    model = tiny.save_tokenizer(tiny.build("llama", tmp_path / "tiny"))
    results = bench(
        [model],
        engine="torch",
        concurrency=[2],
        rounds=1,
        requests=4,
        input_len=9,
        output_len=5,
    )
    (contender,) = results.contenders
    assert (contender.engine, contender.version) == ("octavo", __version__)
    assert [one.output_tokens for one in results.passes[0].requests] == [5] * 4
    assert results.notes == ()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "octavo.cli", "serve", str(model), "--engine", "torch"]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert f"tiny is served at http://127.0.0.1:{port}" in process.stdout.readline()
        found = httpx2.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": "tiny", "prompt": "Once", "max_tokens": 5, "temperature": 0},
            trust_env=False,
        ).json()
        assert found["choices"][0]["text"] == complete(model, "Once", max_tokens=5)
        process.terminate()
        assert process.wait(30) == 0
