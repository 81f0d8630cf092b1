"""Block FP8 editions as `transformers` loads them on a CPU: dequantized, inputs and cache not rounded.

It takes a block's size from the number of scales instead of the config. That is right for multiples of
128, and for anything smaller than one block.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import tiny
from octavo import convert, fp8, load
from peers.comparing import SIZES, check_weights, fp8_linears, from_pretrained, logits, make

pytestmark = pytest.mark.peer


def check_against_octavo(edition: Path, plain: Path, unexpected: list[str]) -> None:
    """What `transformers` dequantizes is what Octavo does."""
    peer = from_pretrained(edition, unexpected)
    check_weights(peer, load(edition)[0])
    convert(edition, plain, dequantize={torch.float32: "fp32", torch.bfloat16: "bf16"}[peer.dtype])
    assert torch.equal(logits(peer), logits(from_pretrained(plain)))


@pytest.mark.parametrize("kv_cache", ["fp8", "none"])
@pytest.mark.parametrize("model", ["exact", "rounded"])
def test_transformers_dequantizes_as_octavo_does(
    model: str, kv_cache: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It has no place for the cache's scales, and says so."""
    edition = make(request.getfixturevalue(model), "block-fp8", "fp8-block", kv_cache, tmp_path)
    cache = [
        f"model.layers.{number}.self_attn.{kind}_scale" for number in range(2) for kind in "kv"
    ]
    check_against_octavo(edition, tmp_path / "plain", cache if kv_cache == "fp8" else [])


def test_biases_tied_embeddings_and_exclusions(tmp_path: Path) -> None:
    model = tiny.build("qwen2", tmp_path / "model", **SIZES, tie_word_embeddings=True)
    exclude = ("*.layers.1.mlp.*", "*.o_proj")
    edition = make(model, "block-fp8", "fp8-block", "none", tmp_path, exclude=exclude)
    check_against_octavo(edition, tmp_path / "plain", [])


def test_scales_that_do_not_divide_the_sizes_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny.build("llama", tmp_path / "model", **SIZES | {"intermediate_size": 320})
    edition = make(model, "block-fp8", "fp8-block", "none", tmp_path)
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        from_pretrained(edition)
    assert "Weight shape (320, 256) not divisible by scale grid (3, 2)" in caplog.text


def test_scales_that_divide_the_sizes_otherwise_are_misread(tmp_path: Path) -> None:
    """192 rows have two scales, for 128 and 64 of them. `transformers` gives 96 to each, and says nothing."""
    model = tiny.build("llama", tmp_path / "model", **SIZES | {"intermediate_size": 192})
    edition = make(model, "block-fp8", "fp8-block", "none", tmp_path)
    peer, linears = from_pretrained(edition), fp8_linears(load(edition)[0])
    for name, linear in linears.items():
        found, scale = peer.get_submodule(name).weight, linear.weight_scale
        misread = linear.weight.float() * scale.repeat_interleave(
            linear.out_features // scale.shape[0], 0
        ).repeat_interleave(linear.in_features // scale.shape[1], 1)
        assert torch.equal(found, misread.bfloat16())
        right = torch.equal(found, fp8.dequantize(linear.weight, scale).bfloat16())
        assert right == (".mlp." not in name)
