"""The embedded engine: a decoder of our own, a scheduler, and the thread they run in. It knows token ids only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.engines.torch.batch import BLOCK, Model
from octavo.engines.torch.request import Output, Request, Sampling
from octavo.engines.torch.runner import DrainingError, QueueFullError, Runner
from octavo.errors import OctavoError
from octavo.preflight import pick_device

if TYPE_CHECKING:
    from octavo.engines.torch.decoder import CpuDecoder
    from octavo.engines.torch.engine import TorchEngine

# Of the memory that is left, what the cache takes unless told: the rest is for the machine's other programs.
_CACHE_SHARE = 0.25


def open_model(directory: Path, device: str = "auto") -> CpuDecoder:
    """Read a checkpoint, BF16 or FP8 in any dialect.

    Args:
        directory: where it is.
        device: ``auto`` or ``cpu``.

    Raises:
        OctavoError: not a model the embedded engine computes, or not on this device.
    """
    from octavo.engines.torch.decoder import open_decoder

    if device != "auto" and pick_device(device).type != "cpu":
        raise OctavoError(
            f"The embedded engine computes on CPUs; the device asked for is {device}. Serve on a GPU with "
            "--engine vllm, or pass --device cpu."
        )
    return open_decoder(directory)


def open_runner(
    directory: Path,
    device: str = "auto",
    *,
    kv_cache_memory: int | None = None,
    max_running: int = 64,
    max_tokens: int = 512,
    max_waiting: int = 1024,
) -> Runner:
    """Read a checkpoint, and have requests computed.

    Args:
        directory: where it is.
        device: see :func:`open_model`.
        kv_cache_memory: bytes of the cache; by default as much as all running sequences can use, up to a
            quarter of the memory that is left.
        max_running: sequences that are computed at the same time.
        max_tokens: of a batch.
        max_waiting: requests that may wait.

    Raises:
        OctavoError: see :func:`open_model`; or the cache would not hold a block.
    """
    model = open_model(directory, device)
    nbytes = BLOCK * model.cached_bytes
    if kv_cache_memory is None:
        left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        useful = max_running * -(-model.max_positions // BLOCK)
        blocks = max(1, min(useful, int(_CACHE_SHARE * left) // nbytes))
    else:
        blocks = kv_cache_memory // nbytes
    if not blocks:
        model.close()
        raise OctavoError(
            f"A cache of {kv_cache_memory} bytes holds no block of {BLOCK} tokens, which takes {nbytes} "
            "with this model. Allow more with --kv-cache-memory."
        )
    return Runner(
        model,
        blocks=blocks,
        max_running=max_running,
        max_tokens=max_tokens,
        max_waiting=max_waiting,
    )


def start(model: Path, device: str) -> TorchEngine:
    """Open the checkpoint in directory ``model`` for evaluations."""
    from octavo.engines.torch.engine import TorchEngine

    return TorchEngine(open_model(model, device))


__all__ = [
    "BLOCK",
    "DrainingError",
    "Model",
    "Output",
    "QueueFullError",
    "Request",
    "Runner",
    "Sampling",
    "open_model",
    "open_runner",
    "start",
]
