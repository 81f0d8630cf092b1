"""What an engine does. It knows token ids only; text is the caller's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

# One sequence of token ids; a tensor is int64 and one-dimensional.
TokenIds: TypeAlias = Sequence[int] | Tensor

T = TypeVar("T")
R = TypeVar("R")


class TokenScores(NamedTuple):
    """How likely a sequence's tokens are, each given those before it.

    Attributes:
        logprobs: natural logarithms, float32, ``[scored tokens]``.
        greedy: bool, ``[scored tokens]``: no other token is more likely.
    """

    logprobs: Tensor
    greedy: Tensor


class Engine(Protocol):
    """A running model.

    Attributes:
        name: the engine's, a key of :data:`octavo.engines.ENGINES`.
        vocab_size: token ids are below.
        max_positions: tokens the model can read at once.
    """

    name: str
    vocab_size: int
    max_positions: int

    def score(
        self, sequences: Iterable[TokenIds], starts: Iterable[int] = itertools.repeat(1)
    ) -> Iterator[TokenScores]:
        """Score sequences, lazily and in order.

        Args:
            sequences: each of 2 to ``max_positions + 1`` tokens; the last is predicted, never read.
            starts: for each sequence, the first position that is scored, at least 1.

        Yields:
            The scores of ``sequence[start:]``, from a float32 log-softmax.
        """
        ...

    def choose(
        self, prefix: TokenIds, suffixes: Sequence[TokenIds], choices: Sequence[int]
    ) -> Tensor:
        """Log-probabilities of some tokens after each of several continuations of one prefix.

        Args:
            prefix: read once, whatever the number of suffixes; may be empty.
            suffixes: each of at least one token, and with the prefix at most ``max_positions``.
            choices: token ids.

        Returns:
            float32 ``[suffixes, choices]``, on the CPU.
        """
        ...

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_tokens: int,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
            prompts: each of at least one token.
            max_tokens: new tokens, at most.
            stop: token ids that end a continuation. Nothing else does: no end-of-sequence token is
                known here.
            temperature: 0 takes the likeliest token; above, tokens are drawn, the same ones in
                every run.

        Returns:
            For each prompt its new tokens, without the one that ended them: fewer than
            ``max_tokens`` are an end.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


@runtime_checkable
class DistributionEngine(Engine, Protocol):
    """An engine that gives whole distributions over the vocabulary."""

    def computing(self) -> AbstractContextManager[None]:
        """The context in which :meth:`hidden` and :meth:`logits` may be called."""
        ...

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``function(item)`` for each item, in order, on as many items at a time as the engine likes.

        Items are taken and results made as they are asked for. ``function`` runs in that context.
        """
        ...

    def hidden(self, tokens: TokenIds) -> Tensor:
        """The last hidden states ``[tokens, hidden_size]`` of one sequence, in the model's dtype."""
        ...

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of hidden states ``[n, hidden_size]`` in the model's dtype, a slice of them at a time."""
        ...
