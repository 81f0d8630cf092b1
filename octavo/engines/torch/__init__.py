"""The embedded engine: a decoder of our own, a scheduler, and the thread they run in. It knows token ids only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from octavo.engines.torch.batch import BLOCK, Model
from octavo.engines.torch.request import Output, Request, Sampling
from octavo.engines.torch.runner import DrainingError, QueueFullError, Runner
from octavo.errors import OctavoError
from octavo.preflight import pick_device

if TYPE_CHECKING:
    from octavo.engines.torch.decoder import CpuDecoder
    from octavo.engines.torch.engine import TorchEngine
    from octavo.engines.torch.gpu.decoder import GpuDecoder


class _Room(NamedTuple):
    """What the engine takes of a kind of device unless told.

    Attributes:
        cache: share of the memory that is left; the rest is for other programs, and for what is computed.
        running: sequences computed at the same time.
        tokens: of a batch.
    """

    cache: float
    running: int
    tokens: int


# A GPU reads its weights so fast that only large batches keep it busy.
_ROOMS = {"cpu": _Room(0.25, 64, 512), "cuda": _Room(0.85, 256, 4096)}


def open_model(directory: Path, device: str = "auto") -> CpuDecoder | GpuDecoder:
    """Read a checkpoint, BF16 or FP8 in any dialect.

    Args:
        directory: where it is.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        OctavoError: not a model the embedded engine computes, or there is no such device.
    """
    chosen = pick_device(device)
    if chosen.type == "cpu":
        from octavo.engines.torch.decoder import open_decoder

        return open_decoder(directory)
    from octavo.engines.torch.gpu import decoder

    return decoder.open_decoder(directory, chosen)


def open_runner(
    directory: Path,
    device: str = "auto",
    *,
    kv_cache_memory: int | None = None,
    max_running: int | None = None,
    max_tokens: int | None = None,
    max_waiting: int = 1024,
) -> Runner:
    """Read a checkpoint, and have requests computed.

    Args:
        directory: where it is.
        device: see :func:`open_model`.
        kv_cache_memory: bytes of the cache; by default as much as all running sequences can use, up to a
            quarter of the memory that is left, or 85 % of a GPU's.
        max_running: sequences that are computed at the same time; by default 64, on a GPU 256.
        max_tokens: of a batch; by default 512, on a GPU 4096.
        max_waiting: requests that may wait.

    Raises:
        OctavoError: see :func:`open_model`; or the cache would not hold a block.
    """
    model = open_model(directory, device)
    room = _ROOMS[model.device.type]
    max_running, max_tokens = max_running or room.running, max_tokens or room.tokens
    nbytes = BLOCK * model.cached_bytes
    if kv_cache_memory is None:
        useful = max_running * -(-model.max_positions // BLOCK)
        blocks = max(1, min(useful, int(room.cache * _free_memory(model.device)) // nbytes))
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


def _free_memory(device: torch.device) -> int:
    """Bytes that no program uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
