"""The engine on a ``transformers`` model: whole windows through the model, logits a slice at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from octavo import kernels
from octavo.engines.engine import TokenIds, TokenScores
from octavo.engines.transformers.batches import packed, pad_left, padded
from octavo.engines.transformers.fusing import fused
from octavo.engines.transformers.prefix import ATTENTION, Packed, Prefix, last_states

T = TypeVar("T")
R = TypeVar("R")

# Positions whose logits are held at a time: with a vocabulary of 50 to 150 thousand, 50 to 150
# megabytes in BF16; fewer make the product with the vocabulary less efficient.
_SLICE = 512

# Tokens computed at a time in continuations of a prefix, and tokens attended to in a batch that
# generates.
_PACKED_TOKENS = {"cpu": 1024, "cuda": 32768}
_PADDED_TOKENS = {"cpu": 8192, "cuda": 131072}

# Sequences computed at a time on a CPU with more cores: each has working memory of its own.
_MOST_WORKERS = 8


class TransformersEngine:
    """The engine interface on a ``transformers`` causal language model.

    On a CPU each core works on a sequence of its own: no operation waits for another thread, and
    those that PyTorch does not parallelize run in parallel too. On a GPU one stream runs one
    sequence or batch after another.
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: as :func:`octavo.loading.load` returns it; a base model of decoder ``layers``
                whose last hidden states go through ``lm_head`` and nothing else.
        """
        self.model: Any = model
        # The checkpoint's advice on sampling (temperatures, penalties, when to stop) is for chats.
        self.model.generation_config = GenerationConfig.from_dict({})
        self.model.set_attn_implementation(ATTENTION)
        self.vocab_size: int = model.config.vocab_size
        self.max_positions: int = model.config.max_position_embeddings
        self._device = next(model.parameters()).device
        self._threads = threads = torch.get_num_threads()
        on_cpu = self._device.type == "cpu"
        self._workers = min(threads, _MOST_WORKERS) if on_cpu else 1
        self._pool = ThreadPoolExecutor(
            self._workers,
            "octavo-engine",
            lambda: torch.set_num_threads(max(1, threads // self._workers)),
        )

    def score(
        self, sequences: Iterable[TokenIds], starts: Iterable[int] = itertools.repeat(1)
    ) -> Iterator[TokenScores]:
        """See :meth:`octavo.engines.Engine.score`."""
        return self.map(self._score, zip(sequences, starts, strict=False))

    def choose(
        self, prefix: TokenIds, suffixes: Sequence[TokenIds], choices: Sequence[int]
    ) -> Tensor:
        """See :meth:`octavo.engines.Engine.choose`."""
        tokens = [torch.as_tensor(suffix, device=self._device) for suffix in suffixes]
        result = torch.empty(len(tokens), len(choices))
        with self.computing(), torch.inference_mode():
            ids = torch.as_tensor(prefix, dtype=torch.int64, device=self._device)
            read = Prefix(self.model.base_model, ids)
        lengths = [len(one) for one in tokens]
        batches = list(packed(lengths, _PACKED_TOKENS[self._device.type]))
        scores = self.map(
            partial(self._choose, read, list(choices)),
            ([tokens[index] for index in batch] for batch in batches),
        )
        for batch, logprobs in zip(batches, scores, strict=True):
            result[batch] = logprobs
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
        tokens = [torch.as_tensor(prompt) for prompt in prompts]
        result: list[list[int]] = [[] for _ in tokens]
        sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
        options = {
            "max_new_tokens": max_tokens,
            "eos_token_id": list(stop) or None,
            "pad_token_id": 0,
            "do_sample": bool(temperature),
            **sampling,
        }
        budget = _PADDED_TOKENS[self._device.type]
        with self.computing(), torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(0)
            for batch in padded([len(one) for one in tokens], max_tokens, budget):
                chosen = [tokens[index] for index in batch]
                ids = pad_left(chosen).to(self._device)
                mask = pad_left([torch.ones_like(one) for one in chosen]).to(self._device)
                rows = self.model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
                for index, row in zip(batch, rows.tolist(), strict=True):
                    result[index] = list(itertools.takewhile(lambda one: one not in stop, row))
        return result

    def close(self) -> None:
        """Free the model, end the threads."""
        self._pool.shutdown()
        # A thread's number of threads is also the default of threads to come.
        torch.set_num_threads(self._threads)
        self.model = None

    def computing(self) -> AbstractContextManager[None]:
        """The context in which the model may be called: on a CPU, its fused kernels in place."""
        return fused(self.model.base_model.layers)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``function(item)`` for each item, in order, on as many items at a time as there are workers.

        Items are taken and results made as they are asked for. ``function`` runs in inference mode
        and may call :meth:`hidden` and :meth:`logits`.
        """
        run = torch.inference_mode()(function)
        pending: deque[Future[R]] = deque()
        with self.computing():
            try:
                for item in items:
                    pending.append(self._pool.submit(run, item))
                    if len(pending) > self._workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
                wait(pending)

    def hidden(self, tokens: TokenIds) -> Tensor:
        """The last hidden states ``[tokens, hidden_size]`` of one sequence, in the model's dtype."""
        ids = torch.as_tensor(tokens, device=self._device).unsqueeze(0)
        states: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states[0]

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of hidden states ``[n, hidden_size]`` in the model's dtype, a slice of them at a time."""
        for piece in torch.split(hidden, _SLICE):
            yield self.model.lm_head(piece)

    def _score(self, item: tuple[TokenIds, int]) -> TokenScores:
        tokens, start = torch.as_tensor(item[0], device=self._device), item[1]
        targets = tokens[start:]
        logprobs, greedy = [], []
        logits = self.logits(self.hidden(tokens[:-1])[start - 1 :])
        for piece, target in zip(logits, torch.split(targets, _SLICE), strict=True):
            scores = _log_softmax_at(piece, target)
            logprobs.append(scores.logprobs)
            greedy.append(scores.greedy)
        return TokenScores(torch.cat(logprobs).cpu(), torch.cat(greedy).cpu())

    def _choose(self, prefix: Prefix, choices: list[int], batch: list[Tensor]) -> Tensor:
        states = last_states(self.model.base_model, Packed(prefix, batch, self.model.dtype))
        logprobs = [
            torch.log_softmax(piece, dim=-1, dtype=torch.float32)[:, choices]
            for piece in self.logits(states)
        ]
        return torch.cat(logprobs).cpu()


def _log_softmax_at(logits: Tensor, targets: Tensor) -> TokenScores:
    """The scores of ``targets`` ``[n]`` under ``logits`` ``[n, vocabulary]``."""
    if logits.dtype == torch.bfloat16 and logits.device.type == "cpu":
        return TokenScores(*kernels.score(logits, targets))
    distribution = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    logprobs = distribution.gather(1, targets.unsqueeze(1)).squeeze(1)
    return TokenScores(logprobs, logprobs >= distribution.amax(dim=-1))
