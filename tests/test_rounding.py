"""Second-order rounding: against a textbook version in float64, and on models, against what they compute."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from octavo import Calibration, OctavoError, fp8, load, quantize
from octavo.calibration.moments import SecondMoments
from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.rounding import gptq
from octavo.scheme import scheme_called

DAMPING = 0.01


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated inputs, as layers have them: ``[tokens, width]`` in BF16."""
    torch.manual_seed(seed)
    mixed = torch.randn(tokens, max(width // 4, 1)) @ torch.randn(max(width // 4, 1), width)
    return (mixed + 0.3 * torch.randn(tokens, width)).bfloat16()


def moments(x: Tensor) -> Tensor:
    return x.float().t() @ x.float()


def textbook(weight: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Frantar et al., algorithm 1, and a sweep of coordinate descent, without blocks, in float64: the values of the
    codes."""
    hessian = hessian.double().clone()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    work = weight.double()[:, order]
    scales = fp8.spread(scale, weight.shape).double().expand(weight.shape)[:, order]
    result = torch.zeros_like(work)
    for column in range(work.shape[1]):
        scaled = (work[:, column] / scales[:, column]).clamp(-448, 448).float()
        result[:, column] = scaled.to(torch.float8_e4m3fn).double() * scales[:, column]
        error = (work[:, column] - result[:, column]) / factor[column, column]
        work[:, column:] -= error.unsqueeze(1) * factor[column, column:]
    exact = weight.double()[:, order]
    for column in range(work.shape[1]):
        slope = (result - exact) @ hessian[:, column]
        best = result[:, column] - slope / hessian[column, column]
        scaled = (best / scales[:, column]).clamp(-448, 448).float()
        result[:, column] = scaled.to(torch.float8_e4m3fn).double() * scales[:, column]
    return result[:, torch.argsort(order)]


def damped(hessian: Tensor, damping: float) -> Tensor:
    hessian = hessian.double()
    hessian.diagonal()[hessian.diagonal() <= 0] = 1
    mean = hessian.diagonal().mean()
    return hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64)


def loss(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs."""
    moved = weight.double() - values.double()
    return (moved @ hessian.double() * moved).sum().item()


def scales(weight: Tensor, kind: str) -> Tensor:
    amax = {
        "tensor": fp8.amax,
        "channel": fp8.amax_by_channel,
        "block": fp8.amax_by_block,
    }[kind](weight.contiguous())
    return fp8.scale_from_amax(amax)


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
@pytest.mark.parametrize("shape", [(64, 96), (48, 300), (300, 130), (1, 1)])
def test_codes_are_those_of_the_textbook(shape: tuple[int, int], kind: str) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(shape) * 0.05).bfloat16()
    hessian = moments(inputs(2000, shape[1]))
    scale = scales(weight, kind)
    found = gptq.round_weight(weight, scale, gptq.prepare(hessian.clone(), DAMPING))
    values, expected = fp8.dequantize(found.codes, scale), textbook(weight, scale, hessian)
    # Where two numbers are as near, float32 may take the other, and what follows makes up for it.
    assert torch.isclose(values, expected.float(), rtol=1e-6).double().mean() > 0.97
    nearest = (
        fp8.round_trip(weight.float(), scale)
        if kind == "tensor"
        else fp8.dequantize(fp8.quantize(weight, scale), scale)
    )
    ours, theirs = loss(weight, values, hessian), loss(weight, expected, hessian)
    assert ours <= theirs * 1.02
    if shape != (1, 1):
        assert ours < 0.2 * loss(weight, nearest, hessian)
        hessian = damped(hessian, DAMPING)
        told = 10 ** (found.gain_db / 10)
        ratio = loss(weight, nearest, hessian) / loss(weight, values, hessian)
        assert told == pytest.approx(ratio, rel=0.001)


def test_the_kernel_and_its_reference_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    weight = (torch.randn(40, 300) * 0.05).bfloat16()
    given_, scale = gptq.prepare(moments(inputs(2000, 300))), scales(weight, "channel")
    found = gptq.round_weight(weight, scale, given_)
    monkeypatch.setattr("octavo.kernels.round_with_feedback", gptq._feed_back)
    monkeypatch.setattr("octavo.kernels.descend", gptq._descend_block)
    expected = gptq.round_weight(weight, scale, given_)
    same = found.codes.view(torch.uint8) == expected.codes.view(torch.uint8)
    assert same.double().mean() > 0.99
    assert found.gain_db == pytest.approx(expected.gain_db, rel=0.01)


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_the_sweep_makes_outputs_nearer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    weight = (torch.randn(130, 300) * 0.05).bfloat16()
    hessian, scale = moments(inputs(2000, 300)), scales(weight, kind)
    given_ = gptq.prepare(hessian.clone(), DAMPING)
    found = gptq.round_weight(weight, scale, given_)
    monkeypatch.setattr(gptq, "_descend", lambda weight, *_: torch.zeros(len(weight)))
    without = gptq.round_weight(weight, scale, given_)
    hessian = damped(hessian, DAMPING)
    before, after = (
        loss(weight, fp8.dequantize(one.codes, scale), hessian) for one in (without, found)
    )
    assert after < 0.97 * before
    told = 10 ** ((found.gain_db - without.gain_db) / 10)
    assert told == pytest.approx(before / after, rel=0.001)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 200),
    tokens=st.integers(1, 300),
    dead=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_outputs_are_never_farther_than_with_nearest_codes(
    rows: int, columns: int, tokens: int, dead: int, seed: int
) -> None:
    x = inputs(tokens, columns, seed)
    x[:, :dead] = 0
    weight = (torch.randn(rows, columns) * 0.1).bfloat16()
    weight[0] = 0
    hessian, scale = moments(x), scales(weight, "tensor")
    given_ = gptq.prepare(hessian.clone(), DAMPING)
    found = gptq.round_weight(weight, scale, given_)
    values = fp8.dequantize(found.codes, scale)
    nearest = fp8.dequantize(fp8.quantize(weight, scale), scale)
    hessian = damped(hessian, given_.damping)
    assert loss(weight, values, hessian) <= loss(weight, nearest, hessian) * 1.001 + 1e-9
    assert found.gain_db >= 0
    assert not values[0].any()
    assert torch.equal(values[:, :dead], nearest[:, :dead])


def test_a_singular_matrix_is_damped_until_it_can_be_factored() -> None:
    # All inputs are one, and so little damping is lost in rounding.
    found = gptq.prepare(torch.full((64, 64), 1e8), 1e-9)
    assert 1e-9 < found.damping < 1e-3
    assert found.factor.isfinite().all()


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(OctavoError, match="Cholesky"):
        gptq.prepare(torch.full((4, 4), torch.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [96, 600])
def test_moments_are_a_sum_whatever_the_threads(width: int, dtype: torch.dtype) -> None:
    batches = [inputs(200, width, seed).to(dtype).view(4, 50, width) for seed in range(4)]
    found = []
    for threads, count in ((1, 1), (4, 3)):
        sums = SecondMoments(width, torch.device("cpu"))
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(batches), count):
                sums.add(batches[first : first + count], pool.map)
        found.append(sums.result())
    assert torch.equal(*found)
    whole = torch.cat(batches).view(-1, width).double()
    expected = whole.t() @ whole
    assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def calibrated(directory: Path, samples: int = 16, seq_len: int = 32) -> Calibration:
    ids = tiny.save_ids(directory / "ids.npy", samples=samples, seq_len=seq_len)
    return Calibration(source=str(ids))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_each_layer_sees_what_the_quantized_model_gives_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(kind, tmp_path / "model")
    calibration = calibrated(tmp_path)
    seen: list[Tensor] = []
    prepare = gptq.prepare

    def spy(moments: Tensor, *rest: Any) -> gptq.Feedback:
        seen.append(moments.clone())
        return prepare(moments, *rest)

    monkeypatch.setattr(gptq, "prepare", spy)
    quantize(
        model,
        tmp_path / "out",
        scheme=scheme_called("fp8", rounding="gptq"),
        calibration=calibration,
    )
    # The edition as others compute it, from its files.
    loaded, _ = load(tmp_path / "out", "cpu")
    found: dict[str, list[Tensor]] = {}
    modules: Any = loaded
    for index in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            module = modules.model.layers[index].get_submodule(name)
            caught = found.setdefault(f"{index}.{name}", [])
            module.register_forward_pre_hook(lambda _, args, c=caught: c.append(args[0]))
    tokens = torch.from_numpy(np.load(tmp_path / "ids.npy"))
    with torch.inference_mode():
        modules(input_ids=tokens, use_cache=False)
    assert len(seen) == len(found) == 8
    for moment, (name, caught) in zip(seen, found.items(), strict=True):
        x = torch.cat(caught).reshape(-1, len(moment)).double()
        expected = x.t() @ x
        # BF16 rounds otherwise in other kernels, and E4M3 makes steps of that.
        assert (moment - expected).norm() < 0.02 * expected.norm(), name


def distance(model: Path, edition: Path, tokens: Tensor) -> float:
    """Mean KL(model ‖ edition) in nats."""
    results = []
    for directory in (model, edition):
        loaded, _ = load(directory, "cpu")
        module: Any = loaded
        with torch.inference_mode():
            results.append(
                module(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
            )
    p, q = results
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("kind", "scheme", "format"),
    [
        ("llama", "fp8", "modelopt"),
        ("qwen2", "fp8", "tensorrt-llm"),  # biases; merged scales, fused tensors
        ("qwen3", "fp8-dynamic", "compressed-tensors"),
        ("mistral", "fp8-block", "block-fp8"),
    ],
)
def test_the_model_is_nearer(kind: str, scheme: str, format: str, tmp_path: Path) -> None:
    model = tiny.build(kind, tmp_path / "model", hidden_size=128, intermediate_size=256)
    calibration = calibrated(tmp_path, samples=64, seq_len=64)
    tokens = torch.from_numpy(np.load(tiny.save_ids(tmp_path / "other.npy", samples=8, seed=1)))
    editions, distances = [], []
    for rounding in ("nearest", "gptq"):
        out = tmp_path / rounding
        chosen = scheme_called(scheme, rounding=rounding)
        quantize(model, out, scheme=chosen, calibration=calibration, format=format)
        editions.append(Edition(Checkpoint(out)))
        distances.append(distance(model, out, tokens))
    assert distances[1] < distances[0]
    weights = json.loads((tmp_path / "gptq" / "octavo.json").read_text())["weights"]
    assert all(one["output_gain_db"] > 0.5 for one in weights.values())
    # The format is the same: names, dtypes, shapes; and the scales of weights to the last bit.
    before, after = editions
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype
        if name.endswith("weight_scale"):
            assert torch.equal(before.read(name), after.read(name)), name


def test_few_tokens_and_dead_channels(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model")
    calibration = calibrated(tmp_path, samples=1, seq_len=4)
    quantize(
        model,
        tmp_path / "out",
        scheme=scheme_called("fp8", rounding="gptq"),
        calibration=calibration,
    )
    weights = json.loads((tmp_path / "out" / "octavo.json").read_text())["weights"]
    assert all(one["output_gain_db"] >= 0 for one in weights.values())
    load(tmp_path / "out", "cpu")


def test_damping_that_was_raised_is_told(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, calibration = scheme_called("fp8", rounding="gptq"), calibrated(tmp_path)
    told = quantize(tiny_llama, tmp_path / "usual", scheme=scheme, calibration=calibration)
    assert not told.warnings
    # As if less had not been enough.
    monkeypatch.setattr(gptq, "prepare", partial(gptq.prepare, damping=0.1))
    told = quantize(tiny_llama, tmp_path / "raised", scheme=scheme, calibration=calibration)
    (warning,) = told.warnings
    assert "14 linear layers' inputs, those of model.layers.0.self_attn.q_proj among" in warning
    assert "damping of up to 0.1 in the place of 0.01" in warning


def test_excluded_layers_stay(tmp_path: Path, tiny_llama: Path) -> None:
    scheme = scheme_called("fp8", rounding="gptq", exclude=("*.q_proj", "*.k_proj", "*.v_proj"))
    quantize(tiny_llama, tmp_path / "out", scheme=scheme, calibration=calibrated(tmp_path))
    edition = Edition(Checkpoint(tmp_path / "out"))
    assert edition["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert edition["model.layers.0.mlp.up_proj.weight"].dtype == fp8.E4M3
    assert "model.layers.0.self_attn.k_scale" in edition
