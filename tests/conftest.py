"""What every test shares: no network, and a tiny checkpoint built once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports the hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import tiny

# How long an example takes depends on the disk and on what else runs on the machine.
settings.register_profile("octavo", deadline=None)
settings.load_profile("octavo")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama checkpoint in BF16 with untied embeddings; read-only, copy it to edit it."""
    return tiny.build("llama", tmp_path_factory.mktemp("checkpoints") / "tiny-llama")
