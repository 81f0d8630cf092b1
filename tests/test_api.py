"""The OpenAI-compatible server, with its official client, on a model that says what it is told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import httpx2
import openai
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import tiny
from octavo.api.app import create_app
from octavo.api.requests import MAX_BODY_BYTES
from octavo.api.served import Served
from octavo.api.service import Service
from octavo.engines.torch.runner import Runner
from octavo.throughput.client import completion_request, run_load
from octavo.throughput.endpoint import ask
from octavo.tokenizer import load_tokenizer
from octavo.version import __version__
from scripted import ScriptedModel

# What the model says at place p of a sequence is byte p of this, over and over again.
TEXT = "Hello, wörld! 你好 😀 <end> and on and on. "
END = 3  # ends a text

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Running:
    """A server in a thread of its own.

    Attributes:
        model: what it serves.
        runner: the engine.
        service: its state.
        url: where it answers.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        script: list[int] | None = None,
        seconds: float = 0.0,
        loads: threading.Event | None = None,
        blocks: int = 256,
        **options: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = ScriptedModel(script or tokenizer(TEXT)["input_ids"], seconds=seconds)
        self.runner = Runner(self.model, blocks=blocks, **options)
        self.service = Service("tiny", self._load)
        self._loads = loads
        config = uvicorn.Config(create_app(self.service), port=0, log_level="critical")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def _load(self) -> Served:
        if self._loads is not None:
            self._loads.wait()
        return Served(
            "tiny",
            self.tokenizer,
            self.runner,
            vocab_size=self.model.vocab_size,
            max_positions=self.model.max_positions,
            ends=frozenset({END}),
        )

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        if self._loads is None:
            eventually(lambda: self.service.state == "ready")
        self.http = httpx2.Client(base_url=self.url, trust_env=False)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.http.close()
        self.client.close()
        self.model.go.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self.runner.close()

    def post(self, **body: Any) -> httpx2.Response:
        """``POST /v1/completions``."""
        return self.http.post("/v1/completions", json={"model": "tiny", **body})

    def metric(self, name: str) -> float:
        """A value of ``/metrics``."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer: Any = load_tokenizer(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Running]:
    with Running(tokenizer) as running:
        yield running


@pytest.fixture
def slow(tokenizer: Any) -> Iterator[Running]:
    """A server whose model waits for ``model.go``, and takes a moment for each token."""
    with Running(tokenizer, seconds=0.01, max_running=2, max_waiting=2) as running:
        yield running


def said(prompt: int, tokens: int) -> str:
    """What the model says after a prompt of so many tokens."""
    data = TEXT.encode() * 20
    return data[prompt : prompt + tokens].decode(errors="replace")


class TestCompletions:
    def test_text_and_usage(self, server: Running) -> None:
        found = server.client.completions.create(model="tiny", prompt="ab", max_tokens=30)
        assert found.choices[0].text == said(2, 30)
        assert (found.choices[0].finish_reason, found.choices[0].index) == ("length", 0)
        assert found.usage is not None
        assert found.usage.to_dict() == {
            "prompt_tokens": 2,
            "completion_tokens": 30,
            "total_tokens": 32,
        }
        assert (found.object, found.model) == ("text_completion", "tiny")

    @pytest.mark.parametrize("tokens", [1, 9, 10, 22, 29, 60])
    def test_a_stream_adds_up_to_the_text(self, tokens: int, server: Running) -> None:
        chunks = list(
            server.client.completions.create(
                model="tiny",
                prompt="ab",
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        *chunks, last = chunks
        # One for each token, though some of them are but a part of a character.
        assert len(chunks) == tokens
        assert "".join(chunk.choices[0].text for chunk in chunks) == said(2, tokens)
        assert not any(
            "\N{REPLACEMENT CHARACTER}" in chunk.choices[0].text for chunk in chunks[:-1]
        )
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [*[None] * (tokens - 1), "length"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, tokens)

    def test_events(self, server: Running) -> None:
        response = server.post(prompt="ab", max_tokens=2, stream=True)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, end = response.text.strip().split("\n\n")
        assert end == "data: [DONE]"
        assert [list(json.loads(event.removeprefix("data: "))) for event in events] == [
            ["id", "object", "created", "model", "choices"]
        ] * 2

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("stop", "text", "tokens"),
        [
            ("<end>", "ello, wörld! 你好 😀 ", 31),
            (["zz", "rld", "wör"], "ello, ", 10),
            ("ö", "ello, w", 9),
            (" on. Hello, wörld? ", said(1, 60), 60),
            (". Hello, w!", said(1, 60), 60),
        ],
    )
    def test_stop_strings(
        self, stop: Any, text: str, tokens: int, stream: bool, server: Running
    ) -> None:
        body = {"prompt": "a", "max_tokens": 60, "stop": stop}
        if stream:
            events = server.post(**body, stream=True).text.strip().split("\n\n")[:-1]
            choices = [json.loads(event[6:])["choices"][0] for event in events]
            assert len(choices) == tokens
        else:
            found = server.post(**body).json()
            choices = found["choices"]
            assert found["usage"]["completion_tokens"] == tokens
        assert "".join(choice["text"] for choice in choices) == text
        assert choices[-1]["finish_reason"] == ("stop" if tokens < 60 else "length")
        eventually(lambda: server.runner.stats().blocks_used == 0)

    def test_end_token(self, tokenizer: Any) -> None:
        with Running(tokenizer, script=[40, 41, 42, END]) as running:
            one = running.post(prompt=[1], max_tokens=8).json()
            assert one["choices"][0]["text"] == tokenizer.decode([41, 42])
            assert one["choices"][0]["finish_reason"] == "stop"
            assert one["usage"]["completion_tokens"] == 3
            other = running.post(prompt=[1], max_tokens=8, ignore_eos=True).json()
            assert other["choices"][0]["text"] == tokenizer.decode([41, 42, END, 40] * 2)
            assert other["choices"][0]["finish_reason"] == "length"
            stream = running.post(prompt=[1], max_tokens=8, stream=True, logprobs=0).text
            last = json.loads(stream.split("\n\n")[-3][6:])["choices"][0]
            assert (last["text"], last["finish_reason"]) == ("", "stop")
            assert last["logprobs"]["tokens"] == []

    def test_prompts_of_all_forms(self, server: Running) -> None:
        ids = server.tokenizer("abc")["input_ids"]
        for prompt, count in (
            ("abc", 1),
            (["abc"], 1),
            (ids, 1),
            ([ids, ids], 2),
            (["abc"] * 3, 3),
        ):
            found = server.post(prompt=prompt, max_tokens=4).json()
            assert [choice["text"] for choice in found["choices"]] == [said(3, 4)] * count
            assert found["usage"]["prompt_tokens"] == 3 * count

    def test_choices_are_in_order(self, server: Running) -> None:
        found = server.client.completions.create(
            model="tiny", prompt=["a", "abc"], n=3, max_tokens=4, seed=1
        )
        assert [choice.index for choice in found.choices] == list(range(6))
        assert [choice.text for choice in found.choices] == [said(1, 4)] * 3 + [said(3, 4)] * 3
        stream = server.client.completions.create(
            model="tiny", prompt=["a", "abc"], n=3, max_tokens=4, stream=True
        )
        texts: dict[int, str] = dict.fromkeys(range(6), "")
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert list(texts.values()) == [choice.text for choice in found.choices]

    def test_echo(self, server: Running) -> None:
        ids = server.tokenizer("ab")["input_ids"]
        for stream in (False, True):
            found = server.post(prompt=["ab", ids], max_tokens=2, echo=True, stream=stream).text
            assert found.count('"abl') == 2

    def test_logprobs(self, server: Running) -> None:
        found = server.client.completions.create(
            model="tiny", prompt="abcd", max_tokens=5, logprobs=2, temperature=0
        )
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == list("o, w\N{REPLACEMENT CHARACTER}")
        assert logprobs.text_offset == [0, 1, 2, 3, 4]
        assert logprobs.token_logprobs == pytest.approx([0.0] * 5, abs=1e-5)
        assert logprobs.top_logprobs is not None
        assert [max(top, key=lambda token: top[token]) for top in logprobs.top_logprobs] == (
            logprobs.tokens
        )
        stream = server.client.completions.create(
            model="tiny", prompt="abcd", max_tokens=5, logprobs=2, temperature=0, stream=True
        )
        parts = [chunk.choices[0].logprobs for chunk in stream]
        assert [part.tokens for part in parts if part] == [[token] for token in logprobs.tokens]
        assert [part.text_offset for part in parts if part] == [[0], [1], [2], [3], [4]]


class TestChat:
    MESSAGES: Any = (
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        },
    )
    PROMPT = "system: Be brief.\nuser: Hello\nassistant: "

    def test_an_answer(self, server: Running) -> None:
        found = server.client.chat.completions.create(
            model="tiny",
            messages=self.MESSAGES,
            max_completion_tokens=7,
            max_tokens=9,
            stop=["\x00"],
        )
        (choice,) = found.choices
        assert (choice.message.role, choice.message.content) == (
            "assistant",
            said(len(self.PROMPT), 7),
        )
        assert (choice.finish_reason, found.object) == ("length", "chat.completion")
        assert found.usage is not None
        assert found.usage.prompt_tokens == len(self.PROMPT)
        # What came back may be sent again.
        again = [*self.MESSAGES, choice.message.to_dict() | {"refusal": None, "tool_calls": None}]
        assert server.client.chat.completions.create(model="tiny", messages=again, max_tokens=1)

    def test_a_stream(self, server: Running) -> None:
        *chunks, last = server.client.chat.completions.create(
            model="tiny",
            messages=self.MESSAGES,
            max_tokens=40,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        for index in range(2):
            deltas = [one.choices[0] for one in chunks if one.choices[0].index == index]
            assert [delta.delta.role for delta in deltas] == ["assistant", *[None] * 39]
            text = "".join(delta.delta.content or "" for delta in deltas)
            assert text == said(len(self.PROMPT), 40)
            assert deltas[-1].finish_reason == "length"
        assert last.usage is not None
        assert last.usage.completion_tokens == 80
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}

    def test_without_a_limit_it_goes_on_to_the_end_of_the_context(self, server: Running) -> None:
        found = server.client.chat.completions.create(model="tiny", messages=self.MESSAGES)
        assert found.usage is not None
        assert found.usage.total_tokens == server.model.max_positions

    def test_logprobs(self, server: Running) -> None:
        found = server.client.chat.completions.create(
            model="tiny", messages=self.MESSAGES, max_tokens=30, logprobs=True, top_logprobs=3
        )
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert len(logprobs.content) == 30
        for entry in logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert entry.bytes == (None if len(entry.token.encode()) > 1 else [ord(entry.token)])

    def test_what_the_template_does_not_take(self, server: Running, tokenizer: Any) -> None:
        refusing = "{{ raise_exception('no system messages') }}"
        for template, told in ((refusing, "no system messages"), (None, "no chat template")):
            tokenizer.chat_template = template
            try:
                with pytest.raises(openai.BadRequestError, match=told):
                    server.client.chat.completions.create(model="tiny", messages=self.MESSAGES)
            finally:
                tokenizer.chat_template = TEMPLATE


class TestDescription:
    def test_models(self, server: Running) -> None:
        (model,) = server.client.models.list()
        assert (model.id, model.owned_by, model.to_dict()["max_model_len"]) == (
            "tiny",
            "octavo",
            512,
        )
        assert server.client.models.retrieve("tiny") == model
        with pytest.raises(openai.NotFoundError):
            server.client.models.retrieve("some/other")

    def test_our_own_client(self, server: Running) -> None:
        endpoint = ask(server.url)
        assert endpoint[1:] == ("tiny", "octavo", __version__, 512)
        bodies = [completion_request("tiny", [1, 2, 3 + one], 6) for one in range(8)]
        trace = run_load(endpoint, bodies, concurrency=4, on_request=lambda: None)
        assert [(one.prompt_tokens, one.output_tokens) for one in trace.requests] == [(3, 6)] * 8
        assert {len(one.arrivals) for one in trace.requests} == {6}

    def test_metrics(self, server: Running) -> None:
        def counts() -> tuple[float, ...]:
            finished = 'octavo_requests_total{endpoint="/v1/completions",outcome="finished"}'
            refused = 'octavo_requests_total{endpoint="/v1/completions",outcome="refused"}'
            return tuple(
                server.metric(name)
                for name in (
                    finished,
                    refused,
                    "octavo_prompt_tokens_total",
                    "octavo_generated_tokens_total",
                    "octavo_time_to_first_token_seconds_count",
                    "octavo_inter_token_seconds_count",
                )
            )

        server.post(prompt=7)
        before = counts()
        server.post(prompt="abc", max_tokens=5)
        server.post(prompt=7)
        assert [new - old for new, old in zip(counts(), before, strict=True)] == [1, 1, 3, 5, 1, 4]
        assert server.metric("octavo_blocks_total") == 256
        assert server.metric("octavo_blocks_used") == server.metric("octavo_running") == 0
        assert server.metric("process_resident_memory_bytes") > 1e6


# What is wrong with a completion's body, and the parameter that the answer names.
BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "no model": ({"model": None}, "model"),
    "no prompt": ({"prompt": None}, "prompt"),
    "empty text": ({"prompt": ""}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "an empty one of them": ({"prompt": [[]]}, "prompt.0"),
    "too many prompts": ({"prompt": ["a"] * 129}, "prompt"),
    "no such token": ({"prompt": [1, 256]}, "prompt"),
    "a negative token": ({"prompt": [1, -1]}, "prompt.0"),
    "half a surrogate pair": ({"prompt": "\ud800"}, "prompt"),
    "a long prompt": ({"prompt": "a" * 600}, "prompt"),
    "a long prompt of many": ({"prompt": ["a", "a" * 5000]}, "prompt"),
    "too many tokens": ({"max_tokens": 512}, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "too many choices": ({"prompt": ["a"] * 65, "n": 2}, "n"),
    "not a number": ({"temperature": "1"}, "temperature"),
    "not finite": ({"temperature": float("nan")}, "temperature"),
    "too hot": ({"temperature": 2.5}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "seed": ({"seed": 1 << 63}, "seed"),
    "too many stops": ({"stop": list("abcde")}, "stop"),
    "an empty stop": ({"stop": ["a", ""]}, "stop.1"),
    "a long stop": ({"stop": "a" * 1025}, "stop.0"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, "echo"),
    "usage without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "best_of": ({"best_of": 2}, "best_of"),
    "suffix": ({"suffix": "b"}, "suffix"),
    "logit_bias": ({"logit_bias": {"1": 1}}, "logit_bias"),
    "tools": ({"tools": [{}]}, "tools"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "half a name": ({"\ud800": 5}, None),
    "a typing error": ({"max_token": 5}, "max_token"),
}


class TestErrors:
    @pytest.mark.parametrize("case", BAD)
    def test_a_bad_parameter_is_named(self, case: str, server: Running) -> None:
        change, param = BAD[case]
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1, **change})
        response = server.http.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)

    def test_what_asks_for_nothing_is_taken(self, server: Running) -> None:
        neutral = {
            **{"best_of": 1, "suffix": "", "logit_bias": {}, "tools": [], "user": "me"},
            **{"response_format": {"type": "text"}, "stop": None, "seed": None, "store": True},
        }
        assert server.post(prompt="a", max_tokens=1, **neutral).status_code == 200

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b'"text"',
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"seed": ' + b"9" * 5000 + b"}",
        ],
        ids=["nothing", "torn", "list", "text", "bytes", "deep", "long number"],
    )
    def test_what_is_no_request(self, body: bytes, server: Running) -> None:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for kind in ("application/json", "text/plain"):
                response = server.http.post(path, content=body, headers={"Content-Type": kind})
                assert response.status_code == 400
                assert response.json()["error"]["type"] == "invalid_request_error"

    @pytest.mark.parametrize("announced", [True, False])
    def test_a_large_body(self, announced: bool, server: Running) -> None:
        body = b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}'
        content: Any = body if announced else iter([body[: 1 << 20], body[1 << 20 :]])
        response = server.http.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 413
        assert "4,194,304 bytes" in response.json()["error"]["message"]

    def test_names_that_are_no_text(self, server: Running) -> None:
        half = b'{"model": "\\ud800", "prompt": "a"}'
        response = server.http.post(
            "/v1/completions", content=half, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 404
        assert server.http.get("/v1/models/%ff%00").status_code == 404
        for message in (
            {"role": "user", "content": "\ud800"},
            {"role": "\ud800", "content": "a"},
            {"role": "user", "content": "a", "name": "\ud800"},
        ):
            body = json.dumps({"model": "tiny", "messages": [message], "max_tokens": 1})
            response = server.http.post(
                "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
            assert response.status_code == 400

    def test_other_places(self, server: Running) -> None:
        other = server.post(model="other", prompt="a")
        assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
        with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
            server.client.completions.create(model="other", prompt="a")
        for response, status in (
            (server.http.get("/v1/embeddings"), 404),
            (server.http.get("/v1/completions"), 405),
        ):
            assert response.status_code == status
            assert response.json()["error"]["message"]

    def test_the_engine_fails(self, tokenizer: Any) -> None:
        with Running(tokenizer) as running:
            running.model.error = RuntimeError("out of order")
            response = running.post(prompt="a", max_tokens=2)
            assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
            running.model.error = RuntimeError("out of order")
            stream = running.client.completions.create(
                model="tiny", prompt="a", max_tokens=2, stream=True
            )
            with pytest.raises(openai.APIError, match="The engine failed"):
                list(stream)
            assert running.post(prompt="a", max_tokens=2).json()["choices"][0]["text"] == said(1, 2)
            failed = 'octavo_requests_total{endpoint="/v1/completions",outcome="failed"}'
            assert running.metric(failed) == 2


class TestBusy:
    def test_a_full_queue(self, slow: Running) -> None:
        slow.model.go.clear()
        body = {"prompt": "a", "max_tokens": 3}
        results: list[httpx2.Response] = []
        threads = [
            threading.Thread(target=lambda: results.append(slow.post(**body))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        # One is computed, two wait; nothing of a request for which there is no place stays.
        response = slow.post(**body, n=2)
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            slow.client.completions.create(model="tiny", prompt="a")
        slow.model.go.set()
        for thread in threads:
            thread.join()
        assert [one.json()["choices"][0]["text"] for one in results] == [said(1, 3)] * 3
        eventually(lambda: slow.runner.stats().blocks_used == 0)
        assert slow.runner.stats().waiting == 0

    def test_loading(self, tokenizer: Any) -> None:
        loads = threading.Event()
        with Running(tokenizer, loads=loads) as running:
            for response in (
                running.http.get("/health"),
                running.http.get("/v1/models"),
                running.post(prompt="a"),
            ):
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "loading"
            assert running.http.get("/version").json() == {"version": __version__}
            assert running.http.get("/metrics").status_code == 200
            loads.set()
            eventually(lambda: running.http.get("/health").status_code == 200)
            assert running.post(prompt="a").status_code == 200

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_goes_away(self, stream: bool, slow: Running) -> None:
        body = json.dumps(
            {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": stream, "n": 2}
        ).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        address = slow.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(head + body)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            eventually(lambda: slow.runner.stats().generated_tokens > 4)
        eventually(lambda: slow.runner.stats().cancelled == 2)
        stats = slow.runner.stats()
        assert (stats.running, stats.blocks_used) == (0, 0)
        assert stats.generated_tokens < 500
        cancelled = 'octavo_requests_total{endpoint="/v1/completions",outcome="cancelled"}'
        eventually(lambda: slow.metric(cancelled) == 1)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def test_the_description_holds(server: Running) -> None:
    """Whatever is asked of the API by its own description, the answer is as described, and no failure."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = []
    for found in description.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        tried.append(operation.label)

        @settings(max_examples=50, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body |= {"model": "tiny", "max_tokens": 4}
            case.call_and_validate(checks=CHECKS, timeout=30)

        holds()
    assert {"POST /v1/completions", "POST /v1/chat/completions", "GET /health"} <= {*tried}


def test_an_engine_that_has_died(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fail() -> None:
        raise AssertionError("a mistake of ours")

    with Running(tokenizer) as server:
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 2}
        assert httpx2.get(f"{server.url}/health").status_code == 200
        monkeypatch.setattr(server.runner._scheduler, "step", fail)
        assert httpx2.post(f"{server.url}/v1/completions", json=body).status_code == 500
        for answer in (
            httpx2.get(f"{server.url}/health"),
            httpx2.post(f"{server.url}/v1/completions", json=body),
        ):
            assert answer.status_code == 503
            error = answer.json()["error"]
            assert error["code"] == "failed"
            assert "a mistake of ours" in error["message"]


def test_a_checkpoint_that_cannot_be_opened() -> None:
    failures: list[Exception] = []
    service = Service(
        "tiny", lambda: (_ for _ in ()).throw(OSError("gone")), on_failure=failures.append
    )
    config = uvicorn.Config(create_app(service), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: bool(failures))
    server.should_exit = True
    thread.join()
    assert service.state == "draining"
