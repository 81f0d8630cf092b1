"""How a checkpoint is run: token ids in, log-probabilities or tokens out.

An engine is a module with a function ``start(model, device)`` and a line in :data:`ENGINES`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from octavo.engines.engine import Engine, TokenIds, TokenScores
from octavo.errors import OctavoError

ENGINES = {
    "torch": "octavo.engines.torch",
    "vllm": "octavo.engines.vllm",
}


def open_engine(name: str, model: Path, device: str = "auto") -> Engine:
    """Start an engine on a checkpoint.

    Args:
        name: a key of :data:`ENGINES`.
        model: the checkpoint directory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        OctavoError: no such engine, it is not installed, or it cannot open the checkpoint.
    """
    if name not in ENGINES:
        raise OctavoError(f"Unknown engine {name!r}. Expected one of {', '.join(ENGINES)}.")
    engine: Engine = import_module(ENGINES[name]).start(model, device)
    return engine


__all__ = ["ENGINES", "Engine", "TokenIds", "TokenScores", "open_engine"]
