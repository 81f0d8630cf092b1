"""compressed-tensors editions as `transformers` loads them through compressed-tensors.

It emulates FP8: inputs, keys and values are rounded through their scales, weights dequantized at the
first call. It holds scales in the model's dtype, so that those of a BF16 model are rounded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from octavo import load
from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.formats import FORMATS
from peers.comparing import (
    check_logits,
    check_products,
    check_weights,
    fp8_linears,
    from_pretrained,
    logits,
    make,
)

pytestmark = pytest.mark.peer

DIALECT = FORMATS["compressed-tensors"]
KINDS = DIALECT.carries
CACHES = ("fp8", "none")


def check_against_octavo(edition: Path, model: Path) -> None:
    """For editions of float32 models."""
    peer, (ours, _) = from_pretrained(edition), load(edition)
    check_weights(peer, ours)
    check_products(peer, ours)
    check_logits(peer, ours, model)


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_octavo_does(
    compressed_tensors: Any, kind: str, kv_cache: str, exact: Path, tmp_path: Path
) -> None:
    check_against_octavo(make(exact, "compressed-tensors", kind, kv_cache, tmp_path), exact)


def test_biases_tied_embeddings_and_exclusions(compressed_tensors: Any, tmp_path: Path) -> None:
    model = tiny.build("qwen2", tmp_path / "model", dtype=torch.float32, tie_word_embeddings=True)
    exclude = ("*.layers.1.mlp.*", "*.layers.0.self_attn.*")
    edition = make(model, "compressed-tensors", "fp8", "fp8", tmp_path, exclude=exclude)
    check_against_octavo(edition, model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if DIALECT.mixes(kind)])
def test_dynamic_inputs_beside_static_ones(
    compressed_tensors: Any, kind: str, exact: Path, tmp_path: Path
) -> None:
    dynamic = ("*.down_proj", "*.layers.1.self_attn.[qkv]_proj")
    edition = make(exact, "compressed-tensors", kind, "fp8", tmp_path, dynamic=dynamic)
    check_against_octavo(edition, exact)
    schemes = {
        name: module.quantization_scheme.input_activations.dynamic
        for name, module in from_pretrained(edition).named_modules()
        if name.endswith("_proj")
    }
    by_token = {name for name, is_dynamic in schemes.items() if is_dynamic}
    ours = {name for name, one in fp8_linears(load(edition)[0]).items() if one.input_scale is None}
    assert by_token == ours
    assert len(by_token) == 2 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_scales_become_bf16_in_a_bf16_model(
    compressed_tensors: Any, kind: str, rounded: Path, tmp_path: Path
) -> None:
    """By 2⁻⁸ of their value at most, where rounding to E4M3 moves a weight by up to 2⁻⁴ of its."""
    edition = make(rounded, "compressed-tensors", kind, "fp8", tmp_path)
    peer = from_pretrained(edition)
    check_weights(peer, load(edition)[0], scale_dtype=torch.bfloat16)
    scales = {name: one.dtype for name, one in peer.named_parameters() if name.endswith("_scale")}
    assert set(scales.values()) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("preset", "kind"), [("FP8", "fp8"), ("FP8_DYNAMIC", "fp8-dynamic"), ("FP8_BLOCK", "fp8-block")]
)
def test_schemes_are_compressed_tensors_presets(
    compressed_tensors: Any, preset: str, kind: str, rounded: Path, tmp_path: Path
) -> None:
    edition = make(rounded, "compressed-tensors", kind, "none", tmp_path)
    section = json.loads((edition / "config.json").read_text())["quantization_config"]
    config = compressed_tensors.QuantizationConfig.model_validate(section)
    # How scales were found is not how they are used.
    found = config.config_groups["group_0"].model_dump()
    expected = compressed_tensors.preset_name_to_scheme(preset, ["Linear"]).model_dump()
    for scheme in (found, expected):
        for part in ("weights", "input_activations"):
            scheme[part].pop("observer", None)
    assert found == expected | {"format": "float-quantized"}


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_octavo_reads_the_section_as_this_version_writes_it(
    compressed_tensors: Any, kind: str, kv_cache: Any, rounded: Path, tmp_path: Path
) -> None:
    """Which leaves out what is null, and knows fields that the version before did not."""
    edition = make(rounded, "compressed-tensors", kind, kv_cache, tmp_path)
    before = Edition(Checkpoint(edition)).scheme
    assert before is not None
    assert (before.kind, before.kv_cache) == (kind, kv_cache)
    config = json.loads((edition / "config.json").read_text())
    section = compressed_tensors.QuantizationConfig.model_validate(config["quantization_config"])
    config["quantization_config"] = section.model_dump(mode="json")
    assert "actorder" not in config["quantization_config"]["config_groups"]["group_0"]["weights"]
    (edition / "config.json").write_text(json.dumps(config))
    assert Edition(Checkpoint(edition)).scheme == before


def test_blocks_may_divide_the_rows_or_not(compressed_tensors: Any, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    sizes = {"hidden_size": 384, "head_dim": 64, "intermediate_size": 256}
    model = tiny.build("llama", tmp_path / "model", dtype=torch.float32, **heads, **sizes)
    edition = make(model, "compressed-tensors", "fp8-block", "none", tmp_path)
    ours, _ = load(edition)
    assert ours.get_submodule("model.layers.0.self_attn.k_proj").weight.shape == (192, 384)
    check_weights(from_pretrained(edition), ours)


def test_blocks_that_do_not_divide_the_columns_load_and_do_not_run(
    compressed_tensors: Any, tmp_path: Path
) -> None:
    model = tiny.build("llama", tmp_path / "model", hidden_size=192, head_dim=48)
    peer = from_pretrained(make(model, "compressed-tensors", "fp8-block", "none", tmp_path))
    with pytest.raises(RuntimeError, match=r"Provided sizes \[2, 128\] don't multiply up.*192"):
        logits(peer)
