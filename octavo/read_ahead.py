"""Checkpoint tensors, group by group, the next group read while one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint

# Tensors that are read at a time, each by a thread of its own: a disk serves several sooner than one after another.
_READS = 4


def read_groups(
    checkpoint: Checkpoint,
    groups: Sequence[Sequence[str]],
    device: torch.device,
    *,
    ahead: bool,
    waiting: Callable[[], AbstractContextManager[None]],
) -> Generator[dict[str, Tensor], None, None]:
    """The tensors of each group, on a device. They are valid until the next are asked for: on a CPU they lie in
    buffers that take turns.

    Args:
        checkpoint: where they are.
        groups: names of tensors.
        device: where they go.
        ahead: read the next group meanwhile, into memory of its own.
        waiting: entered while a group is waited for.
    """
    on_gpu, ahead = device.type == "cuda", ahead and len(groups) > 1
    if on_gpu:
        # One tensor at a time goes through it.
        size, count = max(checkpoint[name].nbytes for group in groups for name in group), 1
    else:
        size = max(sum(checkpoint[name].nbytes for name in group) for group in groups)
        count = 2 if ahead else 1
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(count)]

    def read(position: int) -> dict[str, Tensor]:
        rest, places = buffers[position % count], {}
        # Wide dtypes first keeps every tensor aligned.
        for name in sorted(groups[position], key=lambda name: -checkpoint[name].dtype.itemsize):
            nbytes = checkpoint[name].nbytes
            places[name] = rest[:nbytes]
            if not on_gpu:
                rest = rest[nbytes:]
        return dict(zip(places, files.map(fill, *zip(*places.items(), strict=True)), strict=True))

    def fill(name: str, place: Tensor) -> Tensor:
        tensor = checkpoint.read(name, place)
        return _upload(tensor, device) if on_gpu else tensor

    with (
        ThreadPoolExecutor(1, "octavo-read") as reads,
        ThreadPoolExecutor(1 if on_gpu else _READS, "octavo-file") as files,
    ):
        upcoming: Future[dict[str, Tensor]] | None = None
        for position in range(len(groups)):
            with waiting():
                tensors = (upcoming or reads.submit(read, position)).result()
            if ahead and position + 1 < len(groups):
                upcoming = reads.submit(read, position + 1)
            yield tensors


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the GPU, made on a stream of its own beside what is computed there."""
    new: Any = torch.cuda.Stream  # has no types
    stream = new(device)
    with torch.cuda.stream(stream):
        copy = tensor.to(device, non_blocking=True)
    stream.synchronize()
    # Its memory is handed out again only when what computes with it is done.
    copy.record_stream(torch.cuda.default_stream(device))
    return copy
