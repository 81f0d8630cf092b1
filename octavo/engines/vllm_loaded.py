"""What vLLM really took of a checkpoint, asked of the process that holds the model.

An engine may read a config and keep less than it promises, without a word: inputs in BF16 on a device
without FP8 arithmetic, a KV cache in BF16. Hence nothing here is read from a config.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Each group of a probe has a scale of its own where inputs are scaled by group.
_GROUP = 128


class LoadedLinear(NamedTuple):
    """A linear layer, perhaps several of the checkpoint's fused into one.

    Attributes:
        name: vLLM's (``model.layers.0.self_attn.qkv_proj``).
        weight_dtype: of the weight in memory, as PyTorch names it (``float8_e4m3fn``).
        method: the class that loaded it (``ModelOptLinearMethod``).
        kernel: the class that computes the product; None where it is not quantized.
        rounds_inputs: whether the product is of inputs rounded to FP8, found by trying.
        static_inputs: whether it has a scale for them.
    """

    name: str
    weight_dtype: str
    method: str
    kernel: str | None
    rounds_inputs: bool
    static_inputs: bool


class LoadedCache(NamedTuple):
    """An attention block's KV cache.

    Attributes:
        block: vLLM's name of the attention block (``model.layers.0.self_attn``).
        dtype: vLLM's name of what the cache holds: ``fp8…``, or ``auto`` for the model's dtype.
        k_scale: what keys are divided by on their way into the cache; 1 in a cache that is not FP8.
        v_scale: likewise values.
    """

    block: str
    dtype: str
    k_scale: float
    v_scale: float


class LoadedModel(NamedTuple):
    """What vLLM holds of a checkpoint.

    Attributes:
        version: vLLM's.
        linears: its linear layers, in the model's order.
        caches: its attention blocks' caches, in the model's order.
    """

    version: str
    linears: tuple[LoadedLinear, ...]
    caches: tuple[LoadedCache, ...]


# How `vllm.LLM` is told of the class below.
WORKER_EXTENSION = f"{__name__}.WorkerExtension"


def read_loaded(llm: Any) -> LoadedModel:
    """Ask a ``vllm.LLM`` that was started with ``worker_extension_cls=WORKER_EXTENSION``.

    With tensor parallelism every worker holds a slice of the same layers, and the first one answers.
    """
    linears, caches = llm.collective_rpc("octavo_loaded")[0]
    version: str = import_module("vllm").__version__
    return LoadedModel(
        version,
        tuple(LoadedLinear(*one) for one in linears),
        tuple(LoadedCache(*one) for one in caches),
    )


class WorkerExtension:
    """Mixed into vLLM's worker, whose methods can be called from another process."""

    model_runner: Any

    def octavo_loaded(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """The fields of :class:`LoadedLinear` and :class:`LoadedCache`, for the way between processes."""
        linear: Any = import_module("vllm.model_executor.layers.linear").LinearBase
        attention: Any = import_module("vllm.model_executor.layers.attention").Attention
        modules = list(self.model_runner.model.named_modules())
        return (
            [tuple(_linear(name, one)) for name, one in modules if isinstance(one, linear)],
            [tuple(_cache(name, one)) for name, one in modules if isinstance(one, attention)],
        )


def _linear(name: str, layer: Any) -> LoadedLinear:
    # The object that computes belongs to the method, or to a scheme the method goes by.
    holders = (layer.quant_method, getattr(layer, "scheme", None))
    kernels = [getattr(one, name, None) for one in holders for name in ("fp8_linear", "kernel")]
    kernel = next(filter(None, kernels), None)
    return LoadedLinear(
        name,
        str(layer.weight.dtype).removeprefix("torch."),
        type(layer.quant_method).__name__,
        None if kernel is None else type(kernel).__name__,
        kernel is not None and _rounds_inputs(layer),
        getattr(layer, "input_scale", None) is not None,
    )


def _cache(name: str, layer: Any) -> LoadedCache:
    return LoadedCache(
        name.removesuffix(".attn"),
        layer.kv_cache_dtype,
        float(layer._k_scale_float),
        float(layer._v_scale_float),
    )


@torch.inference_mode()
def _rounds_inputs(layer: Any) -> bool:
    """Whether two inputs that are one in FP8 give one output.

    ``1`` and ``1 + 2⁻⁶`` times the scale are numbers that E4M3 does not tell apart, and BF16 does. Where
    inputs are scaled as they come, a 1.75 in each group makes the scale ``2⁻⁸`` for both.
    """
    scale = getattr(layer, "input_scale", None)
    step = 1.0 if scale is None else scale.float().max().item()
    outputs: list[Tensor] = []
    for value in (1, 1 + 2**-6):
        row = torch.full((1, layer.input_size_per_partition), value * step)
        row[:, ::_GROUP] = 1.75 * step
        x = row.to(layer.weight.device, layer.params_dtype)
        outputs.append(layer.quant_method.apply(layer, x, None))
    return torch.equal(*outputs)
