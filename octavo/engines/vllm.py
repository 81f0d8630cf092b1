"""The engine on vLLM, which an edition is made for: the optional package ``vllm``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.engines.engine import TokenIds, TokenScores
from octavo.engines.vllm_loaded import WORKER_EXTENSION, LoadedModel, read_loaded
from octavo.errors import OctavoError, one_line

# Sequences handed over at a time, for vLLM to batch as it likes.
_CHUNK = 64

# What vLLM reads when it is imported, where the user has not set it.
_SETTINGS = {
    # Standard output is for results.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # Its warnings are many, some with a traceback. A process of its own loads the model and logs
    # what goes wrong there as an error.
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def start(model: Path, device: str, **options: Any) -> VllmEngine:
    """Load the checkpoint in directory ``model`` where vLLM likes it.

    Args:
        model: the checkpoint directory.
        device: ``auto``.
        options: further arguments of ``vllm.LLM`` (``kv_cache_dtype="fp8"``).

    Raises:
        OctavoError: vLLM cannot be loaded, or refuses the checkpoint or the device.
    """
    if device != "auto":
        raise OctavoError(
            f"--device {device} does not go with the engine vllm, which runs on the device it was "
            "built for. Drop --device, or choose with CUDA_VISIBLE_DEVICES."
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        vllm: Any = import_module("vllm")
    except ImportError as error:
        raise OctavoError(
            f"The engine vllm cannot be loaded: {one_line(error)}. Repair its installation, or use the "
            "engine transformers (--engine transformers), which needs nothing more."
        ) from error
    try:
        llm = vllm.LLM(
            model=str(model),
            # Token ids in, token ids out.
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            seed=0,
            worker_extension_cls=WORKER_EXTENSION,
            **options,
        )
    except Exception as error:  # it raises many kinds
        raise OctavoError(
            f"vLLM cannot load {model}: {one_line(error)}. Try another (--engine transformers)."
        ) from error
    return VllmEngine(llm, vllm.SamplingParams, model)


class VllmEngine:
    """The engine interface on a ``vllm.LLM``."""

    name = "vllm"

    def __init__(self, llm: Any, sampling_params: Any, model: Path) -> None:
        """
        Args:
            llm: a ``vllm.LLM``.
            sampling_params: the class ``vllm.SamplingParams``.
            model: the checkpoint directory, for messages.
        """
        self._llm, self._params, self._model = llm, sampling_params, model
        config = llm.llm_engine.model_config
        self.vocab_size: int = config.get_vocab_size()
        # It reads every token, the one that is only predicted too, and always makes one more.
        self.max_positions: int = config.max_model_len - 2

    def score(
        self, sequences: Iterable[TokenIds], starts: Iterable[int] = itertools.repeat(1)
    ) -> Iterator[TokenScores]:
        """See :meth:`octavo.engines.Engine.score`."""
        items = zip(sequences, starts, strict=False)
        while chunk := list(itertools.islice(items, _CHUNK)):
            outputs = self._run([tokens for tokens, _ in chunk], max_tokens=1, prompt_logprobs=1)
            for (tokens, begin), output in zip(chunk, outputs, strict=True):
                # Position by position, the likeliest token and the prompt's own.
                found = [
                    {token: one.logprob for token, one in row.items()}
                    for row in output.prompt_logprobs[begin:]
                ]
                scored = torch.tensor(
                    [row[token] for row, token in zip(found, _ids(tokens)[begin:], strict=True)],
                    dtype=torch.float32,
                )
                # Not by rank, which counts equally likely tokens as more likely ones.
                best = torch.tensor([max(row.values()) for row in found], dtype=torch.float32)
                yield TokenScores(scored, scored >= best)

    def choose(
        self, prefix: TokenIds, suffixes: Sequence[TokenIds], choices: Sequence[int]
    ) -> Tensor:
        """See :meth:`octavo.engines.Engine.choose`; vLLM's prefix cache keeps the prefix."""
        prompts = [_ids(prefix) + _ids(suffix) for suffix in suffixes]
        outputs = self._run(prompts, max_tokens=1, logprob_token_ids=list(choices))
        rows = [
            [output.outputs[0].logprobs[0][choice].logprob for choice in choices]
            for output in outputs
        ]
        return torch.tensor(rows, dtype=torch.float32).view(len(prompts), len(choices))

    def generate(
        self,
        prompts: Sequence[TokenIds],
        *,
        max_tokens: int,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
    ) -> list[list[int]]:
        """See :meth:`octavo.engines.Engine.generate`."""
        outputs = self._run(
            prompts,
            max_tokens=max_tokens,
            stop_token_ids=list(stop),
            temperature=temperature,
            ignore_eos=True,
            seed=0,
        )
        return [
            list(itertools.takewhile(lambda one: one not in stop, output.outputs[0].token_ids))
            for output in outputs
        ]

    def loaded(self) -> LoadedModel:
        """What vLLM took of the checkpoint, which may be less than its config promises."""
        return read_loaded(self._llm)

    def close(self) -> None:
        """End the processes that hold the model, which outlive the ``vllm.LLM``."""
        self._llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: Sequence[TokenIds], **options: Any) -> list[Any]:
        params = self._params(**{"temperature": 0.0, "detokenize": False, **options})
        inputs = [{"prompt_token_ids": _ids(prompt)} for prompt in prompts]
        try:
            outputs: list[Any] = self._llm.generate(inputs, params, use_tqdm=False)
        except Exception as error:  # as in `start`
            raise OctavoError(
                f"vLLM cannot run {self._model}: {one_line(error)}. Try another "
                "(--engine transformers)."
            ) from error
        return outputs


def _ids(tokens: TokenIds) -> list[int]:
    ids: list[int] = torch.as_tensor(tokens).tolist()
    return ids
