"""Statistics of a decoder layer's linear inputs, keys and values, taken by forward hooks."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.calibration import ranges
from octavo.fused import tensor_amax
from octavo.scheme import Scales


class Observer:
    """Maxima of absolute values over all forward passes inside its context, and with other scales than ``amax``
    how often each magnitude occurred.

    Passes may run in several threads: neither depends on the order of batches.
    """

    def __init__(self, scales: Scales = "amax") -> None:
        self._scales = scales
        self._seen: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._counts: dict[str, Tensor] = {}
        self._shared: dict[str, Sequence[str]] = {}
        self._adding = threading.Lock()
        self._handles: list[RemovableHandle] = []

    def watch_input(self, names: Sequence[str], linear: nn.Module) -> None:
        """Measure the input of ``linear``, which several linear layers share, under ``names``."""
        self._shared[names[0]] = names

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._look(names[0], args[0])

        self._handles.append(linear.register_forward_pre_hook(hook))

    def watch_key_value(self, key_name: str, value_name: str, probe: nn.Module) -> None:
        """Measure the two arguments of a key-value probe."""

        def hook(_: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            # As the projections wrote them, contiguous: no statistic depends on the order.
            for name, tensor in zip((key_name, value_name), args, strict=True):
                self._look(name, tensor, tensor.transpose(1, 2))

        self._handles.append(probe.register_forward_pre_hook(hook))

    def _look(self, name: str, tensor: Tensor, stored: Tensor | None = None) -> None:
        values = tensor if stored is None else stored
        known = hasattr(tensor, "octavo_amax")
        self._seen[name].append(tensor_amax(tensor if known else values))
        if self._scales == "amax":
            return
        counts = ranges.count(values)
        with self._adding:
            if name in self._counts:
                self._counts[name] += counts
            else:
                self._counts[name] = counts

    def maxima(self) -> dict[str, Tensor]:
        """The maxima by name, float32 scalars on the CPU. NaN where any value was NaN."""
        # torch's maximum hands NaN on, so a broken forward pass cannot hide.
        found = {name: torch.stack(values).amax().cpu() for name, values in self._seen.items()}
        return self._spread(found)

    def ranges(self) -> dict[str, Tensor]:
        """What scales are to be taken from, by name, float32 scalars on the CPU. All maxima must be finite."""
        maxima = self.maxima()
        chosen = {
            name: ranges.range_of(maxima[name], counts, self._scales)
            for name, counts in self._counts.items()
        }
        return maxima | self._spread(chosen)

    def _spread(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            each: value for name, value in found.items() for each in self._shared.get(name, [name])
        }

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
