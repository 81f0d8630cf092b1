"""SmolLM2-135M-Instruct: Octavo's editions and the reference tools', loaded by the dialects' owners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden import rebuild
from octavo import Calibration, load, quantize
from octavo.scheme import scheme_called
from peers.comparing import check_weights, fp8_linears, from_pretrained

pytestmark = pytest.mark.peer


@pytest.fixture
def owner(dialect: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(dialect.replace("-", "_"))


def nll(model: Any, windows: Tensor) -> float:
    """Mean negative log-likelihood in nats."""
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:])
            for row in windows
        ]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize(("kind", "kv_cache"), [("fp8", "fp8"), ("fp8-dynamic", "none")])
@pytest.mark.parametrize("dialect", ["quark", "compressed-tensors"])
def test_perplexity_is_octavo_s(
    dialect: str, kind: str, kv_cache: Any, owner: Any, sample: Path, golden: Path, tmp_path: Path
) -> None:
    """The owners divide and rescale in BF16, which moves codes: a window's loss by up to 2 %."""
    tokens = golden / "calib_tokens.npy"
    edition = tmp_path / "edition"
    quantize(
        sample,
        edition,
        scheme=scheme_called(kind, kv_cache=kv_cache),
        calibration=Calibration(source=str(tokens), samples=4, seq_len=256),
        format=dialect,
    )
    windows = torch.from_numpy(np.load(tokens)[16:18].astype(np.int64))
    found, expected = nll(from_pretrained(edition), windows), nll(load(edition)[0], windows)
    assert abs(found - expected) < 0.03


@pytest.mark.parametrize(
    ("dialect", "tool"),
    [("quark", "quark-0.13"), ("compressed-tensors", "llmcompressor-0.14.0.1")],
)
def test_octavo_reads_their_own_editions_as_they_do(
    dialect: str, tool: str, owner: Any, sample: Path, golden: Path, tmp_path: Path
) -> None:
    edition = rebuild(tool, sample, golden, tmp_path / "edition")
    peer, (ours, _) = from_pretrained(edition), load(edition)
    assert len(fp8_linears(ours)) == 210
    check_weights(peer, ours)
