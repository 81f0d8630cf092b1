"""Calibration tokens that the model writes: whose they are, how they begin, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import tiny
from octavo import Calibration, OctavoError, quantize, write_calibration
from octavo.cli import app

EOS, BOS = 254, 255


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_tokenizer(tiny.build("llama", tmp_path / "model"))


def with_special_tokens(model: Path) -> Path:
    """Two bytes' tokens become special ones, one of which begins every text."""
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(model)
    bos, eos = tokenizer.convert_ids_to_tokens([BOS, EOS])
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, BOS)]
    )
    tokenizer.save_pretrained(model)
    assert tokenizer("a")["input_ids"][0] == BOS
    return model


def test_tokens_are_drawn_from_the_models_distribution(model: Path, tmp_path: Path) -> None:
    write_calibration(model, tmp_path / "own.npy", samples=60, seq_len=100)
    ids = torch.from_numpy(np.load(tmp_path / "own.npy").astype(np.int64))
    auto: Any = AutoModelForCausalLM
    reference = auto.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = reference(ids).logits[:, :-1].log_softmax(-1).double()
    # The surprise at a token that is drawn from p has the mean and the variance that p gives it.
    surprise = -logprobs.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    variance = (logprobs.exp() * logprobs.square()).sum(-1) - entropy.square()
    deviations = (surprise - entropy).sum() / variance.sum().sqrt()
    assert abs(deviations) < 4
    # Samples do not draw the same numbers, uniform ones: tokens lie at different places in their distributions.
    places = logprobs.exp().cumsum(-1).gather(2, ids[:, 1:, None])[..., 0]
    together = (places - places.mean()).mean(0) * (12 * len(ids)) ** 0.5
    assert together.square().mean() < 2
    # The model is far enough from indifferent that tokens drawn evenly would be seen.
    evenly = (-logprobs.mean(-1) - entropy).sum() / variance.sum().sqrt()
    assert evenly > 20


def test_samples_begin_with_text_behind_what_begins_every_text(model: Path, tmp_path: Path) -> None:
    write_calibration(with_special_tokens(model), tmp_path / "own.npy", samples=700, seq_len=3)
    ids = np.load(tmp_path / "own.npy")
    assert ids.dtype == np.int32
    assert ids.shape == (700, 3)
    assert (ids[:, 0] == BOS).all()
    # Of 254 tokens 700 draws leave out some 16.
    assert not {EOS, BOS} & set(ids[:, 1])
    assert len(set(ids[:, 1])) > 200


def test_a_seed_gives_its_tokens(model: Path, tmp_path: Path) -> None:
    for name, seed in {"one": 0, "again": 0, "other": 1}.items():
        write_calibration(model, tmp_path / f"{name}.npy", samples=8, seq_len=20, seed=seed)
    one, again, other = (np.load(tmp_path / f"{name}.npy") for name in ("one", "again", "other"))
    assert (one == again).all()
    assert (one != other).mean() > 0.5


def test_the_command_writes_what_quantize_reads(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.npy"
    arguments = ["write-calibration", str(model), "-o", str(own), "--samples", "5"]
    done = CliRunner().invoke(app, [*arguments, "--seq-len", "30", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["samples"], found["seq_len"]) == (5, 30)
    result = quantize(model, tmp_path / "out", calibration=Calibration(source=str(own)))
    assert result.tokens == 150

    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    done = CliRunner().invoke(app, [*arguments, "--seq-len", "10", "--overwrite"])
    assert done.exit_code == 0
    assert "5 × 10 = 50" in done.stdout
    assert "begins" in done.stdout
    assert np.load(own).shape == (5, 10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": "own.txt"}, "does not end in .npy"),
        ({"output": "nowhere/own.npy"}, "not there"),
        ({"seq_len": tiny.POSITIONS + 1}, f"{tiny.POSITIONS} positions"),
        ({"seq_len": 1}, "Choose at least 2"),
    ],
)
def test_refused(options: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    before = tiny.contents(tmp_path)
    output = tmp_path / options.pop("output", "own.npy")
    with pytest.raises(OctavoError, match=says):
        write_calibration(model, output, samples=2, **options)
    assert tiny.contents(tmp_path) == before


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model")
    with pytest.raises(OctavoError, match="no usable tokenizer"):
        write_calibration(model, tmp_path / "own.npy", samples=2, seq_len=8)
