"""The embedded engine as evaluations want it: sequences scored, prefixes continued, whole distributions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from octavo import kernels
from octavo.engines.engine import TokenIds, TokenScores
from octavo.engines.torch.batch import BLOCK, Batch, Cache, Model
from octavo.engines.torch.request import Request, Sampling
from octavo.engines.torch.scheduler import Scheduler

T = TypeVar("T")
R = TypeVar("R")

# Tokens computed at a time, and tokens whose logits are held.
_CHUNK = 2048
_SLICE = 512
# Sequences that are generated at a time.
_RUNNING = 64


class TorchEngine:
    """The engine interface on the embedded decoder, which works on one sequence or batch at a time."""

    name = "torch"

    def __init__(self, model: Model) -> None:
        self._model = model
        self.vocab_size, self.max_positions = model.vocab_size, model.max_positions
        self._cache: Cache | None = None

    def score(
        self, sequences: Iterable[TokenIds], starts: Iterable[int] = itertools.repeat(1)
    ) -> Iterator[TokenScores]:
        """See :meth:`octavo.engines.Engine.score`."""
        return self.map(self._score, zip(sequences, starts, strict=False))

    def choose(
        self, prefix: TokenIds, suffixes: Sequence[TokenIds], choices: Sequence[int]
    ) -> Tensor:
        """See :meth:`octavo.engines.Engine.choose`."""
        known = torch.as_tensor(prefix, dtype=torch.int64)
        # Whole blocks are shared; each continuation begins with what is behind them.
        shared = len(known) // BLOCK
        tails = [torch.cat([known[shared * BLOCK :], torch.as_tensor(one)]) for one in suffixes]
        blocks = [_blocks(len(tail)) for tail in tails]
        most = max(blocks, default=0)
        cache = self._room(shared + max(_CHUNK // BLOCK + len(tails), most))
        if shared:
            self._forward(known[: shared * BLOCK], cache, last_only=True)
        result = torch.empty(len(tails), len(choices))
        for group in _groups([len(tail) for tail in tails], _CHUNK):
            firsts = list(itertools.accumulate((blocks[one] for one in group), initial=shared))
            tables = torch.zeros(len(group), shared + most, dtype=torch.int64)
            tables[:, :shared] = torch.arange(shared)
            for row, (one, first) in enumerate(zip(group, firsts, strict=False)):
                tables[row, shared : shared + blocks[one]] = first + torch.arange(blocks[one])
            starts = torch.tensor([0, *itertools.accumulate(len(tails[one]) for one in group)])
            places = [shared * BLOCK + torch.arange(len(tails[one])) for one in group]
            tokens = torch.cat([tails[one] for one in group])
            hidden = self._model.forward(
                Batch(tokens, torch.cat(places), starts, tables, starts[1:] - 1), cache
            )
            scores = torch.cat(
                [torch.log_softmax(logits.float(), dim=-1) for logits in self.logits(hidden)]
            )
            result[group] = scores[:, list(choices)].cpu()
        return result

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_tokens: int,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
    ) -> list[list[int]]:
        """See :meth:`octavo.engines.Engine.generate`."""
        tokens = [torch.as_tensor(prompt).tolist() for prompt in prompts]
        longest = max((len(one) for one in tokens), default=0) + max_tokens
        running = min(_RUNNING, max(1, len(tokens)))
        scheduler = Scheduler(
            self._model,
            blocks=running * _blocks(longest),
            max_running=running,
        )
        results: list[list[int]] = []
        sequences = {}
        for number, prompt in enumerate(tokens):
            results.append([])
            sampling = Sampling(temperature=temperature, seed=number)
            asked = Request(prompt, max_tokens, sampling, frozenset(stop))
            sequences[scheduler.add(asked)] = results[-1]
        while scheduler.busy:
            for sequence, output in scheduler.step():
                if isinstance(output, Exception):
                    raise output
                if output.finish != "stop":
                    sequences[sequence].append(output.token)
        return results

    def close(self) -> None:
        """Free the model, end the threads."""
        self._model.close()
        self._cache = None

    def computing(self) -> AbstractContextManager[None]:
        """The context in which the model may be called: any."""
        return nullcontext()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``function(item)`` for each item, in order, as results are asked for."""
        with torch.inference_mode():
            for item in items:
                yield function(item)

    def hidden(self, tokens: TokenIds) -> Tensor:
        """The last hidden states ``[tokens, hidden_size]`` of one sequence, BF16."""
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        return self._forward(ids, self._room(_blocks(len(ids))))

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of hidden states ``[n, hidden_size]`` in BF16, a slice of them at a time."""
        for piece in torch.split(hidden, _SLICE):
            yield self._model.logits(piece)

    def _score(self, item: tuple[TokenIds, int]) -> TokenScores:
        tokens, start = torch.as_tensor(item[0], dtype=torch.int64), item[1]
        logits = self.logits(self.hidden(tokens[:-1])[start - 1 :])
        parts = [
            kernels.score(piece.cpu(), targets)
            for piece, targets in zip(logits, torch.split(tokens[start:], _SLICE), strict=True)
        ]
        return TokenScores(*(torch.cat(one) for one in zip(*parts, strict=True)))

    def _room(self, blocks: int) -> Cache:
        """A cache of so many blocks, whatever is in it."""
        if self._cache is None or self._cache.blocks < blocks:
            self._cache = self._model.new_cache(blocks)
        return self._cache

    def _forward(self, ids: Tensor, cache: Cache, *, last_only: bool = False) -> Tensor:
        """Hidden states of a sequence in the first blocks of the cache, some tokens at a time."""
        table = torch.arange(_blocks(len(ids))).unsqueeze(0)
        results = []
        for begin in range(0, len(ids), _CHUNK):
            piece = ids[begin : begin + _CHUNK]
            wanted = torch.arange(len(piece))[-1 if last_only else 0 :]
            starts, places = torch.tensor([0, len(piece)]), begin + torch.arange(len(piece))
            results.append(self._model.forward(Batch(piece, places, starts, table, wanted), cache))
        return torch.cat(results)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def _groups(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of sequences, in order, of together at most ``budget`` tokens, or one."""
    group: list[int] = []
    for index, length in enumerate(lengths):
        if group and sum(lengths[one] for one in group) + length > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
