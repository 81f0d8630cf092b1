"""Statistics of a decoder layer's linear inputs, keys and values, taken by forward hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo import fp8


class AmaxObserver:
    """Running maxima of absolute values.

    Use as a context manager around the forward passes; the statistics are in :meth:`result`
    afterwards. A maximum does not depend on the order or size of batches.
    """

    def __init__(self) -> None:
        self._maxima: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        # q, k and v share one input tensor, gate and up another: measure it once.
        self._last: tuple[Tensor, Tensor] | None = None

    def watch_input(self, name: str, linear: nn.Module) -> None:
        """Measure the input of ``linear`` under ``name``."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._update(name, self._amax(args[0]))

        self._handles.append(linear.register_forward_pre_hook(hook))

    def watch_key_value(self, key_name: str, value_name: str, probe: nn.Module) -> None:
        """Measure the two arguments of a key-value probe."""

        def hook(_: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            self._update(key_name, fp8.amax(args[0]))
            self._update(value_name, fp8.amax(args[1]))

        self._handles.append(probe.register_forward_pre_hook(hook))

    def result(self) -> dict[str, Tensor]:
        """The maxima by name, float32 scalars on the CPU."""
        return {name: value.cpu() for name, value in self._maxima.items()}

    def __enter__(self) -> AmaxObserver:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = None

    def _amax(self, tensor: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not tensor:
            self._last = (tensor, fp8.amax(tensor))
        return self._last[1]

    def _update(self, name: str, value: Tensor) -> None:
        known = self._maxima.get(name)
        # torch.maximum hands NaN on, so a broken forward pass cannot hide.
        self._maxima[name] = value if known is None else torch.maximum(known, value)
