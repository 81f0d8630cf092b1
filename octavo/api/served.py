"""The model behind the API: what turns a client's request into requests of the engine."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from octavo.api.errors import ApiError
from octavo.api.requests import MAX_CHOICES, Body, ChatBody, CompletionBody
from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.engines.torch.batch import BLOCK
from octavo.engines.torch.request import Request, Sampling
from octavo.engines.torch.runner import Runner
from octavo.errors import OctavoError
from octavo.generation import default_sampling, end_tokens
from octavo.tokenizer import chat_prompt, load_tokenizer

# Texts up to here are made tokens in the event loop, where others wait meanwhile.
_SHORT_TEXT = 2000


class Served:
    """A model that is served.

    Attributes:
        name: what clients call it.
        tokenizer: the checkpoint's.
        runner: the engine.
        max_positions: tokens of prompt and continuation together, at most.
        created: when it was loaded, in seconds since 1970.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        runner: Runner,
        *,
        vocab_size: int,
        max_positions: int,
        ends: frozenset[int],
        sampling: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            name: see above; so are the next two.
            vocab_size: token ids are below.
            max_positions: tokens that the model can read at once.
            ends: token ids that end a text.
            sampling: how tokens are chosen where a client does not say.
        """
        self.name, self.tokenizer, self.runner = name, tokenizer, runner
        # A sequence lies in the cache as a whole.
        self.max_positions = min(max_positions, runner.stats().blocks_total * BLOCK)
        self.created = int(time.time())
        self._vocab_size, self._ends = vocab_size, ends
        self._sampling = Sampling(**(sampling or {}))

    async def prompts(self, body: CompletionBody) -> list[list[int]]:
        """Token ids of the prompts.

        Raises:
            ApiError: there is no such token, or none at all.
        """
        return [
            await self._tokenize(prompt, functools.partial(self._encode, prompt))
            if isinstance(prompt, str)
            else self._checked(prompt)
            for prompt in body.prompt
        ]

    def texts(self, body: CompletionBody, prompts: Sequence[list[int]]) -> list[str]:
        """The prompts as text."""
        return [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            for prompt, ids in zip(body.prompt, prompts, strict=True)
        ]

    async def conversation(self, body: ChatBody) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Raises:
            ApiError: the checkpoint's chat template does not take it.
        """
        messages = [message.plain() for message in body.messages]
        text = "".join(text for message in messages for text in message.values())
        return await self._tokenize(text, lambda: chat_prompt(self.tokenizer, messages), "messages")

    def requests(
        self,
        body: Body,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        logprobs: int | None,
    ) -> list[Request]:
        """What the engine is asked: for each prompt, as many as the client wants continuations.

        Args:
            body: what the client asks for.
            prompts: token ids.
            max_tokens: of a continuation; None is as many as there is room for.
            logprobs: see :class:`octavo.engines.torch.request.Sampling`.

        Raises:
            ApiError: a prompt is too long, or it is too many.
        """
        if len(prompts) * body.n > MAX_CHOICES:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n {body.n} make {len(prompts) * body.n} continuations, "
                f"expected at most {MAX_CHOICES}. Send several requests.",
                param="n",
            )
        ends = frozenset[int]() if body.ignore_eos else self._ends
        return [
            Request(
                prompt, self._room(prompt, max_tokens), self._sampled(body, which, logprobs), ends
            )
            for prompt in prompts
            for which in range(body.n)
        ]

    def _room(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        most = self.max_positions - len(prompt)
        if most < (max_tokens or 1):
            new = f" and asks for {max_tokens} new ones" if max_tokens else ""
            raise ApiError(
                400,
                f"The prompt has {len(prompt)} tokens{new}; prompt and continuation together can have at "
                f"most {self.max_positions}.",
                param="max_tokens" if most > 0 else "prompt",
                code="context_length_exceeded",
            )
        return max_tokens or most

    def _sampled(self, body: Body, which: int, logprobs: int | None) -> Sampling:
        given = {
            name: value
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
            if (value := getattr(body, name)) is not None
        }
        if body.top_k is not None:
            given["top_k"] = max(body.top_k, 0)
        return self._sampling._replace(
            **given,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            # Continuations of one prompt are to differ, and to come again.
            seed=None if body.seed is None else (body.seed + which) % (1 << 63),
            logprobs=logprobs,
        )

    async def _tokenize(
        self, text: str, tokenize: Callable[[], list[int]], param: str = "prompt"
    ) -> list[int]:
        try:
            text.encode()
            ids = tokenize() if len(text) <= _SHORT_TEXT else await asyncio.to_thread(tokenize)
        except UnicodeEncodeError:
            raise ApiError(
                400, f"{param} has half of a surrogate pair, which is no character.", param=param
            ) from None
        except OctavoError as error:
            raise ApiError(400, str(error), param=param) from None
        return self._checked(ids, param)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _checked(self, ids: list[int], param: str = "prompt") -> list[int]:
        if not ids:
            raise ApiError(400, f"{param} is empty, expected at least one token.", param=param)
        if max(ids) >= self._vocab_size:
            raise ApiError(
                400,
                f"{param} has the token id {max(ids)}; the model's are below {self._vocab_size}.",
                param=param,
            )
        return ids


def load_served(name: str, directory: Path, runner: Runner) -> Served:
    """The model in a checkpoint directory, with the engine that has opened it.

    Raises:
        OctavoError: the checkpoint has no usable tokenizer, or its generation config is damaged.
    """
    tokenizer = load_tokenizer(directory)
    with closing(Checkpoint(directory)) as checkpoint:
        config = Edition(checkpoint).config
    return Served(
        name,
        tokenizer,
        runner,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        ends=end_tokens(directory, tokenizer),
        sampling=default_sampling(directory),
    )
