"""From the body of a request to what the engine is asked, and how its answer is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from octavo.api.answers import Answer, ChatAnswer, CompletionAnswer
from octavo.api.choices import Choice
from octavo.api.errors import ApiError
from octavo.api.requests import Body, ChatBody, CompletionBody
from octavo.api.served import Served
from octavo.engines.torch.request import Request


class Job(NamedTuple):
    """What a request amounts to.

    Attributes:
        endpoint: the path it came to.
        requests: what the engine is asked, one for each choice.
        choices: the continuations.
        answer: how they are written.
        stream: whether the client wants them as they come.
    """

    endpoint: str
    requests: Sequence[Request]
    choices: list[Choice]
    answer: Answer
    stream: bool


async def completion_job(served: Served, body: CompletionBody) -> Job:
    """Continue texts.

    Raises:
        ApiError: that cannot be done.
    """
    _check_stream(body)
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400,
            "echo with logprobs is not supported: the prompt's tokens are not scored. Leave one out.",
            param="echo",
        )
    prompts = await served.prompts(body)
    requests = served.requests(body, prompts, body.max_tokens, body.logprobs)
    before = served.texts(body, prompts) if body.echo else [""] * len(prompts)
    choices = [
        Choice(
            index,
            served.tokenizer,
            request.prompt,
            stops=body.stop,
            before=before[index // body.n],
        )
        for index, request in enumerate(requests)
    ]
    answer = CompletionAnswer(
        served.name,
        served.tokenizer,
        sum(map(len, prompts)),
        logprobs=body.logprobs is not None,
        usage=body.wants_usage,
    )
    return Job("/v1/completions", requests, choices, answer, body.stream)


async def chat_job(served: Served, body: ChatBody) -> Job:
    """Answer the last message of a conversation.

    Raises:
        ApiError: that cannot be done.
    """
    _check_stream(body)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs is for logprobs: true only.", param="top_logprobs")
    prompt = await served.conversation(body)
    requests = served.requests(
        body,
        [prompt],
        body.max_completion_tokens or body.max_tokens,
        body.top_logprobs if body.logprobs else None,
    )
    choices = [Choice(index, served.tokenizer, prompt, stops=body.stop) for index in range(body.n)]
    answer = ChatAnswer(
        served.name,
        served.tokenizer,
        len(prompt),
        logprobs=body.logprobs,
        usage=body.wants_usage,
    )
    return Job("/v1/chat/completions", requests, choices, answer, body.stream)


def _check_stream(body: Body) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for stream: true only.", param="stream_options")
