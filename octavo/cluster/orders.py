"""What each worker of a run is told, decided before any is asked for."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from octavo.calibration import BATCH_TOKENS, HiddenShape, batches_at_once
from octavo.checkpoint import Checkpoint, Workspace
from octavo.errors import OctavoError
from octavo.job import Job, hidden_shape, layer_shape
from octavo.memory import PROGRAM, Settings, hold_more
from octavo.preflight import pick_device
from octavo.scheme import Scheme

# Batches a worker asks for ahead, for each that it computes at a time.
AHEAD = 2

# Of a worker's GPU, where the driver has none to ask; how much of a GPU layers and batches may take.
_GPU_BYTES = 80_000_000_000
GPU_SHARE = 0.85

# What Ray's own code and threads take of a worker. Measured: 71 to 83 MB.
_RAY = 100_000_000

# Pieces of a weight file that stand for all of it, and their bytes.
_PIECES, _PIECE_BYTES = 8, 4096


class Order(NamedTuple):
    """One stage of a run, as its worker is told.

    Attributes:
        number: of the stage, from 0.
        stages: how many there are.
        model: the checkpoint's directory, on every machine.
        target: the output, on the driver's machine.
        machine: the driver's, by name.
        directory: where it is made there; a worker that does not see it uses the same path of its own.
        mark: a file in it, to tell whether a worker sees it.
        resumed: whether it holds what an earlier run has finished.
        scheme: what is quantized and how.
        format: a dialect's name.
        device: ``cpu`` or ``cuda``.
        threads: of the worker.
        limited: whether no more threads may be given to it, for the memory they take.
        passes: numbers of the layers of each pass.
        settings: how memory is used.
        shape: of the hidden states; None without calibration.
        tokens: the samples, for the first stage.
        shard_size: as for the whole edition.
        files: what stands for the content of each of the checkpoint's files.
        begin: what the stage's results depend on; a journal that began otherwise is not its own.
    """

    number: int
    stages: int
    model: Path
    target: Path
    machine: str
    directory: Path
    mark: str
    resumed: bool
    scheme: Scheme
    format: str
    device: str
    threads: int
    limited: bool
    passes: list[list[int]]
    settings: Settings
    shape: HiddenShape | None
    tokens: Tensor | None
    shard_size: int
    files: dict[str, str]
    begin: dict[str, Any]

    @property
    def at_once(self) -> int:
        """Batches that the worker computes at a time."""
        return batches_at_once(torch.device(self.device), min(self.threads, self.settings.workers))

    @property
    def home(self) -> Path:
        """What is only the stage's: its journal and hidden states."""
        return self.directory / f"stage-{self.number}"

    @property
    def lock(self) -> Path:
        """Locked by the one process that does the stage. Not in its directory, which may be removed."""
        return self.directory / f"stage-{self.number}.lock"


def make_orders(
    job: Job,
    tokens: Tensor | None,
    settings: Settings,
    device: str,
    workers: int,
    work: Workspace,
    shard_size: int,
    begin: Mapping[str, Any],
    *,
    limited: bool,
) -> list[Order]:
    """What each worker is told.

    Args:
        job: as the driver has opened it.
        tokens: the calibration samples.
        settings: how memory is used.
        device: ``cpu`` or ``cuda``.
        workers: how many.
        work: where the edition is made.
        shard_size: bytes of tensors in one file, at most.
        begin: what the results depend on.
        limited: whether the user has said what memory they may take.

    Raises:
        OctavoError: the model has fewer layers than that.
    """
    stages = split(len(job.plans), workers)
    (work.directory / (mark := f"mark-{uuid.uuid4().hex}")).touch()
    orders = []
    for number, layers in enumerate(stages):
        passes = passes_of(layers, settings.held)
        orders.append(
            Order(
                number=number,
                stages=workers,
                model=job.checkpoint.directory.resolve(),
                target=work.target.resolve(),
                machine=socket.gethostname(),
                directory=work.directory.resolve(),
                mark=mark,
                resumed=work.resumed,
                scheme=job.scheme,
                format=job.format,
                device=device,
                threads=worker_threads(workers),
                limited=limited,
                passes=passes,
                settings=settings,
                shape=None if tokens is None else hidden_shape(job, tokens, settings),
                tokens=None if number else tokens,
                shard_size=shard_size,
                files=files_of(job.checkpoint),
                begin={**begin, "passes": passes},
            )
        )
    return orders


def worker_device(device: str) -> str:
    """The kind of device of every worker; the driver needs none."""
    return "cuda" if device.startswith("cuda") else pick_device(device).type


def worker_threads(workers: int) -> int:
    """Threads of each worker, where they share this machine."""
    return max(1, torch.get_num_threads() // workers)


def split(layers: int, workers: int) -> list[list[int]]:
    """The layers of each worker: contiguous runs, as equal as can be."""
    if workers > layers:
        raise OctavoError(
            f"--workers {workers} is more than the model has decoder layers ({layers}). Ask for {layers} at most."
        )
    ends = [layers * number // workers for number in range(workers + 1)]
    return [list(range(*pair)) for pair in pairwise(ends)]


def passes_of(layers: Sequence[int], size: int) -> list[list[int]]:
    """A worker's layers in as few passes as hold ``size`` each, at most; all of about the same size."""
    parts = split(len(layers), -(-len(layers) // size))
    return [[layers[place] for place in part] for part in parts]


def worker_memory(job: Job, seq_len: int, device: str, workers: int) -> int:
    """Bytes that a worker's process itself takes: with Ray's code, and with batches on their way in and out
    in its store. Not measured, so that a resumed run holds as many layers as the one before."""
    batch = max(BATCH_TOKENS[device], seq_len) * job.decoder.config.hidden_size
    ahead = AHEAD * batches_at_once(torch.device(device), worker_threads(workers))
    way = 2 * ahead * int(batch) * job.decoder.dtype.itemsize
    return PROGRAM + _RAY + way


def hold_layers(
    job: Job,
    settings: Settings,
    shape: Sequence[int],
    device: str,
    workers: int,
    limit: int | None,
) -> Settings:
    """The same settings, with as many layers held by a worker at a time as fit.

    Args:
        job: the model.
        settings: which hold one.
        shape: of the calibration samples.
        device: ``cpu`` or ``cuda``.
        workers: how many there are.
        limit: bytes that each may take of its device's memory; None for what is usual.
    """
    if job.scheme.rounding != "nearest":
        # All samples run through each layer several times before any gets to the next.
        return settings
    more = hold_more(
        layer_shape(job),
        settings,
        limit or _memory_of_one(device, workers),
        samples=shape[0],
        seq_len=shape[1],
        layers=-(-len(job.plans) // workers),
        program=worker_memory(job, shape[1], device, workers),
    )
    # The layers are in a GPU's memory, the rest of the settings is about the host's.
    return settings._replace(held=more.held) if device == "cuda" else more


def _memory_of_one(device: str, workers: int) -> int:
    """Bytes a worker may take if nothing else was said: of a GPU most, of a machine's memory its share
    of one half."""
    if device == "cuda":
        known = torch.cuda.is_available()
        whole = torch.cuda.get_device_properties(0).total_memory if known else _GPU_BYTES
        return int(whole * GPU_SHARE)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // workers


def files_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What stands for the content of each file of a checkpoint, by name: its size, and a digest of pieces of it.
    The same on every machine, and another for other weights of the same shapes."""
    paths = [checkpoint.directory / "config.json", *checkpoint.files]
    return {path.name: _fingerprint(path) for path in paths}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        for number in range(_PIECES):
            hasher.update(os.pread(file.fileno(), _PIECE_BYTES, size * number // _PIECES))
    return f"{size} bytes, {hasher.hexdigest()}"
