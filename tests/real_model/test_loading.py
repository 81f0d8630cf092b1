"""SmolLM2-135M-Instruct loaded from editions: Octavo's own, and those that other tools wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from golden import TOOLS, read, rebuild, sha256, tensors_of
from octavo import convert, load
from reference import fake_quantized

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="session")
def windows(golden: Path) -> Tensor:
    """int64 [4, 2048]: text of WikiText-2."""
    tokens = np.load(golden / "calib_tokens.npy")[:16].astype(np.int64)
    return torch.from_numpy(tokens).view(4, 2048)


def losses(model: Any, windows: Tensor) -> Tensor:
    """Negative log-likelihood of each window, mean over its tokens, in nats."""
    found = []
    with torch.inference_mode():
        for row in windows:
            logits = model(row[None]).logits[0, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits, row[1:]))
    return torch.stack(found)


def nll(model: Any, windows: Tensor) -> float:
    """Their mean."""
    return losses(model, windows).mean().item()


@pytest.fixture(scope="session")
def unquantized(sample: Path, windows: Tensor) -> float:
    return nll(load(sample)[0], windows)


def test_perplexity_is_that_of_float32_fake_quantization(
    modelopt_edition: Path, sample: Path, windows: Tensor, unquantized: float
) -> None:
    expected = losses(fake_quantized(sample, tensors_of(modelopt_edition)), windows)
    differences = losses(load(modelopt_edition)[0], windows) - expected
    # Perplexities within 0.3 %. BF16 and float32 round some inputs to different codes, which moves a
    # window's loss by up to 1 % either way; what is left of that in the mean differs from processor to processor.
    chance = differences.std() / len(differences) ** 0.5
    assert differences.mean().abs() < 0.003 + chance
    assert differences.abs().max() < 0.012
    assert expected.mean() - unquantized > 0.02


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools_editions_load_and_score(
    tool: str,
    sample: Path,
    golden: Path,
    windows: Tensor,
    unquantized: float,
    tmp_path: Path,
) -> None:
    model, tokenizer = load(rebuild(tool, sample, golden, tmp_path / "edition"))
    assert tokenizer is not None
    assert unquantized < nll(model, windows) < unquantized + 0.1


# ModelOpt's name of what the tool calls otherwise: that of keys' and values' scales.
CACHE_SCALES = {
    "quark-0.13": (r"([kv])_proj\.output_scale", r"\1_proj.\1_scale"),
    "llmcompressor-0.14.0.1": (r"self_attn\.([kv])_scale", r"self_attn.\1_proj.\1_scale"),
}


@pytest.mark.parametrize("tool", CACHE_SCALES)
def test_other_tools_editions_become_modelopt_s(
    tool: str, sample: Path, golden: Path, tmp_path: Path
) -> None:
    """Codes byte for byte, scales to the last bit."""
    result = convert(
        rebuild(tool, sample, golden, tmp_path / "edition"), tmp_path / "converted", to="modelopt"
    )
    assert result.requantized == {}
    theirs = {
        re.sub(*CACHE_SCALES[tool], name): entry
        for name, entry in read(golden / tool / "tensors.json").items()
    }
    ours = tensors_of(tmp_path / "converted")
    assert ours.keys() == theirs.keys() == read(golden / "modelopt-0.47.0" / "tensors.json").keys()
    for name, entry in theirs.items():
        if "sha256" in entry:
            assert sha256(ours[name]) == entry["sha256"], name
        else:
            assert (ours[name].dtype, ours[name].item()) == (torch.float32, entry["value"]), name
    config = read(tmp_path / "converted" / "config.json")["quantization_config"]
    assert config == read(golden / "modelopt-0.47.0" / "config.json")["quantization_config"]


def test_it_says_where_paris_is(modelopt_edition: Path) -> None:
    model, tokenizer = load(modelopt_edition)
    assert tokenizer is not None
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
