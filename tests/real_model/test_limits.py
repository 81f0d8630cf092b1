"""Real shapes in processes that cannot take more memory than ``--max-memory`` promises."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.limits import limited
from octavo import synth

pytestmark = pytest.mark.real_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two layers of Llama 3.1 8B: 0.9 GB, and 2.1 GB of embedding and lm_head."""
    scratch = tmp_path_factory.mktemp("limits")
    if shutil.disk_usage(scratch).free < 8 * GIB:
        pytest.skip("needs 8 GiB of disk")
    synth("llama-3.1-8b", scratch / "model", layers=2)
    np.save(scratch / "ids.npy", np.random.default_rng(0).integers(256, size=(8, 128)))
    yield scratch / "model"
    shutil.rmtree(scratch)


@pytest.mark.parametrize(("promise", "limit"), [("3GiB", 3 * GIB), ("2GiB", 2 * GIB)])
def test_two_layers_of_8b(promise: str, limit: int, model: Path) -> None:
    out = model.with_name("out")
    octavo = Path(sys.executable).with_name("octavo")
    options = (
        f"--calib {model.with_name('ids.npy')} --max-memory {promise} --json --quiet --overwrite"
    )
    how, ran = limited([octavo, "quantize", model, "-o", out, *options.split()], limit)
    assert ran.returncode == 0, f"under {how}: {ran.stderr}"
    assert json.loads(ran.stdout)["peak_memory"] <= limit


def test_too_little_is_refused_with_what_it_would_take(model: Path) -> None:
    octavo = Path(sys.executable).with_name("octavo")
    out = model.with_name("refused")
    options = f"--calib {model.with_name('ids.npy')} --max-memory 700MB"
    _, ran = limited([octavo, "quantize", model, "-o", out, *options.split()], 3 * GIB)
    assert ran.returncode == 2
    assert "this run takes" in ran.stderr
    assert not list(model.parent.glob(".refused*"))
