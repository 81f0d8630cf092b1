"""vLLM itself, of the environment that `make test-vllm` builds, and editions for it to read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import pytest
import torch
from torch import Tensor

from cutting_off import cut_off
from octavo import Calibration, convert, fp8, linear, load, quantize
from octavo.engines import Engine, open_engine
from octavo.engines.engine import TokenIds, TokenScores
from octavo.engines.transformers import TransformersEngine
from octavo.evaluation import load_tokens
from octavo.evaluation.perplexity import perplexity
from octavo.loading import Fp8KeyValueCache
from octavo.scheme import scheme_called

# Tokens of a window, and windows. Two implementations differ by a quarter of a nat or more on one token of this
# small model, either way; over all these it averages to 0.4 %.
SEQ_LEN, WINDOWS = 512, 8

# The end of the name of a scheme some of whose inputs are dynamic, and which.
MIXED = "-mixed"
MOVED = (
    "*.down_proj",
    "*.layers.*[13579].self_attn.[qkv]_proj",
    "*.layers.2?.mlp.*",
    "*.layers.4.*.o_proj",
)

Editions: TypeAlias = Callable[[str, str, str, bool], Path]
# Which tokens share a scale where inputs are scaled as they come: none, or all that vLLM reads in a step.
Sharing: TypeAlias = Literal["token", "step"]
Expected: TypeAlias = Callable[[str, str, bool, Sharing], float]


def cost(engine: Engine, tokens: Tensor) -> float:
    """The perplexity of the text."""
    return perplexity(engine, tokens, seq_len=SEQ_LEN).perplexity


def cut_off_both(cache: Fp8KeyValueCache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Octavo's cache, rounding as vLLM's does."""
    return cut_off(key, cache.k_scale).to(key), cut_off(value, cache.v_scale).to(value)


class StepEngine(TransformersEngine):
    """Octavo's engine, reading what vLLM does in a step of one window: its last token too, which is only
    predicted, but has a part in the scales of the step."""

    def score(
        self, sequences: Iterable[TokenIds], starts: Iterable[int] = itertools.repeat(1)
    ) -> Iterator[TokenScores]:
        longer = (torch.cat([one, one[-1:]]) for one in map(torch.as_tensor, sequences))
        for scores in super().score(longer, starts):
            yield TokenScores(scores.logprobs[:-1], scores.greedy[:-1])


def cost_of_steps(edition: Path, tokens: Tensor) -> float:
    """The perplexity of the text, with one scale for each input of a layer instead of one for each token."""
    sizes = set()

    def scale_of(rows: Tensor, static: Tensor | None) -> Tensor:
        assert static is None
        sizes.add(len(rows))
        return fp8.scale_from_amax(fp8.amax(rows))

    with (
        closing(StepEngine(load(edition, "cpu")[0])) as engine,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(linear, "_scale_of", scale_of)
        result = cost(engine, tokens)
    # That is, of each window.
    assert sizes == {SEQ_LEN}
    return result


@pytest.fixture(scope="session", autouse=True)
def vllm() -> Iterator[None]:
    """Skip without vLLM; with it, keep it modest."""
    pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm`")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
            # One thread: more would spin, in the way of the stages that run beside this one.
            "VLLM_CPU_NUM_OF_RESERVED_CPU": str(len(os.sched_getaffinity(0)) - 1),
            "VLLM_NO_USAGE_STATS": "1",
            # The scheduler in this process: one less to start. The model has one of its own.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }.items():
            patch.setitem(os.environ, name, value)
        yield


@pytest.fixture(scope="session")
def tokens(sample: Path) -> Tensor:
    """Docstrings, int64."""
    return load_tokens("builtin", sample)[: WINDOWS * SEQ_LEN]


@pytest.fixture(scope="session")
def editions(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Editions:
    """The sample model in a dialect, in a scheme (perhaps :data:`MIXED`), with a KV cache of a kind and perhaps merged weight scales;
    each made once, and calibrated only for the first dialect asked for: conversions are exact."""
    directory = tmp_path_factory.mktemp("editions")
    quantized: dict[tuple[str, str, bool], Path] = {}

    @cache
    def build(dialect: str, kind: str, kv_cache: str, merged: bool) -> Path:
        output = directory / f"{dialect}-{kind}-{kv_cache}-{merged}"
        first = quantized.setdefault((kind, kv_cache, merged), output)
        if first != output:
            convert(first, output, to=dialect)
            return output
        scheme = kind.removesuffix(MIXED)
        cache: Literal["fp8", "none"] = "fp8" if kv_cache == "fp8" else "none"
        quantize(
            sample,
            output,
            scheme=scheme_called(
                scheme, cache, merge_scales=merged, dynamic=MOVED if scheme != kind else ()
            ),
            calibration=Calibration(samples=8, seq_len=512),
            format=dialect,
        )
        return output

    return build


@pytest.fixture(scope="session")
def expected(editions: Editions, tokens: Tensor) -> Expected:
    """The text's perplexity in Octavo's own engine, of a scheme, a kind of KV cache, weight scales merged or
    not, and tokens that share input scales or not: codes and scales are the same in every dialect. Keys and
    values are rounded as vLLM does it."""

    @cache
    def run(kind: str, kv_cache: str, merged: bool, sharing: Sharing) -> float:
        edition = editions("compressed-tensors", kind, kv_cache, merged)
        if sharing == "step":
            return cost_of_steps(edition, tokens)
        with (
            closing(open_engine("transformers", edition, "cpu")) as engine,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(Fp8KeyValueCache, "forward", cut_off_both)
            return cost(engine, tokens)

    return run
