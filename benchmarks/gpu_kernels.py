"""The kernels of the embedded engine's GPU path against their references, on random numbers.

On a GPU as compiled; on a CPU by Triton's interpreter (set TRITON_INTERPRET=1).

Usage: python -m benchmarks.gpu_kernels [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.engines.torch.batch import BLOCK
from octavo.fp8 import E4M3

Results = tuple[Tensor, ...]

# Heads, heads of keys, channels of a head: no group, groups, a group that is no power of two, narrow heads.
_HEADS = ((4, 4, 64), (8, 2, 128), (7, 1, 64), (4, 2, 16), (6, 2, 96))


def check(device: torch.device) -> dict[str, float]:
    """The largest difference of each kernel from its reference, in steps of BF16 or E4M3 at the numbers' size.

    Raises:
        AssertionError: it is more than two steps: weights of attention are BF16 in products.
    """
    from octavo.engines.torch.gpu import kernels, reference

    found: dict[str, float] = {}
    for name, case in _cases(device):
        results = [case(getattr(module, name)) for module in (kernels, reference)]
        differences = [_steps(one, other) for one, other in zip(*results, strict=True)]
        found[name] = max(found.get(name, 0.0), *differences)
        assert found[name] <= 2, f"{name} is {found[name]:.2f} steps from its reference"
    return found


def _steps(one: Tensor, other: Tensor) -> float:
    """Difference in steps of the coarser of the larger number's binade and a tenth of the largest one's."""
    assert one.dtype == other.dtype
    bits = 8 if one.dtype == torch.bfloat16 else 4
    wide = other.float().abs()
    step = torch.maximum(wide, wide.max() / 10).log2().floor().exp2() * 2.0 ** (1 - bits)
    return ((one.float() - other.float()).abs() / step).max().item()


def _call(arguments: tuple[Any, ...], kernel: Any) -> Results:
    return (kernel(*arguments),)


def _cases(device: torch.device) -> Iterator[tuple[str, Callable[[Any], Results]]]:
    """Names of kernels, and what to do with each."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).bfloat16()

    def number(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    rows, scales = normal(5, 100) * 30, (None, number(0.02))
    yield "quantize", partial(_call, (rows * 10, number(3.0)))
    for scale in scales:
        gated = normal(5, 100) * 3, normal(5, 100), scale
        yield "silu_mul", partial(_call, gated)
        for update in (None, normal(5, 100)):
            weight = normal(100)

            def norm(kernel: Any, s: Any = scale, u: Any = update, w: Any = weight) -> Results:
                hidden = rows.clone()
                return kernel(hidden, u, w, 1e-5, s), hidden

            yield "add_rms_norm", norm
    for (heads, kv_heads, size), dtype in itertools.product(_HEADS, (torch.bfloat16, E4M3)):
        yield from _with_cache(normal, heads, kv_heads, size, dtype, device)


def _with_cache(
    normal: Callable[..., Tensor],
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, Callable[[Any], Results]]]:
    """Kernels that use the cache: three sequences in scattered blocks, of 1, 70 and 200 tokens."""
    most, ends = 13, torch.tensor([1, 70, 200], device=device)
    count = 3 * most
    tables = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    tables = tables.view(3, most).to(device)
    scales = (0.03, 0.02) if dtype == E4M3 else (1.0, 1.0)
    sizes = (count, kv_heads, BLOCK, size)
    stored = tuple((normal(*sizes) / scale).to(dtype) for scale in scales)
    queries, positions = normal(3, heads, size), ends - 1
    for window in (1000, 50):
        asked = queries, stored, tables, positions, window, scales
        yield "decode_attention", partial(_call, asked)
    keys, values = normal(3, kv_heads, size), normal(3, kv_heads, size)
    angles = torch.rand(200, size // 2, device=device) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    sequences = torch.tensor([2, 0, 1], device=device)

    def store(kernel: Any) -> Results:
        own = tuple(torch.zeros_like(one) for one in stored)
        rotated = kernel(
            *(queries, keys, values, cos, sin, own, tables, sequences, positions, scales)
        )
        return rotated, *own

    yield "rotate_and_store", store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No GPU that PyTorch can use: nothing is checked.")
        return
    for name, steps in check(device).items():
        print(f"{name}: at most {steps:.3f} steps from its reference", flush=True)


if __name__ == "__main__":
    main()
