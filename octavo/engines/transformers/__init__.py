"""The engine that evaluates: :func:`octavo.loading.load`'s model, whole windows at a time."""

from __future__ import annotations

from pathlib import Path

from octavo.engines.transformers.engine import TransformersEngine
from octavo.loading import load


def start(model: Path, device: str) -> TransformersEngine:
    """Load the checkpoint in directory ``model`` onto ``device``."""
    loaded, _ = load(model, device)
    return TransformersEngine(loaded)


__all__ = ["TransformersEngine", "start"]
