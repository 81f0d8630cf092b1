"""``octavo.write_calibration``: calibration tokens that the model writes itself.

What a model writes when nothing is asked of it has the range of what it was trained on, which no text at hand may have: codes
and scales that are chosen on it fit other texts as well as one another (Liu et al. 2023, *LLM-QAT: Data-Free Quantization Aware
Training*, https://arxiv.org/abs/2305.17888; Williams et al. 2024, *Self-calibration for Language Model Quantization and Pruning*,
https://arxiv.org/abs/2410.17170).
"""

from __future__ import annotations

import io
import queue
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from octavo.calibration import check_length
from octavo.checkpoint import read_json
from octavo.checkpoint.hub import resolve_model
from octavo.engines.torch import open_runner
from octavo.engines.torch.request import Output, Request, Sampling
from octavo.engines.torch.runner import Runner
from octavo.errors import OctavoError
from octavo.files import write_whole
from octavo.stopwatch import Stopwatch
from octavo.tokenizer import load_tokenizer

_EXCERPT = 300


class WriteCalibrationResult(NamedTuple):
    """What was written.

    Attributes:
        output: the file.
        samples: sequences.
        seq_len: tokens in each.
        excerpt: how the first one begins.
        seconds: wall-clock time by stage, in order, and ``total``.
    """

    output: str
    samples: int
    seq_len: int
    excerpt: str
    seconds: dict[str, float]


def write_calibration(
    model: str | Path,
    output: str | Path,
    *,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> WriteCalibrationResult:
    """Have a model write its own calibration tokens.

    Each sample begins with a token drawn from the vocabulary, special ones left out, behind the one that the tokenizer puts before
    every text, if it does. What follows is drawn from the model's distribution as it is, and goes on behind tokens that end a text.

    Args:
        model: a checkpoint, BF16 or FP8: a directory, or a hub id. It is held in memory.
        output: the ``.npy`` file, int32 ``[samples, seq_len]``, as ``calibration`` sources may be.
        samples: sequences.
        seq_len: tokens in each.
        seed: of the first tokens and of all draws. BF16 rounds otherwise on another machine, and so other tokens may follow.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: replace ``output`` if it exists.
        on_progress: called with the tokens that are written, and how many there will be.

    Returns:
        What was written.

    Raises:
        OctavoError: the model cannot be opened, has too few positions, or ``output`` cannot be.
    """
    clock, path, target = Stopwatch(), resolve_model(model), Path(output)
    _check_output(target, overwrite=overwrite)
    with clock("open"):
        tokenizer: Any = load_tokenizer(path)
        runner = open_runner(path, device, max_waiting=samples)
    with closing(runner), clock("write"):
        # The engine has read it, so what it reads is there.
        config = read_json(path / "config.json")
        check_length(seq_len, config["max_position_embeddings"])
        prompts = _beginnings(tokenizer, config["vocab_size"], samples, seed)
        if seq_len <= len(prompts[0]):
            raise OctavoError(
                f"--seq-len {seq_len} leaves the model nothing to write behind the {len(prompts[0])} tokens that a sample begins "
                f"with. Choose at least {len(prompts[0]) + 1}."
            )
        ids = np.array(_continued(runner, prompts, seq_len, seed, on_progress), np.int32)
    content = io.BytesIO()
    np.save(content, ids)
    write_whole(target, content.getvalue())
    excerpt = tokenizer.decode(ids[0], skip_special_tokens=True)[:_EXCERPT]
    return WriteCalibrationResult(str(target), samples, seq_len, excerpt, clock.seconds())


def _check_output(target: Path, *, overwrite: bool) -> None:
    if target.suffix != ".npy":
        raise OctavoError(
            f"{target} does not end in .npy. Token ids are written as a NumPy array: choose such a name (-o)."
        )
    if target.is_dir() or not target.parent.is_dir():
        raise OctavoError(
            f"{target} cannot be written: it is a directory, or is to be in one that is not there. Choose another -o."
        )
    if target.exists() and not overwrite:
        raise OctavoError(
            f"{target} exists already. Choose another -o, or pass --overwrite to replace it."
        )


def _beginnings(tokenizer: Any, vocab_size: int, samples: int, seed: int) -> list[list[int]]:
    """What each sample begins with: a token of text, behind the one that begins every text."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    text = sorted(set(tokenizer.get_vocab().values()) - special)
    drawn = np.random.default_rng(seed).choice([one for one in text if one < vocab_size], samples)
    before = [one for one in tokenizer("a")["input_ids"][:1] if one == tokenizer.bos_token_id]
    return [[*before, int(first)] for first in drawn]


def _continued(
    runner: Runner,
    prompts: Sequence[list[int]],
    seq_len: int,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> list[list[int]]:
    """The prompts with what the model writes behind them, ``seq_len`` tokens each."""
    outputs: queue.SimpleQueue[tuple[int, Output | Exception]] = queue.SimpleQueue()
    samples = [list(prompt) for prompt in prompts]
    for index, prompt in enumerate(prompts):
        # Requests of one seed would draw the same numbers.
        sampling = Sampling(temperature=1.0, seed=seed * len(prompts) + index)
        request = Request(prompt, seq_len - len(prompt), sampling)
        runner.submit(request, partial(lambda at, output: outputs.put((at, output)), index))
    total = sum(seq_len - len(prompt) for prompt in prompts)
    for done in range(1, total + 1):
        index, output = outputs.get()
        if isinstance(output, Exception):
            raise output
        samples[index].append(output.token)
        on_progress(done, total)
    return samples
