"""A plugin for vLLM: lets its CPU build run FP8 checkpoints (entry point ``vllm.general_plugins``).

vLLM calls :func:`register` in every process it starts. In its build for CPUs, the operators that cast
to FP8 are names with nothing behind them. What a checkpoint with static, per-token or per-channel
scales needs of them is supplied here, in plain PyTorch: correct, for tests and comparisons, not fast.
An operator that works is left alone, and so is every build for another device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_fake

# It has no types.
_Library: Any = Library

_E4M3_MAX = 448.0
# The smallest dynamic scale vLLM uses, for rows of zeros.
_MIN_SCALE = 1 / (_E4M3_MAX * 512)


def static_scaled_fp8_quant(
    result: Tensor, input: Tensor, scale: Tensor, group_shape: list[int] | None = None
) -> None:
    """Divide by a scale, saturate at ±448, round to nearest even.

    Args:
        result: written; ``float8_e4m3fn`` ``[at least rows, columns]``, padding rows are left as they are.
        input: any floating dtype, ``[rows, columns]``.
        scale: float32, one value.
        group_shape: what the scale covers; of no consequence for one value.

    Raises:
        NotImplementedError: more than one scale, which no checkpoint on a CPU asks for.
    """
    if scale.numel() != 1:
        raise NotImplementedError(
            f"Octavo's plugin casts to FP8 with one static scale, found {list(scale.shape)}."
        )
    result[: len(input)].copy_(_saturated(input.float() / scale))


def dynamic_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    """Cast with the tensor's own scale, ``amax / 448``, and give it out.

    Args:
        result: as in :func:`static_scaled_fp8_quant`.
        input: any floating dtype, ``[rows, columns]``.
        scale: written; float32 ``[1]``.
    """
    scale.copy_((input.abs().amax().float() / _E4M3_MAX).clamp_min(_MIN_SCALE))
    static_scaled_fp8_quant(result, input, scale)


def dynamic_per_token_scaled_fp8_quant(
    result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None = None
) -> None:
    """Cast each row with its own scale, ``amax / 448``, and give them out.

    Args:
        result: as in :func:`static_scaled_fp8_quant`.
        input: any floating dtype, ``[rows, columns]``.
        scale: written; float32 ``[at least rows, 1]``.
        scale_ub: float32, one value: no larger ``amax`` is used.
    """
    amax = input.abs().amax(dim=-1, keepdim=True).float()
    if scale_ub is not None:
        amax = amax.minimum(scale_ub)
    scales = (amax / _E4M3_MAX).clamp_min(_MIN_SCALE)
    scale[: len(input)].copy_(scales)
    result[: len(input)].copy_(_saturated(input.float() / scales))


def silu_and_mul_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    """``silu(gate) · up`` in float32, cast with a static scale.

    Args:
        result: written; ``float8_e4m3fn`` ``[..., columns]``.
        input: any floating dtype, ``[..., 2 · columns]``: the gate, then the other half.
        scale: float32, one value.
    """
    gate, up = input.float().chunk(2, dim=-1)
    result.copy_(_saturated(torch.nn.functional.silu(gate).mul_(up).div_(scale)))


def scaled_mm(
    mat1: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``torch._scaled_mm`` for E4M3 matrices, which are BF16 matrices too; sums are in float32.

    Args:
        mat1: ``float8_e4m3fn`` ``[rows, inner]``.
        mat2: ``float8_e4m3fn`` ``[inner, columns]``.
        scale_a: float32, one value or ``[rows, 1]``.
        scale_b: float32, one value or ``[1, columns]``.
        bias: ``[columns]``.
        scale_result: of results in FP8, which are none here.
        out_dtype: the result's.
        use_fast_accum: of no consequence on a CPU.
    """
    dtype = out_dtype or torch.float32
    # Products that are BF16 in the end may be so from the start.
    inner = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    inputs, weight = mat1.to(inner), mat2.to(inner)
    if scale_a.numel() == scale_b.numel() == 1:
        # Applied to the float32 sums.
        added = inputs.new_zeros(()) if bias is None else bias.to(inner)
        factor = (scale_a * scale_b).item()
        return torch.addmm(added, inputs, weight, beta=bias is not None, alpha=factor).to(dtype)
    product = (inputs @ weight).float().mul_(scale_a).mul_(scale_b)
    if bias is not None:
        product.add_(bias)
    return product.to(dtype)


def scaled_mm_out(*args: Any, out: Tensor, **options: Any) -> Tensor:
    """:func:`scaled_mm` into ``out``, which is what a compiled model calls."""
    return out.copy_(scaled_mm(*args, **options))


def _saturated(values: Tensor) -> Tensor:
    """Within ±448, in place: beyond, the cast itself would give NaN."""
    return values.clamp_(-_E4M3_MAX, _E4M3_MAX)


class Operator(NamedTuple):
    """An operator of vLLM's.

    Attributes:
        signature: as vLLM's builds for GPUs register it.
        kernel: what takes its place.
    """

    signature: str
    kernel: Callable[..., None]


OPERATORS = {
    "static_scaled_fp8_quant": Operator(
        "(Tensor(a!) result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()",
        static_scaled_fp8_quant,
    ),
    "dynamic_scaled_fp8_quant": Operator(
        "(Tensor(a!) result, Tensor input, Tensor(b!) scale) -> ()", dynamic_scaled_fp8_quant
    ),
    "dynamic_per_token_scaled_fp8_quant": Operator(
        "(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub=None) -> ()",
        dynamic_per_token_scaled_fp8_quant,
    ),
    "silu_and_mul_quant": Operator(
        "(Tensor(a!) result, Tensor input, Tensor scale) -> ()", silu_and_mul_quant
    ),
}


@cache  # vLLM may call it more than once in a process
def register() -> tuple[Any, ...]:
    """The entry point: supply what vLLM's build for CPUs lacks; on other devices, do nothing.

    Returns:
        What keeps the operators registered, empty where nothing was supplied.
    """
    platform: Any = import_module("vllm.platforms").current_platform
    if not platform.is_cpu():
        return ()
    platform.import_kernels()
    operators = supply(OPERATORS, "_C")
    return (operators, replace_scaled_mm()) if has_slow_scaled_mm() else (operators,)


def supply(operators: Mapping[str, Operator], namespace: str) -> Any:
    """Put a kernel behind each operator that has none on the CPU.

    Those that are not registered at all, or with a signature that takes no arguments as a
    placeholder, get an overload with the right one.

    Args:
        operators: by name.
        namespace: of ``torch.ops``, where vLLM looks them up.

    Returns:
        What keeps them registered.
    """
    library = _Library(namespace, "FRAGMENT")
    for name, operator in operators.items():
        if not is_supplied(f"{namespace}::{name}"):
            overload = f"{name}.octavo"
            library.define(f"{overload}{operator.signature}")
            library.impl(overload, operator.kernel, "CPU")
            register_fake(f"{namespace}::{overload}", _traced, lib=library)
            # Looked up before, the name would go on without the overload.
            vars(getattr(torch.ops, namespace)).pop(name, None)
    return library


def _traced(*_: Any) -> None:
    """What an operator does while a model is compiled: it gives nothing out."""


def is_supplied(operator: str) -> bool:
    """Whether a call of ``operator``, ``namespace::name``, with arguments runs on the CPU."""
    return any(
        schema.arguments
        and torch._C._dispatch_has_computed_kernel_for_dispatch_key(
            ".".join(filter(None, (operator, schema.overload_name))), "CPU"
        )
        for schema in torch._C._jit_get_schemas_for_operator(operator)
    )


def has_slow_scaled_mm() -> bool:
    """Whether :func:`scaled_mm` is faster than ``torch._scaled_mm`` on this CPU.

    With AMX-FP16 oneDNN multiplies FP8. With AMX alone PyTorch still hands it the matrices, for its reference to
    multiply: some 90 ns for each multiplication, half a minute for a small layer. Without AMX PyTorch computes in
    float32, which takes more than twice as long.
    """
    return not torch.cpu._is_amx_fp16_supported()


def replace_scaled_mm() -> Any:
    """Let :func:`scaled_mm` take the place of PyTorch's on the CPU."""
    library = _Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced: it is meant
        library.impl("_scaled_mm", scaled_mm, "CPU")
        library.impl("_scaled_mm.out", scaled_mm_out, "CPU")
    return library
