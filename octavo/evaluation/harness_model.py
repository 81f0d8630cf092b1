"""An engine as a model of lm-evaluation-harness. Imports the harness, which is optional.

Texts become tokens and requests are cut the way the harness's own ``hf`` model does it, so that
results compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from octavo.engines import Engine
from octavo.errors import OctavoError
from octavo.evaluation.journal import Journal
from octavo.evaluation.progress import OnProgress, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens generated before the text is searched for a stop string, and prompts generated together.
_STEP = 64
_PROMPTS = 32

# What the harness's ``hf`` model generates where a task does not say.
_MAX_TOKENS = 256


class _Generation(NamedTuple):
    """A request to continue a text."""

    text: str
    until: tuple[str, ...]
    max_tokens: int
    temperature: float


class HarnessModel(TemplateLM):
    """The harness's model interface on an engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        journal: Journal,
        on_progress: OnProgress,
    ) -> None:
        """
        Args:
            engine: the model.
            tokenizer: its tokenizer.
            journal: where requests' results are kept.
            on_progress: called after each request.
        """
        super().__init__()
        self.tokenizer: Any = tokenizer
        self._engine, self._journal, self._on_progress = engine, journal, on_progress

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        token: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def max_length(self) -> int:
        """Tokens the model can read at once."""
        return self._engine.max_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text begins with one."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, prefix)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-probabilities of continuations, and whether each is what greedy decoding gives."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probabilities of whole texts, window by window."""
        windows = [
            (number, make_disjoint_window(pair))
            for number, request in enumerate(requests)
            for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
        ]
        scores = self._loglikelihood_tokens([(None, *window) for _, window in windows])
        sums = [0.0] * len(requests)
        for (number, _), (logprob, _) in zip(windows, scores, strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to a stop string."""
        wanted = [self._generation(*request.args) for request in requests]

        def compute(missing: list[int]) -> Iterator[str]:
            chosen = (wanted[index] for index in missing)
            for _, alike in groupby(chosen, key=lambda one: one[1:]):
                group = list(alike)
                for first in range(0, len(group), _PROMPTS):
                    yield from self._generate(group[first : first + _PROMPTS])

        return self._kept([_key("generate", one) for one in wanted], compute)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        most = self.max_length + 1
        sequences = [(context + continuation)[-most:] for _, context, continuation in requests]
        starts = [
            max(1, len(sequence) - len(continuation))
            for sequence, (_, _, continuation) in zip(sequences, requests, strict=True)
        ]

        def compute(missing: list[int]) -> Iterator[tuple[float, bool]]:
            scores = self._engine.score(
                (sequences[index] for index in missing), (starts[index] for index in missing)
            )
            for score in scores:
                yield score.logprobs.double().sum().item(), bool(score.greedy.all())

        keys = [_key("score", item) for item in zip(sequences, starts, strict=True)]
        return [(logprob, greedy) for logprob, greedy in self._kept(keys, compute)]

    def _kept(self, keys: list[str], compute: Any) -> list[Any]:
        results = []
        for result in self._journal.run(keys, compute):
            results.append(result)
            self._on_progress(Progress(len(results), len(keys), "requests"))
        return results

    def _generation(self, text: str, options: dict[str, Any]) -> _Generation:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, _MAX_TOKENS))
        until = tuple(handle_stop_sequences(wanted.pop("until"), eos=None))
        max_tokens, sampled = wanted.pop("max_gen_toks"), wanted.pop("do_sample")
        temperature = wanted.pop("temperature", 1.0) if sampled else 0.0
        if sampled and wanted:
            raise OctavoError(
                f"A task asks for sampling with {', '.join(wanted)}; Octavo's engines know the temperature "
                "only. Override the task's generation_kwargs in a task file of your own."
            )
        if max_tokens >= self.max_length:
            raise OctavoError(
                f"A task asks for {max_tokens} new tokens, the model has {self.max_length} positions "
                "(max_position_embeddings in config.json). Lower the task's max_gen_toks."
            )
        return _Generation(text, until, max_tokens, temperature)

    def _generate(self, group: list[_Generation]) -> list[str]:
        """Texts for requests that differ in nothing but the prompt."""
        _, until, max_tokens, temperature = group[0]
        prompts = [self.tok_encode(one.text)[-(self.max_length - max_tokens) :] for one in group]
        added = self.tokenizer.get_added_vocab()
        # Decoding drops special tokens, so those among the stop strings are found as tokens.
        stop = [self.eot_token_id, *(added[term] for term in until if term in added)]
        # Drawn tokens depend on those drawn before: all of them at once.
        step, left = max_tokens if temperature else _STEP, max_tokens
        made: list[list[int]] = [[] for _ in group]
        waiting = list(range(len(group)))
        while waiting and left:
            count = min(step, left)
            new = self._engine.generate(
                [prompts[index] + made[index] for index in waiting],
                max_tokens=count,
                stop=stop,
                temperature=temperature,
            )
            for index, tokens in zip(waiting, new, strict=True):
                made[index] += tokens
            waiting = [
                index
                for index, tokens in zip(waiting, new, strict=True)
                if len(tokens) == count
                and not any(term in self._decode(made[index]) for term in until if term)
            ]
            left -= count
        return [
            postprocess_generated_text(self._decode(tokens), list(until), None) for tokens in made
        ]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _key(kind: str, request: Any) -> str:
    return hashlib.sha256(json.dumps([kind, request]).encode()).hexdigest()
