"""Codes learned by block reconstruction: gradients and steps against float64, and on models, against what they compute."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from octavo import fp8, load, quantize, reconstruction
from octavo.calibration import BATCH_TOKENS, Examples
from octavo.linear import Fp8Linear
from octavo.pipeline import Progress
from octavo.reconstruction import Learning, reconstruct
from octavo.rounding.learned import LearnedCodes, code_distance
from octavo.scheme import scheme_called
from reference import rounded_groups, rounded_input
from test_rounding import calibrated, distance, scales

# As they come, without NaN.
EVERY = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8).view(
    fp8.E4M3
)


def test_distances_are_those_of_the_grid() -> None:
    numbers = EVERY.double()
    grid = torch.tensor(sorted(set(numbers.tolist())), dtype=torch.float64)
    for number, distance_ in zip(numbers, code_distance(EVERY), strict=True):
        further = grid[grid > number.abs()]
        # Beyond the largest number there would be one as far.
        expected = further.min() - number.abs() if len(further) else torch.tensor(32.0)
        assert distance_ == expected


@pytest.mark.parametrize("kind", ["tensor", "channel", "block"])
def test_steps_are_those_of_adam(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(130, 140) * 0.05
    scale, rate = scales(weight, kind), 0.4
    codes = fp8.quantize(weight, scale)
    learned = LearnedCodes(codes, scale, rate)
    unit, spread = code_distance(codes).double(), fp8.spread(scale, weight.shape).double()
    moved = mean = square = torch.zeros(weight.shape, dtype=torch.float64)
    for number in range(1, 4):
        gradient, left = torch.randn(weight.shape), 1 / number
        learned.step(gradient.clone(), left)
        by_unit = gradient.double() * unit * spread
        mean = 0.9 * mean + 0.1 * by_unit
        square = 0.95 * square + 0.05 * by_unit**2
        moved = moved - rate * left * (mean / (1 - 0.9**number)) / (
            square / (1 - 0.95**number)
        ).sqrt().clamp_min(1e-30)
    place = codes.double() + moved * unit
    # No further than half a distance, and what BF16 takes away of a place.
    left_over = (learned.codes.double() - place.clamp(-448, 448)).abs()
    room = torch.maximum(unit, code_distance(learned.codes).double())
    assert (left_over <= (0.5 + 1 / 16) * room).all()
    assert learned.changed == (learned.codes.double() != codes.double()).sum() > weight.numel() / 4
    assert torch.equal(learned.values(torch.float32), (learned.codes.double() * spread).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "static"),
    [("tensor", True), ("tensor", False), ("channel", True), ("channel", False), ("block", False)],
)
def test_gradients_are_those_of_the_rounded_numbers(
    kind: str, static: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    original = nn.Linear(200, 140, dtype=dtype)
    scale = scales(original.weight.detach(), kind)
    codes = fp8.quantize(original.weight.detach(), scale)
    x = torch.randn(2, 9, 200, dtype=dtype, requires_grad=True)
    input_scale = fp8.scale_from_amax(x.detach().abs().amax().float()) if static else None
    linear = Fp8Linear.of(original, codes, scale, input_scale)
    weight = fp8.dequantize(codes, scale).to(dtype).requires_grad_()
    result = reconstruction._product(x, weight, [linear])
    torch.testing.assert_close(result, linear(x.detach()))
    slope = torch.randn_like(result)
    found = torch.autograd.grad(result, (x, weight), slope)
    seen = rounded_groups(x.detach()) if kind == "block" else rounded_input(x.detach(), input_scale)
    rows = slope.double().reshape(-1, 140)
    expected = (rows @ weight.double()).view(x.shape), rows.t() @ seen.double().reshape(-1, 200)
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What :func:`reconstruct` is called with from now on, and what it gives."""
    calls: list[Any] = []

    def spy(layer: nn.Module, linears: Any, folded: Any, examples: Any, over: Any) -> Any:
        read = [examples.read(index) for index in range(examples.batches)]
        found = reconstruct(layer, linears, folded, examples, over)
        calls.append((read, found))
        return found

    monkeypatch.setattr("octavo.in_turn.reconstruct", spy)
    return calls


@pytest.fixture
def learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text is enough to change codes."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)
    monkeypatch.setattr(reconstruction, "LEAST", 1)
    monkeypatch.setattr(reconstruction, "TRAVEL", 0.65)


def hidden_states(model: Path, tokens: Tensor) -> list[Tensor]:
    """Those in front of each layer, and behind the last."""
    loaded, _ = load(model, "cpu")
    module: Any = loaded
    found: list[Tensor] = []
    for layer in module.model.layers:
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    layer.register_forward_hook(lambda _, __, output: found.append(output))
    with torch.inference_mode():
        module(input_ids=tokens, use_cache=False)
    return found


def test_a_layer_should_give_of_its_own_inputs_what_the_model_gives_of_its(
    tmp_path: Path, learns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = captured(monkeypatch)
    model = tiny.build("llama", tmp_path / "model", layers=3, dtype=torch.float32, hidden_size=128)
    quantize(
        model,
        tmp_path / "out",
        scheme=scheme_called("fp8", rounding="learned"),
        calibration=calibrated(tmp_path, samples=64, seq_len=64),
    )
    tokens = torch.from_numpy(np.load(tmp_path / "ids.npy"))
    exact, rounded = hidden_states(model, tokens), hidden_states(tmp_path / "out", tokens)
    assert len(calls) == len(exact) - 1 == 3
    for number, (read, result) in enumerate(calls):
        assert any(result.changed.values())
        inputs, targets = (torch.cat(parts).double() for parts in zip(*read, strict=True))
        for found, expected in ((inputs, rounded[number]), (targets, exact[number + 1])):
            # Where a sum falls between two codes, another order may give the other one.
            error = (found - expected.double()).square().sum(-1) / expected.double().square().sum(
                -1
            )
            assert (error < 1e-6).double().mean() > 0.9
    # The two differ by more than that.
    assert (exact[1] - rounded[1]).double().norm() > 0.02 * exact[1].double().norm()


@pytest.mark.parametrize(
    ("kind", "scheme", "format"),
    [
        ("llama", "fp8", "modelopt"),
        ("qwen2", "fp8", "tensorrt-llm"),  # biases; merged scales, fused tensors
        ("qwen3", "fp8-dynamic", "compressed-tensors"),
        ("mistral", "fp8-block", "block-fp8"),
    ],
)
def test_the_model_is_nearer_than_with_gptq(
    kind: str,
    scheme: str,
    format: str,
    tmp_path: Path,
    learns: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the text it learned from: what random tokens teach a random model holds for no others."""
    model = tiny.build(kind, tmp_path / "model", hidden_size=128, intermediate_size=256)
    calibration = calibrated(tmp_path, samples=64, seq_len=64)
    tokens = torch.from_numpy(np.load(tmp_path / "ids.npy"))
    calls, distances = captured(monkeypatch), []
    for rounding in ("gptq", "learned"):
        chosen = scheme_called(scheme, rounding=rounding)
        quantize(model, tmp_path / rounding, scheme=chosen, calibration=calibration, format=format)
        distances.append(distance(model, tmp_path / rounding, tokens))
    assert distances[1] < distances[0]
    weights = json.loads((tmp_path / "learned" / "octavo.json").read_text())["weights"]
    for name, one in weights.items():
        _, found = calls[int(name.split(".")[2])]
        assert one["learned_codes"] == found.changed[name] > 0
        assert one["block_loss"] == found.after < found.before == one["block_loss_before"]


def interrupt(step: Progress) -> None:
    if step.done == 1:
        raise KeyboardInterrupt


def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path, learns: None) -> None:
    model = tiny.build("llama", tmp_path / "model", layers=3)
    options: dict[str, Any] = {
        "scheme": scheme_called("fp8", rounding="learned"),
        "calibration": calibrated(tmp_path, samples=64),
    }
    quantize(model, tmp_path / "whole" / "out", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", **options, on_progress=interrupt)
    layers: list[int] = []
    quantize(
        model,
        tmp_path / "out",
        **options,
        resume=True,
        on_progress=lambda step: layers.append(step.done),
    )
    assert layers == [1, 2, 3]
    assert tiny.contents(tmp_path / "out") == tiny.contents(tmp_path / "whole" / "out")


def test_no_number_of_cores_changes_anything(
    tmp_path: Path, tiny_llama: Path, learns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for workers in (1, 3):
        monkeypatch.setattr("octavo.pipeline.batches_at_once", lambda *_, n=workers: n)
        quantize(
            tiny_llama,
            tmp_path / f"{workers}",
            scheme=scheme_called("fp8", rounding="learned"),
            calibration=calibrated(tmp_path, samples=64),
        )
        results.append(tiny.contents(tmp_path / f"{workers}"))
    assert results[0] == results[1]
    weights = json.loads((tmp_path / "1" / "octavo.json").read_text())["weights"]
    assert any(one["learned_codes"] for one in weights.values())


def test_what_becomes_no_better_stays(
    tmp_path: Path, tiny_llama: Path, learns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far beyond anything sensible.
    monkeypatch.setattr(reconstruction, "TRAVEL", 1e6)
    calibration = calibrated(tmp_path, samples=16)
    results = {
        rounding: quantize(
            tiny_llama,
            tmp_path / rounding,
            scheme=scheme_called("fp8", rounding=rounding),
            calibration=calibration,
        )
        for rounding in ("gptq", "learned")
    }
    assert not results["gptq"].warnings
    (warning,) = results["learned"].warnings
    assert "14 linear layers no better, those of model.layers.0.self_attn.q_proj" in warning
    first, second = (tiny.contents(tmp_path / rounding) for rounding in results)
    assert first["model.safetensors"] == second["model.safetensors"]


def test_layers_that_are_excluded_and_none_but_them(tmp_path: Path, tiny_llama: Path) -> None:
    """Those that keep their dtype take part, unchanged."""
    scheme = scheme_called("fp8", rounding="learned", exclude=("*.layers.0.*", "*.down_proj"))
    quantize(
        tiny_llama, tmp_path / "out", scheme=scheme, calibration=calibrated(tmp_path, samples=16)
    )
    weights = json.loads((tmp_path / "out" / "octavo.json").read_text())["weights"]
    assert len(weights) == 6
    load(tmp_path / "out", "cpu")


def test_a_layer_is_as_it_was(tiny_llama: Path) -> None:
    model, _ = load(tiny_llama, "cpu")
    module: Any = model
    layer = module.model.layers[0]
    before = dict(layer.named_modules())
    linear = layer.mlp.up_proj
    scale = fp8.scale_from_amax(fp8.amax(linear.weight))
    folded = {
        "up.weight": fp8.quantize(linear.weight, scale),
        "up.weight_scale": scale,
        "up.input_scale": torch.ones(()),
    }

    def broken(_: int) -> tuple[Tensor, Tensor]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        reconstruct(
            layer,
            {"up": ("mlp.up_proj", linear)},
            folded,
            Examples(broken, 2, {}),
        )
    assert dict(layer.named_modules()) == before


def test_what_it_takes_is_told_before(tmp_path: Path, tiny_llama: Path) -> None:
    told: list[Learning] = []
    begun: list[int] = []
    options: dict[str, Callable[[Any], None]] = {
        "on_learning": told.append,
        "on_progress": lambda step: begun.append(len(told)),
    }
    calibration = calibrated(tmp_path, samples=16)
    for rounding in ("gptq", "learned"):
        quantize(
            tiny_llama,
            tmp_path / rounding,
            scheme=scheme_called("fp8", rounding=rounding),
            calibration=calibration,
            **options,  # type: ignore[arg-type]
        )
    (cost,) = told
    assert begun == [0, 0, 1, 1]
    tokens = np.load(tmp_path / "ids.npy").size
    forward = tokens + 3 * cost.steps * cost.tokens + 2 * tokens
    assert cost.layers == 2
    assert cost.passes == pytest.approx(forward / tokens)


def test_batches_are_drawn_alike_and_once() -> None:
    drawn = reconstruction._drawn(11)
    assert drawn == reconstruction._drawn(11)
    assert sorted(itertools.chain(*drawn)) == list(range(11))
    assert list(itertools.chain(*drawn)) != list(range(11))
    assert [len(one) for one in drawn] == [2, 2, 2, 2, 2, 1]
    many = list(itertools.chain(*reconstruction._drawn(1000)))
    assert len(set(many)) == len(many) == reconstruction.STEPS * reconstruction.BATCHES
