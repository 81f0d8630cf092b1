"""How a checkpoint is run: token ids in, log-probabilities or tokens out.

An engine is a module with a function ``start(model, device)`` and a line in :data:`ENGINES`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from octavo.engines.engine import DistributionEngine, Engine, TokenIds, TokenScores
from octavo.errors import OctavoError

ENGINES = {
    "transformers": "octavo.engines.transformers",
    "torch": "octavo.engines.torch",
    "vllm": "octavo.engines.vllm",
}


def check_engine(name: str) -> None:
    """Raise unless there is an engine of this name, and what it needs is installed.

    Raises:
        OctavoError: says which there are, or how to install it.
    """
    if name not in ENGINES:
        raise OctavoError(f"Unknown engine {name!r}. Expected one of {', '.join(ENGINES)}.")
    if name == "vllm" and find_spec("vllm") is None:
        raise OctavoError(
            "The engine vllm is not installed. Install it with `pip install vllm`, or use the engine "
            "transformers (--engine transformers), which needs nothing more."
        )


def open_engine(name: str, model: Path, device: str = "auto") -> Engine:
    """Start an engine on a checkpoint.

    Args:
        name: a key of :data:`ENGINES`.
        model: the checkpoint directory.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        OctavoError: no such engine, it is not installed, or it cannot open the checkpoint.
    """
    check_engine(name)
    engine: Engine = import_module(ENGINES[name]).start(model, device)
    return engine


__all__ = [
    "ENGINES",
    "DistributionEngine",
    "Engine",
    "TokenIds",
    "TokenScores",
    "check_engine",
    "open_engine",
]
