"""vLLM itself, of the environment that `make test-vllm` builds, and editions for it to read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import pytest
from torch import Tensor

from octavo import Calibration, quantize
from octavo.engines import Engine, open_engine
from octavo.evaluation import load_tokens
from octavo.evaluation.perplexity import perplexity
from octavo.scheme import scheme_called

# Tokens of a window, and windows. Two implementations differ by a quarter of a nat or more on one token of this
# small model, either way; over all these it averages to 0.3 %.
SEQ_LEN, WINDOWS = 512, 16

Editions: TypeAlias = Callable[[str, str, str, bool], Path]
Expected: TypeAlias = Callable[[str, str, bool], float]


def cost(engine: Engine, tokens: Tensor) -> float:
    """The perplexity of the text."""
    return perplexity(engine, tokens, seq_len=SEQ_LEN).perplexity


@pytest.fixture(scope="session", autouse=True)
def vllm() -> Iterator[None]:
    """Skip without vLLM; with it, keep it modest."""
    pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm`")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
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
    """The sample model in a dialect, in a scheme, with a KV cache of a kind and perhaps merged weight scales;
    each made once."""
    directory = tmp_path_factory.mktemp("editions")

    @cache
    def build(dialect: str, kind: str, kv_cache: str, merged: bool) -> Path:
        output = directory / f"{dialect}-{kind}-{kv_cache}-{merged}"
        cache: Literal["fp8", "none"] = "fp8" if kv_cache == "fp8" else "none"
        quantize(
            sample,
            output,
            scheme=scheme_called(kind, cache, merge_scales=merged),
            calibration=Calibration(samples=16, seq_len=512),
            format=dialect,
        )
        return output

    return build


@pytest.fixture(scope="session")
def expected(editions: Editions, tokens: Tensor) -> Expected:
    """The text's perplexity in Octavo's own engine, of a scheme, a kind of KV cache and weight scales merged or
    not: codes and scales are the same in every dialect."""

    @cache
    def run(kind: str, kv_cache: str, merged: bool) -> float:
        edition = editions("compressed-tensors", kind, kv_cache, merged)
        with closing(open_engine("torch", edition, "cpu")) as engine:
            return cost(engine, tokens)

    return run
