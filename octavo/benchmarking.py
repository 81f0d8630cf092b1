"""``octavo.bench``: how fast checkpoints are served, side by side."""

from __future__ import annotations

import datetime
import re
import secrets
import shlex
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from octavo.checkpoint import read_json
from octavo.checkpoint.hub import resolve_model
from octavo.errors import OctavoError
from octavo.servers import Server, ServerCommand, choose_engine, server_command
from octavo.throughput import (
    BenchResults,
    Candidate,
    Contender,
    Endpoint,
    OnRequest,
    Workload,
    ask,
    base_url,
    check_context,
    check_output,
    compare,
    find_notes,
    measure,
    plan_loads,
    this_machine,
    write_results,
)
from octavo.version import __version__

# Token ids that any model has, for servers that do not say how many theirs has.
_SAFE_VOCAB = 10_000

# Memory that all servers take together, and how each engine is told its part of it.
_MEMORY = 0.9
_MEMORY_FLAGS = {
    "vllm": "--gpu-memory-utilization",
    "tensorrt-llm": "--kv_cache_free_gpu_memory_fraction",
}

_NAMED = re.compile(r"([^/=]+)=(.+)")
_LAST_LINES = 10

OnLine = Callable[[str], None]


class _Entry(NamedTuple):
    """What the user wants measured: a checkpoint's directory, or a server's URL."""

    name: str
    source: str
    directory: Path | None
    vocab_size: int | None = None
    max_positions: int | None = None


def bench(
    checkpoints: Sequence[str | Path],
    *,
    input_len: int = 128,
    output_len: int = 128,
    concurrency: Sequence[int] = (1, 8, 32),
    engine: str | None = None,
    requests: int | None = None,
    rounds: int = 3,
    one_at_a_time: bool = False,
    start_timeout: float = 1800,
    seed: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    on_request: OnRequest = lambda done, total: None,
    on_line: OnLine = lambda line: None,
) -> BenchResults:
    """Measure throughput and latency of servers under load, turn by turn.

    Each load is a closed loop: as many users as its concurrency, each of whom sends a request, reads
    its stream to the end and sends the next. Prompts are random token ids, every one used once;
    generation is greedy and goes on to ``output_len`` tokens. As many requests as the concurrency
    warm a server up before each load. Tokens are those that the servers count.

    Args:
        checkpoints: directories, hub ids, or URLs of OpenAI-compatible servers that run; each may
            have a name, as in ``fp8=path/to/edition``. The first is the baseline.
        input_len: tokens of each prompt.
        output_len: tokens generated after each.
        concurrency: requests in flight, one load for each.
        engine: a key of :data:`octavo.servers.SERVERS`, for what is not a URL. By default vLLM, or where
            it is not installed Octavo's own.
        requests: measured under each load; by default four times its concurrency, at least 8.
        rounds: how often each server bears each load.
        one_at_a_time: start each server anew for every round, alone, for models that do not fit side
            by side.
        start_timeout: seconds until a server has to be healthy.
        seed: of the prompts. By default a new one: a server may still know those of an earlier run.
        output: a directory for ``results.json`` and the figure.
        overwrite: replace results in ``output``.
        on_request: called after each request with the requests done and all there will be.
        on_line: called with what happens otherwise, a line each.

    Returns:
        All that was measured, and what it amounts to.

    Raises:
        OctavoError: a checkpoint, an option or the output does not allow it, a server does not start
            or is not reachable, refuses a request, or breaks off; nothing is written.
    """
    loads = plan_loads(concurrency, requests)
    target = None if output is None else Path(output)
    if target is not None:
        check_output(target, overwrite=overwrite)
    entries = _entries(checkpoints)
    workload = Workload(
        input_len=input_len,
        output_len=output_len,
        loads=loads,
        rounds=rounds,
        vocab_size=min(entry.vocab_size or _SAFE_VOCAB for entry in entries),
        seed=secrets.randbits(32) if seed is None else seed,
    )
    for entry in entries:
        check_context(entry.name, entry.max_positions, workload)
    starts = sum(entry.directory is not None for entry in entries)
    chosen = None
    if engine is None:
        engine, chosen = choose_engine()
    memory = _memory(engine, 1 if one_at_a_time else starts)
    commands = _commands(entries, engine, memory)
    measured = measure(
        [_candidate(entry, commands.get(entry.name), start_timeout, on_line) for entry in entries],
        workload,
        one_at_a_time=one_at_a_time,
        on_request=on_request,
    )
    results = BenchResults(
        octavo=__version__,
        date=datetime.date.today(),
        machine=this_machine(),
        workload=workload,
        one_at_a_time=one_at_a_time,
        contenders=tuple(
            _contender(entry, commands.get(entry.name), measured.endpoints[entry.name])
            for entry in entries
        ),
        comparisons=compare(measured.passes, [entry.name for entry in entries]),
        notes=(
            *([chosen] if chosen and starts else []),
            *_notes(entries, commands, memory),
            *find_notes(measured.passes, output_len),
        ),
        passes=tuple(measured.passes),
    )
    if target is not None:
        write_results(results, target)
    return results


def _entries(checkpoints: Sequence[str | Path]) -> list[_Entry]:
    entries = [_entry(str(checkpoint)) for checkpoint in checkpoints]
    if not entries:
        raise OctavoError("There is nothing to measure. Pass checkpoint directories or URLs.")
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise OctavoError(
                f"{names.count(name)} of the checkpoints are called {name!r}. Tell them apart: "
                f"NAME={entries[names.index(name)].source}."
            )
    return entries


def _entry(text: str) -> _Entry:
    named = _NAMED.fullmatch(text)
    name, source = named.groups() if named else (None, text)
    if source.startswith(("http://", "https://")):
        url = base_url(source)
        endpoint = ask(url)
        return _Entry(name or url.partition("://")[2], url, None, None, endpoint.max_positions)
    directory = resolve_model(source)
    own_name = Path(source).resolve().name
    path = directory / "config.json"
    config = read_json(path)
    # Models for more than text have a section for it.
    text_config = config.get("text_config", config)
    return _Entry(
        name=name or own_name,
        source=own_name,
        directory=directory,
        vocab_size=_count(text_config, "vocab_size", path),
        max_positions=_count(text_config, "max_position_embeddings", path),
    )


def _count(config: object, key: str, path: Path) -> int | None:
    """A number of ``config`` above zero; None where there is none, as in a built engine's."""
    value = config.get(key) if isinstance(config, dict) else None
    if value is not None and (type(value) is not int or value < 1):
        raise OctavoError(
            f"{path} has {key} {value!r}, expected a whole number above zero. Restore the file."
        )
    return value


def _memory(engine: str, servers: int) -> tuple[str, ...]:
    """The flag that gives each of some servers on one machine its part of the memory."""
    if engine not in _MEMORY_FLAGS or not servers:
        return ()
    return _MEMORY_FLAGS[engine], f"{_MEMORY / servers:.3f}"


def _commands(
    entries: Sequence[_Entry], engine: str, memory: Sequence[str]
) -> dict[str, ServerCommand]:
    """How the servers that do not run yet are started, by name."""
    own = [(entry.name, entry.directory) for entry in entries if entry.directory is not None]
    return {
        name: server_command(engine, directory, port=port, extra=memory)
        for (name, directory), port in zip(own, _free_ports(len(own)), strict=True)
    }


def _free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    with ExitStack() as held:
        # All at once: a port that was let go may be the next to be given out.
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _candidate(
    entry: _Entry, command: ServerCommand | None, start_timeout: float, on_line: OnLine
) -> Candidate:
    if command is None:
        return Candidate(entry.name, lambda: nullcontext(entry.source))
    log: deque[str] = deque(maxlen=_LAST_LINES)

    @contextmanager
    def run() -> Iterator[str]:
        on_line(f"starting {entry.name}: {shlex.join(command.argv)}")
        with Server(command, on_line=log.append, start_timeout=start_timeout) as server:
            on_line(f"{entry.name} is ready")
            yield server.url

    return Candidate(entry.name, run, log)


def _contender(entry: _Entry, command: ServerCommand | None, endpoint: Endpoint) -> Contender:
    return Contender(
        name=entry.name,
        source=entry.source,
        model=_own_name(endpoint.model),
        engine=endpoint.engine,
        version=endpoint.version,
        command=None if command is None else shlex.join(map(_own_name, command.argv)),
    )


def _own_name(word: str) -> str:
    """``word``, or the last part of a path: where it lies is no one's business but the user's."""
    return Path(word).name if Path(word).is_absolute() else word


def _notes(
    entries: Sequence[_Entry], commands: dict[str, ServerCommand], memory: Sequence[str]
) -> Iterator[str]:
    """What was chosen for the user."""
    for name, command in commands.items():
        for note in command.notes:
            yield f"{name}: {note}"
    unknown = [entry.name for entry in entries if entry.vocab_size is None]
    if unknown:
        yield (
            f"The vocabulary of {' and '.join(unknown)} is not known; prompts are of token ids below "
            f"{_SAFE_VOCAB:,}."
        )
    if len(commands) > 1 and memory:
        yield f"{len(commands)} servers share this machine, each with {' '.join(memory)}."
