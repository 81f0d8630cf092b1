"""Fused kernels while any engine computes.

``fused_kernels`` swaps a function of the module that defines a model's layers, so contexts must be
left in the reverse of the order they were entered in. Engines that compute at the same time end as
they please; hence one stack for the process, taken down when the last of them is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from octavo.fused import fused_kernels

_lock = threading.Lock()
_stack = ExitStack()
_fused: set[nn.Module] = set()
_users = 0


@contextmanager
def fused(layers: nn.ModuleList) -> Iterator[None]:
    """Run ``layers`` on fused kernels inside the context."""
    global _users
    with _lock:
        _users += 1
        for layer in layers:
            if layer not in _fused:
                _stack.enter_context(fused_kernels(layer))
                _fused.add(layer)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _fused.clear()
                _stack.close()
