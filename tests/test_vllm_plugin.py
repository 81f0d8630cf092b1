"""The vLLM plugin's operators against float64, and where it supplies them; without vLLM."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo import fp8
from octavo.engines import vllm_plugin
from octavo.engines.vllm_plugin import OPERATORS, Operator, is_supplied, supply
from test_fp8 import MAGNITUDES, nearest_even_codes

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_names = (f"octavo_test_{number}" for number in itertools.count())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of many magnitudes, a few beyond what E4M3 holds."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator)
    return (numbers * 10 ** torch.rand(shape, generator=generator).mul_(3)).to(dtype)


def blank(*shape: int) -> Tensor:
    """E4M3 NaN, which no operator writes."""
    return torch.full(shape, 0x7F, dtype=torch.uint8).view(fp8.E4M3)


def codes_of(tensor: Tensor) -> NDArray[np.uint8]:
    codes: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return codes


def assert_nearest(codes: Tensor, exact: Tensor) -> None:
    """``codes`` are the closest to the float64 numbers ``exact`` that E4M3 has, to within what float32
    knows of those."""
    clipped = exact.abs().clamp_max(448).numpy()
    best = np.abs(clipped[..., None] - MAGNITUDES).min(axis=-1)
    found = np.abs(clipped - codes.double().abs().numpy())
    assert (found <= best + 1e-6 * clipped).all()
    assert (codes.double() * exact >= 0).all()


class TestStatic:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    @pytest.mark.parametrize("scale", [0.013, 1.0, 3.7])
    def test_like_quantizing(self, dtype: torch.dtype, scale: float) -> None:
        x, result = random(33, 40, dtype=dtype), blank(33, 40)
        vllm_plugin.static_scaled_fp8_quant(result, x, torch.tensor([scale]), None)
        assert_nearest(result, x.double() / torch.tensor(scale).double())
        expected = fp8.quantize(x, torch.tensor(scale))
        np.testing.assert_array_equal(codes_of(result), codes_of(expected))

    def test_ties_go_to_even(self) -> None:
        ties = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
        values = np.concatenate([ties, -ties, [1e9, -1e9, 0.0, -0.0, 464.0]])
        result = blank(1, len(values))
        x = torch.tensor(values[None] / 8, dtype=torch.float32)
        vllm_plugin.static_scaled_fp8_quant(result, x, torch.tensor(0.125))
        np.testing.assert_array_equal(codes_of(result)[0], nearest_even_codes(values))

    def test_padding_is_left_alone(self) -> None:
        result = blank(17, 8)
        vllm_plugin.static_scaled_fp8_quant(result, random(3, 8), torch.tensor(1.0), [-1, -1])
        assert (codes_of(result[3:]) == 0x7F).all()
        assert not result[:3].isnan().any()

    def test_more_scales_than_one(self) -> None:
        with pytest.raises(NotImplementedError, match=r"one static scale, found \[8\]"):
            vllm_plugin.static_scaled_fp8_quant(blank(3, 8), random(3, 8), torch.ones(8), [-1, 1])


class TestDynamic:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_one_scale(self, dtype: torch.dtype) -> None:
        x, result, scale = random(9, 40, dtype=dtype), blank(17, 40), torch.empty(1)
        vllm_plugin.dynamic_scaled_fp8_quant(result, x, scale)
        assert scale.item() == pytest.approx(x.double().abs().max().item() / 448, rel=1e-6)
        assert_nearest(result[:9], x.double() / scale.double())

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_a_scale_for_each_token(self, dtype: torch.dtype) -> None:
        x, result, scales = random(9, 40, dtype=dtype), blank(17, 40), torch.full((17, 1), -1.0)
        vllm_plugin.dynamic_per_token_scaled_fp8_quant(result, x, scales)
        expected = x.double().abs().amax(dim=1, keepdim=True) / 448
        torch.testing.assert_close(scales[:9].double(), expected, rtol=1e-6, atol=0)
        assert (scales[9:] == -1).all()
        assert_nearest(result[:9], x.double() / scales[:9].double())
        assert (result[:9].float().abs().amax(dim=1) == 448).all()
        assert (codes_of(result[9:]) == 0x7F).all()

    def test_an_upper_bound(self) -> None:
        x, result, scales = torch.tensor([[1.0, 8.0], [1.0, 2.0]]), blank(2, 2), torch.empty(2, 1)
        vllm_plugin.dynamic_per_token_scaled_fp8_quant(result, x, scales, torch.tensor(4.0))
        torch.testing.assert_close(scales, torch.tensor([[4 / 448], [2 / 448]]))
        assert result.tolist() == [[112, 448], [224, 448]]

    def test_zeros_stay_zeros(self) -> None:
        result, scales = blank(2, 8), torch.empty(2, 1)
        vllm_plugin.dynamic_per_token_scaled_fp8_quant(result, torch.zeros(2, 8), scales)
        assert (result.float() == 0).all()
        assert (scales > 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x, result = random(3, 5, 80, dtype=dtype), blank(3, 5, 40)
    vllm_plugin.silu_and_mul_quant(result, x, torch.tensor(0.25))
    gate, up = x.double().chunk(2, dim=-1)
    assert_nearest(result, gate / (1 + torch.exp(-gate)) * up / 0.25)


class TestScaledMm:
    @pytest.fixture
    def replaced(self) -> Iterator[None]:
        library = vllm_plugin.replace_scaled_mm()
        yield
        library._destroy()

    @pytest.mark.parametrize("row_wise", [False, True])
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)], ids=str
    )
    def test_against_float64(
        self, replaced: None, dtype: torch.dtype, tolerance: float, row_wise: bool, compiled: bool
    ) -> None:
        a, b = fp8.quantize(random(6, 32), torch.tensor(1.0)), random(16, 32, seed=1).to(fp8.E4M3)
        scale_a = random(6, 1).abs() if row_wise else torch.tensor([0.3])
        scale_b = random(1, 16).abs() if row_wise else torch.tensor([0.2])
        bias = random(16)

        def product(a: Tensor, b: Tensor) -> Tensor:
            return torch._scaled_mm(a, b.t(), scale_a, scale_b, bias, out_dtype=dtype)

        found = torch.compile(product, backend="aot_eager")(a, b) if compiled else product(a, b)
        exact = a.double() @ b.double().t() * scale_a.double() * scale_b.double() + bias.double()
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-3)

    def test_into_a_tensor(self, replaced: None) -> None:
        a, one = random(6, 32).to(fp8.E4M3), torch.ones(1)
        out = torch.empty(6, 6, dtype=torch.bfloat16)
        given = torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16, out=out)
        assert given is out
        torch.testing.assert_close(out, (a.float() @ a.float().t()).bfloat16())


class TestSupply:
    """In namespaces of its own: a process keeps what is registered."""

    @pytest.fixture
    def namespace(self) -> Iterator[tuple[str, Any]]:
        name, build = next(_names), torch.library.Library
        library: Any = build(name, "DEF")  # type: ignore[no-untyped-call]
        yield name, library
        library._destroy()

    @staticmethod
    def cast(namespace: str, x: Tensor) -> Tensor:
        result = torch.empty_like(x, dtype=fp8.E4M3)
        operator = getattr(torch.ops, namespace).static_scaled_fp8_quant
        operator(result, x, torch.tensor(0.5), (-1, -1))
        return result

    def check(self, namespace: str) -> None:
        x = random(4, 8)
        expected = codes_of(fp8.quantize(x, torch.tensor(0.5)))
        np.testing.assert_array_equal(codes_of(self.cast(namespace, x)), expected)
        traced = torch.compile(self.cast, backend="aot_eager", fullgraph=True)
        np.testing.assert_array_equal(codes_of(traced(namespace, x)), expected)

    def test_an_operator_that_is_not_there(self, namespace: tuple[str, Any]) -> None:
        name, _ = namespace
        assert not is_supplied(f"{name}::static_scaled_fp8_quant")
        library = supply(OPERATORS, name)
        assert all(is_supplied(f"{name}::{one}") for one in OPERATORS)
        self.check(name)
        assert library

    def test_a_placeholder(self, namespace: tuple[str, Any]) -> None:
        """As vLLM's build for CPUs has them: no arguments, and an error where it is called."""
        name, library = namespace

        def refuse() -> None:
            raise RuntimeError("Unimplemented")

        library.define("static_scaled_fp8_quant() -> ()")
        library.impl("static_scaled_fp8_quant", refuse, "CompositeImplicitAutograd")
        with pytest.raises(RuntimeError, match="expected at most 0 argument"):
            self.cast(name, random(4, 8))  # and now the name has been looked up
        supplied = supply(OPERATORS, name)
        self.check(name)
        assert supplied

    def test_an_operator_that_works(self, namespace: tuple[str, Any]) -> None:
        name, library = namespace

        def zero(result: Tensor, *_: Any) -> None:
            result.zero_()

        library.define(f"static_scaled_fp8_quant{OPERATORS['static_scaled_fp8_quant'].signature}")
        library.impl("static_scaled_fp8_quant", zero, "CPU")
        supplied = supply(OPERATORS, name)
        assert (self.cast(name, random(4, 8)).float() == 0).all()
        assert supplied

    def test_a_second_time(self, namespace: tuple[str, Any]) -> None:
        name, _ = namespace
        first = supply(OPERATORS, name)

        def fail(*_: Any) -> None:
            raise AssertionError

        second = supply({one: Operator(OPERATORS[one].signature, fail) for one in OPERATORS}, name)
        self.check(name)
        assert first is not second


class TestRegister:
    @pytest.fixture
    def platform(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """What is asked of vLLM, and what is done, in order."""
        calls: list[str] = []
        platform = SimpleNamespace(
            calls=calls, is_cpu=lambda: True, import_kernels=lambda: calls.append("import")
        )
        module: Any = types.ModuleType("vllm.platforms")
        module.current_platform = platform
        monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", module)
        monkeypatch.setattr(vllm_plugin, "supply", lambda _, name: calls.append(name))
        monkeypatch.setattr(vllm_plugin, "replace_scaled_mm", lambda: calls.append("scaled_mm"))
        vllm_plugin.register.cache_clear()
        yield platform
        vllm_plugin.register.cache_clear()

    @pytest.mark.parametrize(
        ("amx_fp16", "expected"),
        [
            (False, ["import", "_C", "scaled_mm"]),
            (True, ["import", "_C"]),
        ],
    )
    def test_on_a_cpu(
        self,
        platform: Any,
        monkeypatch: pytest.MonkeyPatch,
        amx_fp16: bool,
        expected: list[str],
    ) -> None:
        monkeypatch.setattr("torch.cpu._is_amx_fp16_supported", lambda: amx_fp16)
        vllm_plugin.register()
        vllm_plugin.register()
        assert platform.calls == expected

    def test_elsewhere(self, platform: Any) -> None:
        platform.is_cpu = lambda: False
        assert vllm_plugin.register() == ()
        assert platform.calls == []

    def test_vllm_finds_it(self) -> None:
        (found,) = entry_points(group="vllm.general_plugins", name="octavo")
        assert found.load() is vllm_plugin.register
