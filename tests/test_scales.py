"""Static scales by other choices than the largest magnitude, against brute force on whole tensors."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from octavo import Calibration, OctavoError, quantize
from octavo.calibration import ranges
from octavo.calibration.observers import Observer
from octavo.scheme import scheme_called
from reference import activations, rounded


def values(seed: int, size: int = 4096) -> Tensor:
    """Heavy-tailed, with an outlier that is nearly always alike, as channels of real models have them."""
    torch.manual_seed(seed)
    tail = torch.randn(size) * torch.randn(size).abs().exp()
    largest = 1.4 * tail.abs().max()
    alike = largest / 1.19 * (1 + 0.01 * torch.randn(size // 8))
    return torch.cat([tail, alike, largest.view(1)]).bfloat16()


def squared_error(x: Tensor, range_: float) -> float:
    scale = torch.tensor(range_, dtype=torch.float32) / 448
    return (x.double() - rounded(x, scale).double()).square().sum().item()


def chosen(x: Tensor, choice: str) -> float:
    return ranges.range_of(x.abs().amax().float(), ranges.count(x), choice).item()  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_mse_is_the_best_within_an_octave(seed: int) -> None:
    x = values(seed)
    amax = x.abs().amax().item()
    found = chosen(x, "mse")
    assert amax <= found < 2 * amax
    everywhere = np.geomspace(amax, 2 * amax, 200, endpoint=False)
    best = min(squared_error(x, one) for one in everywhere)
    # Candidates are 1/64 of an octave apart.
    assert squared_error(x, found) <= 1.1 * best
    assert squared_error(x, found) < 0.9 * squared_error(x, amax)


@pytest.mark.parametrize("seed", range(4))
def test_percentile_clips_one_value_in_ten_thousand(seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(50_000) ** 3).bfloat16()
    found = chosen(x, "percentile")
    clipped = (x.abs() > found).sum().item()
    assert clipped <= 5 < (x.abs() >= found).sum().item()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
def test_any_values_have_a_range(numbers: list[float]) -> None:
    x = torch.tensor(numbers).bfloat16()
    for choice in ("mse", "percentile"):
        found = chosen(x, choice)
        assert math.isfinite(found)
        assert (found == 0) == (x.abs().max().item() == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_counts_are_those_of_the_values(dtype: torch.dtype) -> None:
    x = values(1).to(dtype)
    magnitudes, times = torch.unique(x.bfloat16().abs().float(), return_counts=True)
    counts = ranges.count(x)
    seen = counts.nonzero().squeeze(1)
    assert torch.equal(seen.to(torch.int16).view(torch.bfloat16).float(), magnitudes)
    assert torch.equal(counts[seen], times)


def test_batches_in_any_order_give_the_same_ranges() -> None:
    parts = [values(seed) for seed in range(12)]
    linear = nn.Identity()

    def seen(batches: list[Tensor], threads: int) -> dict[str, Tensor]:
        with Observer("mse") as observer, ThreadPoolExecutor(threads) as pool:
            observer.watch_input(["q", "k"], linear)
            list(pool.map(linear, batches))
        return observer.ranges()

    one, other = seen(parts, 1), seen(parts[::-1], 4)
    assert one == other
    assert one["q"] == one["k"] == chosen(torch.cat(parts), "mse")


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_scales_are_those_of_what_the_model_computes(tmp_path: Path, rounding: str) -> None:
    model = tiny.build("llama", tmp_path / "model")
    ids = tiny.save_ids(tmp_path / "tokens.npy", samples=4, seq_len=64)
    tokens = torch.from_numpy(np.load(ids))
    quantize(
        model,
        tmp_path / "edition",
        scheme=scheme_called("fp8", scales="mse", rounding=rounding),
        calibration=Calibration(source=str(ids)),
    )
    written = load_file(tmp_path / "edition" / "model.safetensors")
    seen = activations(model, tokens)
    # Of these, GPTQ's quantized model has seen nothing rounded.
    first = [
        name
        for name in seen
        if name.startswith("model.layers.0.self_attn.") and "o_proj" not in name
    ]
    checked = first if rounding == "gptq" else list(seen)
    for name in checked:
        block, _, kind = name.rpartition(".")
        stored = (
            f"{block}.{kind}_proj.{kind}_scale" if kind in ("k", "v") else f"{name}.input_scale"
        )
        found = 448 * written[stored].item()
        x, amax = seen[name], seen[name].abs().max().item()
        # transformers rounds some values otherwise, so another candidate may be as good.
        assert 0.99 * amax <= found < 2.02 * amax, name
        best = min(squared_error(x, amax * 2 ** (step / 64)) for step in range(64))
        assert squared_error(x, found) <= 1.02 * best, name
    group = [written[f"model.layers.0.self_attn.{kind}_proj.input_scale"] for kind in "qkv"]
    assert group[0] == group[1] == group[2]


def test_a_scheme_without_static_scales_has_no_choice() -> None:
    with pytest.raises(OctavoError, match="scales mse is for static scales"):
        scheme_called("fp8-dynamic", scales="mse")
    assert scheme_called("fp8-dynamic", kv_cache="fp8", scales="mse").needs_calibration
