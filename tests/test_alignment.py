"""Keys moved onto the numbers of an FP8 cache: what the model computes stays, what the cache loses does not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import tiny
from cutting_off import cut_off
from octavo import Calibration, OctavoError, analyze, load, quantize, verify
from octavo.alignment import align_keys, power_of_two
from octavo.analysis import KV_CACHE
from octavo.job import Job
from octavo.scheme import Scheme
from spoiling import edit_tensors

HEAD_DIM, PAIRS = 16, 8
FIRST = "model.layers.0.self_attn"
# Pairs that rotary embedding hardly turns, and a bias for each: the first of a pair, and the second. With amax / 448 as
# the scale, most lie halfway between two numbers of the grid.
BIASES = {5: (323.0, -77.0), 6: (-390.0, 3.0), 7: (5.0, 351.0)}


def spread_keys(tensors: dict[str, Tensor]) -> None:
    """Give the keys of the first layer's second head large biases."""
    bias = tensors[f"{FIRST}.k_proj.bias"]
    for pair, values in BIASES.items():
        for half, value in enumerate(values):
            bias[HEAD_DIM + pair + half * PAIRS] = value


def build(directory: Path, kind: str = "qwen2", **config: Any) -> Path:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    tiny.build(kind, directory, rope_parameters=rope, **config)
    edit_tensors(directory, spread_keys)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("alignment") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_ids(tmp_path_factory.mktemp("ids") / "ids.npy", samples=8, seq_len=64)


def logits(model: Any, ids: Path) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.from_numpy(np.load(ids))).logits.double()
    return result


def original(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=dtype)


def aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    assert align_keys(copies, FIRST, HEAD_DIM)
    return copies


def test_the_model_computes_the_same(model: Path, ids: Path) -> None:
    network = original(model)
    before = logits(network, ids)
    tensors = {
        name: tensor.double() for name, tensor in load_file(model / "model.safetensors").items()
    }
    network.load_state_dict(aligned(tensors))
    # Float32 on the way, beside scores of thousands.
    assert (logits(network, ids) - before).abs().max() < 1e-3 * before.abs().max()


def test_biases_become_powers_of_two_and_the_rest_stays(model: Path) -> None:
    before = load_file(model / "model.safetensors")
    after = aligned(before)
    bias = after[f"{FIRST}.k_proj.bias"].float()
    for pair, values in BIASES.items():
        real, imaginary = bias[HEAD_DIM + pair].item(), bias[HEAD_DIM + pair + PAIRS].item()
        assert imaginary == 0
        # The nearest one, as ratios go, and in the middle of what becomes it.
        assert 0.7 < real / math.hypot(*values) < 1.46
        power = 2.0 ** math.floor(math.log2(real))
        keys = real * torch.linspace(1 - 1 / 34, 1 + 1 / 34, 101)
        for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
            code, scaled = min(power / scale, 448), (keys / scale).clamp(max=448)
            assert scaled.to(torch.float8_e4m3fn).float().eq(code).all()
            assert cut_off(keys, torch.tensor(scale)).eq(code * scale).all()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{FIRST}.{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias")
    }
    # The other head of the keys, the queries that meet it, and the other pairs.
    rows = [HEAD_DIM + pair + half for pair in BIASES for half in (0, PAIRS)]
    for name, heads in (("k", (0,)), ("q", (1, 2))):
        moved = {row + HEAD_DIM * head for row in rows for head in heads}
        one, other = (found[f"{FIRST}.{name}_proj.weight"] for found in (before, after))
        differing = {row for row in range(len(one)) if not torch.equal(one[row], other[row])}
        assert differing == moved


@pytest.mark.parametrize("kind", ["without biases", "normed keys", "small biases"])
def test_other_models_stay_as_they_are(model: Path, kind: str) -> None:
    tensors = load_file(model / "model.safetensors")
    if kind == "without biases":
        tensors = {name: tensor for name, tensor in tensors.items() if "bias" not in name}
    elif kind == "normed keys":
        tensors[f"{FIRST}.k_norm.weight"] = torch.ones(HEAD_DIM)
    else:
        tensors[f"{FIRST}.k_proj.bias"] /= 100
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    assert not align_keys(copies, FIRST, HEAD_DIM)
    assert all(torch.equal(copies[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bias_that_is_not_finite_is_named(
    model: Path, ids: Path, value: float, tmp_path: Path
) -> None:
    spoiled = shutil.copytree(model, tmp_path / "spoiled")
    edit_tensors(spoiled, lambda tensors: tensors[f"{FIRST}.k_proj.bias"].fill_(value))
    with pytest.raises(OctavoError, match=rf"{FIRST}\.k_proj\.bias"):
        quantize(spoiled, tmp_path / "out", calibration=Calibration(source=str(ids)))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_power_of_two(scale: float) -> None:
    found = power_of_two(torch.tensor(scale)).item()
    assert math.frexp(found)[0] == 0.5
    assert found >= scale
    # 1 stands for a scale that is missing.
    assert found == (2 if 0.5 < scale <= 1 else 2.0 ** math.ceil(math.log2(scale)))


def test_attention_scores_lose_less_to_the_cache(model: Path) -> None:
    network = original(model, torch.float32)
    before = load_file(model / "model.safetensors")
    x = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(0))
    cos, sin = network.model.rotary_emb(x, torch.arange(128)[None])

    def projected(tensors: dict[str, Tensor], name: str) -> Tensor:
        weight, bias = (
            tensors[f"{FIRST}.{name}_proj.{kind}"].double() for kind in ("weight", "bias")
        )
        norm = tensors["model.layers.0.input_layernorm.weight"].double()
        heads = (x.double() * norm) @ weight.t() + bias
        return heads.view(1, 128, -1, HEAD_DIM).transpose(1, 2)

    def errors(tensors: dict[str, Tensor], scale_of: Callable[[Tensor], Tensor]) -> Tensor:
        query, key = (projected(tensors, name) for name in "qk")
        query, key = apply_rotary_pos_emb(query, key, cos.double(), sin.double())
        scale = scale_of(key.abs().max().float() / 448)
        cached = (key / scale).to(torch.float8_e4m3fn).double() * scale
        lost = query[:, 2:] @ (cached - key)[:, 1:].transpose(2, 3)
        # What is added to all scores of a query alike changes nothing.
        varying: Tensor = lost - lost.mean(dim=-1, keepdim=True)
        return varying

    plain, moved = errors(before, lambda scale: scale), errors(aligned(before), power_of_two)
    assert moved.square().mean() < 0.1 * plain.square().mean()


def distance(edition: Path, model: Path, ids: Path) -> float:
    """Mean KL from the model, nats a token."""
    expected = torch.log_softmax(logits(original(model), ids), dim=-1)
    found = torch.log_softmax(logits(load(edition)[0], ids), dim=-1)
    return (expected.exp() * (expected - found)).sum(dim=-1).mean().item()


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "learned"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_editions_have_it(
    kind: str, rounding: Any, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tmp_path / "model", kind, **({"attention_bias": True} if kind == "llama" else {}))
    scheme, calibration = Scheme(rounding=rounding), Calibration(source=str(ids))
    quantize(model, tmp_path / "aligned", scheme=scheme, calibration=calibration)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "align_keys", lambda *_: [])
        quantize(model, tmp_path / "plain", scheme=scheme, calibration=calibration)
    # Random models lose most to the rounding of weights and inputs.
    assert distance(tmp_path / "aligned", model, ids) < 0.25 * distance(
        tmp_path / "plain", model, ids
    )
    record = json.loads((tmp_path / "aligned" / "octavo.json").read_text())
    assert record["aligned_keys"] == [FIRST]
    tensors = load_file(tmp_path / "aligned" / "model.safetensors")
    expected = aligned(load_file(model / "model.safetensors"))
    assert torch.equal(tensors[f"{FIRST}.k_proj.bias"], expected[f"{FIRST}.k_proj.bias"])
    assert torch.frexp(tensors[f"{FIRST}.k_proj.k_scale"]).mantissa == 0.5


def test_without_an_fp8_cache_nothing_is_moved(model: Path, ids: Path, tmp_path: Path) -> None:
    quantize(
        model,
        tmp_path / "out",
        scheme=Scheme(kv_cache="none"),
        calibration=Calibration(source=str(ids)),
    )
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert torch.equal(before[f"{FIRST}.k_proj.bias"], after[f"{FIRST}.k_proj.bias"])


def test_a_reference_is_aligned_before_it_is_compared_with(
    model: Path, ids: Path, tmp_path: Path
) -> None:
    edition = tmp_path / "edition"
    quantize(model, edition, calibration=Calibration(source=str(ids)))
    found = verify(edition, reference=model)
    assert [finding for finding in found.findings if "reference" in finding.code] == []
    assert [finding for finding in found.findings if "sqnr" in finding.code] == []
    # Another bias than either is still a fault.
    spoiled = shutil.copytree(edition, tmp_path / "spoiled")
    edit_tensors(spoiled, lambda tensors: tensors[f"{FIRST}.q_proj.bias"].add_(1))
    found = verify(spoiled, reference=model)
    assert "reference-differs" in {finding.code for finding in found.findings}


def test_an_analysis_aligns_them_too(
    model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = tiny.save_ids(tmp_path / "windows.npy", samples=4, seq_len=64, seed=1)

    def cache_loss(name: str) -> float:
        found = analyze(
            *(model, tmp_path / name),
            calibration=Calibration(source=str(ids)),
            data=windows,
            seq_len=64,
            device="cpu",
        )
        (loss,) = (one.kl for one in found.units if one.layer == 0 and one.unit == KV_CACHE)
        return loss

    after = cache_loss("aligned")
    monkeypatch.setattr(Job, "align_keys", lambda *_: [])
    assert after < 0.5 * cache_loss("plain")
