"""Thousands of mixed requests against ``octavo serve``'s own engine: what is left of them afterwards.

Random lengths, streams and plain answers, several choices, shared prefixes, stop strings, clients that go away at any
moment, bodies that are no requests. In the end every block of the KV cache is free, memory is what it was, every request
that was taken has been answered, and nothing failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from benchmarks.common import sample_model, save
from octavo.checkpoint import read_json
from octavo.servers import Server, server_command
from octavo.throughput.endpoint import Endpoint, ask

_SECONDS = 600.0
_JSON = {"Content-Type": "application/json"}
# Of prompt and continuation, where the model takes more.
_MOST_TOKENS = 512
# Users at a time, each of whom sends one request after another.
_USERS = 48
_AGAIN_SECONDS = 0.2
# Parts of the load, after each of which nothing is to be left of it.
_PARTS = 4

# What is asked, and how often.
_KINDS = {
    "plain": 25,
    "stream": 35,
    "chat": 8,
    "leaves the stream": 15,
    "leaves while waiting": 9,
    "is no request": 8,
}
_NO_REQUESTS = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    b'{"model": 1}',
    b'{"prompt": "a"}',
    b'{"model": "other", "prompt": "a"}',
    b'{"model": "%s", "prompt": [-1]}',
    b'{"model": "%s", "prompt": "a", "temperature": 1e999}',
    b'{"model": "%s", "prompt": "a", "max_tokens": 1000000000}',
    b'{"model": "%s", "prompt": "a", "tools": [{}]}',
    b'{"model": "%s", "prompt": "' + b"a" * (5 << 20) + b'"}',
)


class Plan(NamedTuple):
    """A request to be.

    Attributes:
        kind: a key of ``_KINDS``.
        path: where it goes.
        body: what it is, as it is sent.
        tokens: new ones for all choices, if nothing ends them.
        leaves: chunks or tenths of a second after which the client goes away.
    """

    kind: str
    path: str
    body: bytes
    tokens: int
    leaves: int


class Load:
    """Requests on their way.

    Attributes:
        outcomes: how often each kind of request went how.
        turned_away: how often one was told to come again (429), and did.
        wrong: what should not have been.
    """

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self.outcomes: Counter[str] = Counter()
        self.turned_away = 0
        self.wrong: list[str] = []
        self._client = client

    async def run(self, plans: list[Plan]) -> None:
        """Send all of them."""
        waiting = iter(plans)

        async def user() -> None:
            for plan in waiting:
                while (outcome := await self._send(plan)) == "429":
                    self.turned_away += 1
                    await asyncio.sleep(_AGAIN_SECONDS)
                self.outcomes[f"{plan.kind}: {outcome}"] += 1

        async with asyncio.TaskGroup() as users:
            for _ in range(_USERS):
                users.create_task(user())

    async def _send(self, plan: Plan) -> str:
        try:
            if plan.kind == "leaves while waiting":
                async with asyncio.timeout(plan.leaves / 10):
                    return await self._plain(plan)
            if plan.kind in ("stream", "leaves the stream"):
                return await self._stream(plan)
            return await self._plain(plan)
        except TimeoutError:
            return "left"
        except httpx2.TransportError as error:
            # A body that is too large is refused before it is read to its end.
            if plan.kind != "is no request":
                self.wrong.append(f"{plan.kind}: {error!r}")
            return "broken off"

    async def _plain(self, plan: Plan) -> str:
        response = await self._client.post(plan.path, content=plan.body, headers=_JSON)
        if self._refused(plan, response.status_code):
            return str(response.status_code)
        answer = response.json()
        ended = all(choice["finish_reason"] for choice in answer["choices"])
        if not ended or answer["usage"]["completion_tokens"] > plan.tokens:
            self.wrong.append(f"{plan.kind}: {answer}")
        return "answered"

    async def _stream(self, plan: Plan) -> str:
        lines = []
        async with self._client.stream(
            "POST", plan.path, content=plan.body, headers=_JSON
        ) as response:
            if self._refused(plan, response.status_code):
                return str(response.status_code)
            async for line in response.aiter_lines():
                lines += [line.removeprefix("data: ")] if line else []
                if plan.kind == "leaves the stream" and len(lines) >= plan.leaves:
                    return "left"
        *chunks, usage, done = lines
        found = json.loads(usage).get("usage", {}).get("completion_tokens")
        if done != "[DONE]" or found != len(chunks) or found > plan.tokens:
            self.wrong.append(f"{plan.kind}: {len(chunks)} chunks, {usage}, {done}")
        return "answered"

    def _refused(self, plan: Plan, status: int) -> bool:
        """Whether there was no answer, with a note of what is no reason for that."""
        expected = (400, 404, 413) if plan.kind == "is no request" else (200, 429)
        if status not in expected:
            self.wrong.append(f"{plan.kind}: status {status} for {plan.body[:300]!r}")
        return status != 200


def plan_requests(endpoint: Endpoint, vocab_size: int, count: int, seed: int) -> list[Plan]:
    """Random requests, the same for the same seed."""
    draw = random.Random(seed)
    most = min(endpoint.max_positions or _MOST_TOKENS, _MOST_TOKENS)
    prefixes = [_tokens(draw, vocab_size, most // 4) for _ in range(6)]
    return [_plan(draw, endpoint.model, vocab_size, most, prefixes) for _ in range(count)]


def _plan(
    draw: random.Random, model: str, vocab_size: int, most: int, prefixes: list[list[int]]
) -> Plan:
    (kind,) = draw.choices([*_KINDS], [*_KINDS.values()])
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    if kind == "is no request":
        return Plan(kind, path, draw.choice(_NO_REQUESTS).replace(b"%s", model.encode()), 0, 0)
    choices = draw.choice((1, 1, 1, 2, 3))
    # Mostly few, and now and then as many as get in the way of others.
    tokens = draw.randint(1, most // 2 if draw.random() < 0.15 else most // 16)
    body: dict[str, Any] = {
        "model": model,
        "n": choices,
        "max_tokens": tokens,
        "temperature": draw.choice((0, 0.7, 1.0)),
        "top_p": draw.choice((1.0, 0.9)),
        "seed": draw.randrange(1000),
        "ignore_eos": draw.random() < 0.7,
        "stop": draw.choice(([], [], ["e"], ["the", "\n\n"])),
    }
    if kind == "chat":
        body["messages"] = [{"role": "user", "content": "Tell me of " + draw.choice("abcdef") * 9}]
    else:
        shared = draw.choice(prefixes) if draw.random() < 0.5 else []
        body["prompt"] = shared + _tokens(draw, vocab_size, draw.randint(1, most // 4))
    if kind in ("stream", "leaves the stream"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    leaves = draw.randint(1, 12)
    return Plan(kind, path, json.dumps(body).encode(), choices * tokens, leaves)


def _tokens(draw: random.Random, vocab_size: int, count: int) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(count)]


def measure(model: Path, requests: int, cache: str, seed: int = 0) -> dict[str, Any]:
    """Serve a checkpoint, load the server, and end it.

    Args:
        model: the checkpoint directory, with a chat template.
        requests: how many.
        cache: the memory of keys and values, such as 64MiB: little enough for sequences to be in each other's way.
        seed: of what they are.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = {"--max-running": "24", "--max-waiting": "32", "--kv-cache-memory": cache}
    extra = [word for item in limits.items() for word in item]
    command = server_command("torch", model, port=port, extra=extra)
    with Server(command, on_line=lambda line: None) as server:
        result = asyncio.run(_load(server.url, model, requests, seed))
        server.send_signal(signal.SIGTERM)
        result["exit_code"] = server.wait()
    return result


async def _load(url: str, model: Path, requests: int, seed: int) -> dict[str, Any]:
    endpoint = ask(url)
    plans = plan_requests(endpoint, read_json(model / "config.json")["vocab_size"], requests, seed)
    memory = {}
    async with httpx2.AsyncClient(
        base_url=url,
        timeout=_SECONDS,
        limits=httpx2.Limits(max_connections=None),
        trust_env=False,
    ) as client:
        load = Load(client)
        memory["start"] = (await _metrics(client))["process_resident_memory_bytes"]
        begin = time.perf_counter()
        # The first part warms up: from then on, memory is what serving takes.
        for part in range(_PARTS):
            await load.run(plans[part::_PARTS])
            last = await _settled(client)
            memory[f"{part + 1}/{_PARTS}"] = last["process_resident_memory_bytes"]
        seconds = time.perf_counter() - begin
    return {
        "model": endpoint.model,
        "requests": requests,
        "users": _USERS,
        "seconds": round(seconds, 1),
        "turned_away": load.turned_away,
        "outcomes": dict(sorted(load.outcomes.items())),
        "wrong": load.wrong,
        "memory_mb": {when: round(size / 1e6, 1) for when, size in memory.items()},
        "engine": {
            name.removeprefix("octavo_"): int(value)
            for name, value in last.items()
            if name.startswith("octavo_") and "seconds" not in name and "{" not in name
        },
    }


async def _settled(client: httpx2.AsyncClient) -> dict[str, float]:
    """The server's metrics once nothing is in flight, or some seconds later."""
    for _ in range(100):
        found = await _metrics(client)
        if found["octavo_running"] == found["octavo_waiting"] == found["octavo_blocks_used"] == 0:
            break
        await asyncio.sleep(0.1)
    return found


async def _metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs if not name.endswith("_created")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory; the sample model")
    parser.add_argument("--requests", type=int, default=2400)
    parser.add_argument("--kv-cache-memory", default="64MiB")
    options = parser.parse_args()
    result = measure(options.model or sample_model(), options.requests, options.kv_cache_memory)
    print(json.dumps(result, indent=2))
    print(save("load", result))


if __name__ == "__main__":
    main()
