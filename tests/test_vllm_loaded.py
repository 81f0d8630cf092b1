"""What is read off vLLM's worker, with stand-ins for its layers; `make test-vllm` asks vLLM itself."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.engines.vllm_loaded import (
    WORKER_EXTENSION,
    LoadedCache,
    LoadedLinear,
    WorkerExtension,
    read_loaded,
)
from reference import rounded

INPUTS = 300  # two groups of 128 and a part of one


class Linear(nn.Module):
    """As vLLM's ``LinearBase``."""

    def __init__(self, dtype: torch.dtype, method: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(16, INPUTS, generator=generator).to(dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.input_size_per_partition, self.params_dtype = INPUTS, torch.bfloat16
        self.quant_method = method


class Attention(nn.Module):
    """As vLLM's ``Attention``."""

    def __init__(self, dtype: str, k_scale: float, v_scale: float) -> None:
        super().__init__()
        self.kv_cache_dtype, self._k_scale_float, self._v_scale_float = dtype, k_scale, v_scale


class Method:
    """As vLLM's linear methods: ``through`` is what becomes of an input."""

    def __init__(self, through: Callable[[Tensor], Tensor], **kernel: Any) -> None:
        self.through = through
        vars(self).update(kernel)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        assert (x.dtype, x.shape, bias) == (torch.bfloat16, (1, INPUTS), None)
        product: Tensor = self.through(x).float() @ layer.weight.float().t()
        return product.bfloat16()


def per_token(x: Tensor) -> Tensor:
    return rounded(x, x.float().abs().amax(dim=-1, keepdim=True) / 448)


def per_group(x: Tensor) -> Tensor:
    return torch.cat([per_token(group) for group in torch.split(x, 128, dim=-1)], dim=-1)


def worker(**modules: nn.Module) -> WorkerExtension:
    extension, block = WorkerExtension(), nn.Module()
    for name, module in modules.items():
        block.add_module(name, module)
    extension.model_runner = SimpleNamespace(model=block)
    return extension


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = "vllm.model_executor.layers"
    names = ("vllm", "vllm.model_executor", layers, f"{layers}.linear", f"{layers}.attention")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules["vllm"].__version__ = "0.32.0"
    modules[f"{layers}.linear"].LinearBase = Linear
    modules[f"{layers}.attention"].Attention = Attention
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("through", "scale", "expected"),
    [
        (lambda x: rounded(x, torch.tensor(0.0321)), 0.0321, True),
        (lambda x: x, 0.0321, False),
        (per_token, None, True),
        (per_group, None, True),
        (lambda x: x, None, False),
    ],
    ids=["static", "static, ignored", "per token", "per group", "not at all"],
)
def test_whether_inputs_are_rounded(
    through: Callable[[Tensor], Tensor], scale: float | None, expected: bool
) -> None:
    layer: Any = Linear(torch.float8_e4m3fn, Method(through, kernel=object()))
    layer.input_scale = None if scale is None else torch.tensor(scale)
    linears, _ = worker(layer=layer).octavo_loaded()
    assert LoadedLinear(*linears[0]).rounds_inputs is expected


def test_a_model() -> None:
    class Fp8LinearMethod(Method):
        pass

    class Kernel:
        pass

    scheme: Any = Linear(torch.float8_e4m3fn, Fp8LinearMethod(per_token))
    scheme.scheme = SimpleNamespace(fp8_linear=Kernel())
    method: Any = Linear(torch.float8_e4m3fn, Fp8LinearMethod(lambda x: x, fp8_linear=Kernel()))
    method.input_scale = torch.tensor(0.5)
    extension = worker(
        method=method,
        attn=Attention("fp8_e4m3", 0.25, 0.5),
        scheme=scheme,
        plain=Linear(torch.bfloat16, Method(lambda x: x)),
        norm=nn.LayerNorm(4),
    )
    calls = []

    def collective_rpc(name: str) -> list[Any]:
        calls.append(name)
        return [getattr(extension, name)()] * 2

    loaded = read_loaded(SimpleNamespace(collective_rpc=collective_rpc))
    assert calls == ["octavo_loaded"]
    assert loaded.version == "0.32.0"
    assert loaded.linears == (
        LoadedLinear("method", "float8_e4m3fn", "Fp8LinearMethod", "Kernel", False, True),
        LoadedLinear("scheme", "float8_e4m3fn", "Fp8LinearMethod", "Kernel", True, False),
        LoadedLinear("plain", "bfloat16", "Method", None, False, False),
    )
    assert loaded.caches == (LoadedCache("attn", "fp8_e4m3", 0.25, 0.5),)


def test_vllm_finds_the_extension() -> None:
    module, _, name = WORKER_EXTENSION.rpartition(".")
    assert getattr(sys.modules[module], name) is WorkerExtension
