"""What rounding does to the inputs of linear layers, on the tokens that pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo.linear import Fp8Linear

# Elements at a time: a few megabytes in float64.
_ELEMENTS = 1 << 19


class InputError(NamedTuple):
    """What rounding to E4M3 did to a linear layer's inputs.

    Attributes:
        sqnr_db: signal to quantization noise, ``10 log10(Σ x² / Σ (x - x̂)²)``; None without noise.
        underflow: share of all values that became zero without being zero.
        clipped: share of all values beyond the amax of calibration; 0 where scales are dynamic.
    """

    sqnr_db: float | None
    underflow: float
    clipped: float


class InputErrors:
    """Sums over forward passes, in float64. Passes may run in several threads: no result depends on
    their order."""

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[tuple[float, ...]]] = defaultdict(list)

    @contextmanager
    def watch(
        self,
        linears: Mapping[str, nn.Module],
        rounding: Mapping[str, Fp8Linear],
        maxima: Mapping[str, Tensor],
    ) -> Iterator[None]:
        """Measure the inputs of ``linears`` inside the context.

        Args:
            linears: modules that run, by name.
            rounding: what would take their places.
            maxima: amax of their inputs, float32 scalars, where that is what scales are taken from.
        """

        def hook(name: str) -> Callable[[], None]:
            limit = maxima[name].item() if name in maxima else math.inf

            def measure(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._seen[name].append(_sums(args[0], rounding[name], limit))

            return linears[name].register_forward_pre_hook(measure).remove

        with ExitStack() as hooks:
            for name in linears:
                hooks.callback(hook(name))
            yield

    def result(self) -> dict[str, InputError]:
        """By name of the linear layer."""
        found = {}
        for name, parts in self._seen.items():
            # Correctly rounded, whatever the order.
            signal, noise, underflows, clipped, count = map(math.fsum, zip(*parts, strict=True))
            sqnr = 10 * math.log10(signal / noise) if noise else None
            found[name] = InputError(sqnr, underflows / count, clipped / count)
        return found


def _sums(x: Tensor, linear: Fp8Linear, limit: float) -> tuple[float, ...]:
    """Of inputs ``[..., in]``: signal, noise, values that became zero or are clipped, all values."""
    rows = x.reshape(-1, x.shape[-1])
    total = torch.zeros(4, dtype=torch.float64, device=x.device)
    for part in torch.split(rows, max(1, _ELEMENTS // rows.shape[1])):
        exact, left = part.double(), linear.rounded_input(part).double()
        total += torch.stack(
            [
                exact.square().sum(),
                (exact - left).square_().sum(),
                ((left == 0) & (exact != 0)).sum().double(),
                (exact.abs() > limit).sum().double(),
            ]
        )
    return (*total.tolist(), float(rows.numel()))
