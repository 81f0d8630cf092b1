"""The embedded engine: :func:`octavo.loading.load`'s model, run by PyTorch."""

from __future__ import annotations

from pathlib import Path

from octavo.engines.torch.engine import TorchEngine
from octavo.loading import load


def start(model: Path, device: str) -> TorchEngine:
    """Load the checkpoint in directory ``model`` onto ``device``."""
    loaded, _ = load(model, device)
    return TorchEngine(loaded)


__all__ = ["TorchEngine", "start"]
