"""Continuations in the shapes that OpenAI's clients read: whole, or as chunks of a stream.

Chunks are put together from strings, since there is one for every token and the model computes on the same
cores.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from typing import Any, NamedTuple

from octavo.api.choices import Choice, Piece

# JSON has no infinity.
_LEAST_LOGPROB = -9999.0

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenLogprob(NamedTuple):
    """A token of a continuation, with its logarithm of probability and the likeliest ones'."""

    token: str
    logprob: float
    top: list[tuple[str, float]]
    offset: int


class Answer:
    """What a client gets for a request; one class for each kind.

    Attributes:
        kind: of the whole, in its ``object``.
        chunk_kind: likewise of a chunk.
        prefix: of the id.
    """

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(
        self, model: str, tokenizer: Any, prompt_tokens: int, *, logprobs: bool, usage: bool
    ) -> None:
        """
        Args:
            model: its name.
            tokenizer: the checkpoint's.
            prompt_tokens: of all prompts together.
            logprobs: whether logarithms of probabilities are told.
            usage: whether a stream tells how many tokens there were.
        """
        self._tokenizer, self._prompt_tokens = tokenizer, prompt_tokens
        self._with_logprobs, self._with_usage = logprobs, usage
        self._texts: defaultdict[int, list[str]] = defaultdict(list)
        self._told: defaultdict[int, list[TokenLogprob]] = defaultdict(list)
        self._about = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
        }
        head = json.dumps(self._about | {"object": self.chunk_kind})[:-1]
        self._head = f'data: {head}, "choices": '
        self._tail = ', "usage": null}\n\n' if usage else "}\n\n"

    def keep(self, piece: Piece) -> None:
        """Remember what a token added, for :meth:`whole`."""
        self._texts[piece.choice].append(piece.text)
        self._told[piece.choice].extend(self._tell(piece))

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer to a request without a stream."""
        return {
            **self._about,
            "choices": [
                {
                    "index": choice.index,
                    **self._content("".join(self._texts[choice.index])),
                    "logprobs": self._logprobs(self._told[choice.index]),
                    "finish_reason": choice.finish,
                }
                for choice in choices
            ],
            "usage": self._usage(choices),
        }

    def chunk(self, piece: Piece) -> str:
        """The event of a stream that tells what a token added."""
        logprobs = "null"
        if self._with_logprobs:
            logprobs = json.dumps(self._logprobs(self._tell(piece)))
        finish = f'"{piece.finish}"' if piece.finish else "null"
        return (
            f'{self._head}[{{"index": {piece.choice}, {self._delta(piece)}, '
            f'"logprobs": {logprobs}, "finish_reason": {finish}}}]{self._tail}'
        )

    def ending(self, choices: list[Choice]) -> str:
        """The last events of a stream."""
        usage = f'{self._head}[], "usage": {json.dumps(self._usage(choices))}}}\n\n'
        return (usage if self._with_usage else "") + "data: [DONE]\n\n"

    def _content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece) -> str:
        raise NotImplementedError

    def _logprobs(self, told: list[TokenLogprob]) -> dict[str, Any] | None:
        raise NotImplementedError

    def _usage(self, choices: list[Choice]) -> dict[str, int]:
        new = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    def _tell(self, piece: Piece) -> list[TokenLogprob]:
        """A token's logarithm of probability, if there is one to tell."""
        output = piece.output
        # What ends a text is no part of it.
        if output.logprob is None or output.finish == "stop":
            return []
        top = [(self._token(token), max(one, _LEAST_LOGPROB)) for token, one in output.top]
        logprob = max(output.logprob, _LEAST_LOGPROB)
        return [TokenLogprob(self._token(output.token), logprob, top, piece.offset)]

    def _token(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


class CompletionAnswer(Answer):
    """Of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, piece: Piece) -> str:
        return f'"text": {json.dumps(piece.text)}'

    def _logprobs(self, told: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {
            "tokens": [one.token for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [{one.token: one.logprob} | dict(one.top) for one in told],
            "text_offset": [one.offset for one in told],
        }


class ChatAnswer(Answer):
    """Of ``/v1/chat/completions``."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, piece: Piece) -> str:
        role = '"role": "assistant", ' if piece.number == 0 else ""
        return f'"delta": {{{role}"content": {json.dumps(piece.text)}}}'

    def _logprobs(self, told: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [self._entry(one) for one in told]}

    def _entry(self, one: TokenLogprob) -> dict[str, Any]:
        top = [_with_bytes(token, logprob) for token, logprob in one.top]
        return {**_with_bytes(one.token, one.logprob), "top_logprobs": top}


def _with_bytes(token: str, logprob: float) -> dict[str, Any]:
    # A token that is a part of a character has no text of its own, and its bytes are not known here.
    known = None if _REPLACEMENT in token else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": known}
