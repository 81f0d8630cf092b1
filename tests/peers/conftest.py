"""The programs that own a dialect, installed in an environment of their own (``make test-peers``).

Without it these tests skip, saying so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from peers.comparing import SIZES


@pytest.fixture(scope="session")
def quark() -> Any:
    """amd-quark. Its import takes a while: it reads the sources of all models of `transformers`."""
    return pytest.importorskip("quark.torch", reason="amd-quark is not installed: make test-peers")


@pytest.fixture(scope="session")
def compressed_tensors() -> Any:
    return pytest.importorskip(
        "compressed_tensors.quantization",
        reason="compressed-tensors is not installed: make test-peers",
    )


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in float32, where all that can differ is what is computed."""
    return tiny.build(
        "llama", tmp_path_factory.mktemp("exact") / "llama", **SIZES, dtype=torch.float32
    )


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in BF16, as models are."""
    return tiny.build("llama", tmp_path_factory.mktemp("rounded") / "llama", **SIZES)
