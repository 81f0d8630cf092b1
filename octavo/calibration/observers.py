"""Statistics of a decoder layer's linear inputs, keys and values, taken by forward hooks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from octavo.fused import tensor_amax


class AmaxObserver:
    """Maxima of absolute values over all forward passes inside its context.

    Passes may run in several threads: a maximum does not depend on the order of batches.
    """

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []

    def watch_input(self, name: str, linear: nn.Module) -> None:
        """Measure the input of ``linear`` under ``name``."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._seen[name].append(tensor_amax(args[0]))

        self._handles.append(linear.register_forward_pre_hook(hook))

    def watch_key_value(self, key_name: str, value_name: str, probe: nn.Module) -> None:
        """Measure the two arguments of a key-value probe."""

        def hook(_: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            self._seen[key_name].append(tensor_amax(args[0]))
            # As the projection wrote it, contiguous: a maximum does not depend on the order.
            self._seen[value_name].append(tensor_amax(args[1].transpose(1, 2)))

        self._handles.append(probe.register_forward_pre_hook(hook))

    def result(self) -> dict[str, Tensor]:
        """The maxima by name, float32 scalars on the CPU. NaN where any value was NaN."""
        # torch's maximum hands NaN on, so a broken forward pass cannot hide.
        return {name: torch.stack(values).amax().cpu() for name, values in self._seen.items()}

    def __enter__(self) -> AmaxObserver:
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
