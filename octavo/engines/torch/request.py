"""What is asked of the engine, and what it answers. Token ids only; text is the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Finish = Literal["stop", "length"]


class Sampling(NamedTuple):
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; 0 takes all.
        top_p: only the likeliest tokens that together have this probability.
        min_p: only tokens that have this share of the likeliest one's probability.
        repetition_penalty: above 1, logits of tokens that were there before, in prompt or output, are divided by it
            if positive and multiplied if negative (Keskar et al. 2019, CTRL).
        presence_penalty: taken from the logits of tokens in the output.
        frequency_penalty: likewise, as often as they are there.
        seed: the same tokens for the same request; None draws one.
        logprobs: how many of the likeliest tokens are told with their log-probabilities, besides the chosen one's; None
            tells nothing. They are those of the model, before temperature and everything above.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: new tokens, at most; at least 1.
        sampling: how they are chosen.
        stop: token ids that end the continuation.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: frozenset[int] = frozenset()


class Output(NamedTuple):
    """One new token.

    Attributes:
        token: its id.
        finish: ``stop`` if the token is one that ends the continuation, ``length`` if it is the last that was allowed;
            None if more will come.
        logprob: its natural logarithm of probability, if asked for.
        top: the likeliest tokens with theirs, likeliest first, if asked for.
    """

    token: int
    finish: Finish | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
