"""One core, one piece of work: instead of PyTorch's threads inside each operation, ours around many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Inside, every operation of PyTorch on a CPU runs on the thread that calls it, in threads made there too.

    Operations then never wait for each other, and no sum depends on how many cores there are.

    Yields:
        How many threads PyTorch would have used: as many pieces of work may run at a time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
