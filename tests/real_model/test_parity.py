"""SmolLM2-135M-Instruct against what ModelOpt, Quark and llm-compressor really wrote.

The golden files hold scales and hashes of FP8 codes. The tools' codes are recomputed from their
scales with their arithmetic, which is right if and only if the hash agrees; then they can be
compared code by code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden import E4M3, TOOLS, read, sha256, tensors_of
from octavo import Calibration, Scheme, quantize
from octavo.calibration import load_tokens
from real_model.conftest import Quantized
from reference import whole

pytestmark = pytest.mark.real_model

Golden = dict[str, dict[str, Any]]

WRITTEN_BY = {
    "modelopt": "modelopt-0.47.0",
    "quark": "quark-0.13",
    "compressed-tensors": "llmcompressor-0.14.0.1",
}


def position(codes: Tensor) -> Tensor:
    """Each code's place in the order of E4M3 values, the two zeros at one place."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def test_sample_model_is_the_golden_input(sample: Path, golden: Path) -> None:
    expected = read(golden / "smollm2-135m-bf16.json")
    tensors = tensors_of(sample)
    assert {name: sha256(tensor) for name, tensor in tensors.items()} == {
        name: entry["sha256"] for name, entry in expected.items()
    }
    assert "quantization_config" not in read(sample / "config.json")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (sample / name).exists()


def test_weight_scales_are_exact(modelopt_edition: Path, sample: Path) -> None:
    ours, source = tensors_of(modelopt_edition), tensors_of(sample)
    scales = [name for name in ours if name.endswith(".weight_scale")]
    assert len(scales) == 210
    for name in scales:
        weight = source[name.removesuffix("_scale")]
        assert ours[name] == weight.abs().max().float() / 448, name


@pytest.mark.parametrize("tool", TOOLS)
def test_codes_are_within_one_and_the_error_is_no_larger(
    tool: str, modelopt_edition: Path, sample: Path, golden: Path
) -> None:
    ours, source = tensors_of(modelopt_edition), tensors_of(sample)
    theirs: Golden = read(golden / tool / "tensors.json")
    names = [name for name, tensor in ours.items() if tensor.dtype == E4M3]
    assert len(names) == 210
    for name in names:
        weight, their_scale = source[name], theirs[f"{name}_scale"]["value"]
        codes = TOOLS[tool](weight, their_scale)
        assert sha256(codes) == theirs[name]["sha256"], name

        def error(codes: Tensor, scale: float, weight: Tensor = weight) -> float:
            return float(((codes.double() * scale - weight.double()) ** 2).sum())

        assert error(ours[name], ours[f"{name}_scale"].item()) <= error(codes, their_scale), name
        if tool.startswith("modelopt"):
            assert (position(ours[name]) - position(codes)).abs().max() <= 1, name


def test_activation_scales_agree_with_the_golden_ones(modelopt_edition: Path, golden: Path) -> None:
    """A maximum over 65,536 tokens of a 30-layer BF16 model carries the rounding of the matrix
    products before it, which differs between processors: ModelOpt itself, run with the golden
    tokens on a processor with AMX, lands up to 2.7 % from its golden file, 19 of 270 scales beyond
    1 %. Hence most within 1 %, all within 3 %, and the next test."""
    ours = tensors_of(modelopt_edition)
    theirs: Golden = read(golden / "modelopt-0.47.0" / "tensors.json")
    away = {
        name: abs(tensor.item() / theirs[name]["value"] - 1)
        for name, tensor in ours.items()
        if name.endswith(("input_scale", "k_scale", "v_scale"))
    }
    assert len(away) == 270
    assert max(away.values()) < 0.03
    assert sum(value <= 0.01 for value in away.values()) >= 0.9 * len(away)
    assert sum(away.values()) / len(away) < 0.004


def test_statistics_are_those_of_the_whole_model_in_float32(
    sample: Path, golden: Path, tmp_path: Path
) -> None:
    """In float32, rounding has no say: streamed or whole, the statistics are the same."""
    model = tmp_path / "float32"
    shutil.copytree(sample, model)
    tensors = {name: tensor.float() for name, tensor in tensors_of(sample).items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = read(sample / "config.json") | {"dtype": "float32"}
    (model / "config.json").write_text(json.dumps(config))
    tokens_file = str(golden / "calib_tokens.npy")
    calibration = Calibration(source=tokens_file, samples=4, seq_len=128)
    quantize(model, tmp_path / "out", calibration=calibration)
    tokens = load_tokens(calibration, model, vocab_size=49152, max_positions=8192)
    ours, theirs = read(tmp_path / "out" / "octavo.json")["amax"], whole(model, tokens)
    assert len(theirs) == 270
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.parametrize("format", WRITTEN_BY)
def test_names_shapes_and_config_are_the_tool_s(
    format: str, sample: Path, golden: Path, tmp_path: Path
) -> None:
    """A few tokens are enough for that. Scales are float32 here, where two of the tools write BF16."""
    edition, tool = tmp_path / "edition", golden / WRITTEN_BY[format]
    calibration = Calibration(source=str(golden / "calib_tokens.npy"), samples=1, seq_len=16)
    quantize(sample, edition, calibration=calibration, format=format)
    ours, theirs = tensors_of(edition), read(tool / "tensors.json")
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == {
        name: entry["shape"] for name, entry in theirs.items()
    }
    assert {name: str(tensor.dtype) for name, tensor in ours.items()} == {
        name: "torch.float32" if name.endswith("_scale") else f"torch.{entry['dtype']}"
        for name, entry in theirs.items()
    }
    config, golden_config = read(edition / "config.json"), read(tool / "config.json")
    assert config["quantization_config"] == golden_config["quantization_config"]
    ignored = {"transformers_version"}
    assert config.keys() - ignored == golden_config.keys() - ignored
    legacy = tool / "hf_quant_config.json"
    if legacy.exists():
        assert read(edition / "hf_quant_config.json") == read(legacy)


def test_untouched_tensors_are_the_tools(modelopt_edition: Path, golden: Path) -> None:
    theirs: Golden = read(golden / "modelopt-0.47.0" / "tensors.json")
    ours = tensors_of(modelopt_edition)
    kept = [name for name, entry in theirs.items() if entry["dtype"] == "bfloat16"]
    assert len(kept) == 62
    for name in kept:
        assert sha256(ours[name]) == theirs[name]["sha256"], name


def test_peak_memory_stays_under_800_mb(quantized: Quantized) -> None:
    assert quantized.result["peak_memory"] < 800e6


def test_weights_alone_need_no_text(sample: Path, tmp_path: Path) -> None:
    scheme = Scheme(weights="channel", inputs="dynamic", kv_cache="none")
    result = quantize(sample, tmp_path / "out", scheme=scheme)
    assert result.tokens == 0
    assert result.linears == 210
