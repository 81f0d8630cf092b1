"""Quark editions as `transformers` loads them through amd-quark, and those amd-quark writes itself.

amd-quark emulates FP8: it rounds inputs through their scales, dequantizes weights, and multiplies. Keys
and values it rounds as outputs of ``k_proj`` and ``v_proj``, keys before their rotary embedding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import reference
import tiny
from octavo import load
from octavo.formats import FORMATS
from peers.comparing import (
    check_logits,
    check_products,
    check_weights,
    from_pretrained,
    make,
)

pytestmark = pytest.mark.peer

KINDS = FORMATS["quark"].carries
CACHES = ("fp8", "none")


def check_against_octavo(edition: Path, model: Path) -> None:
    """For editions of float32 models."""
    peer, (ours, _) = from_pretrained(edition), load(edition)
    check_weights(peer, ours)
    scales = {
        f"{name}.{kind}_proj": getattr(block.kv_cache, f"{kind}_scale")
        for name, block in ours.named_modules()
        if hasattr(block, "kv_cache") and hasattr(block.kv_cache, "k_scale")
        for kind in "kv"
    }

    def round_what_is_cached(name: str, product: Tensor) -> Tensor:
        return reference.rounded(product, scales[name]) if name in scales else product

    check_products(peer, ours, after=round_what_is_cached)
    if not scales:
        check_logits(peer, ours, model)


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_what_octavo_does(
    quark: Any, kind: str, kv_cache: str, exact: Path, tmp_path: Path
) -> None:
    """Each of K and V is rounded with its own scale, although amd-quark gives both the larger one."""
    check_against_octavo(make(exact, "quark", kind, kv_cache, tmp_path), exact)


def test_biases_tied_embeddings_and_exclusions(quark: Any, tmp_path: Path) -> None:
    model = tiny.build("qwen2", tmp_path / "model", dtype=torch.float32, tie_word_embeddings=True)
    exclude = ("*.layers.1.mlp.*", "*.layers.0.self_attn.*")
    for kv_cache in CACHES:
        directory = tmp_path / kv_cache
        directory.mkdir()
        edition = make(model, "quark", "fp8", kv_cache, directory, exclude=exclude)
        check_against_octavo(edition, model)


@pytest.mark.parametrize("kv_cache", CACHES)
def test_dynamic_inputs_beside_static_ones(
    quark: Any, kv_cache: str, exact: Path, tmp_path: Path
) -> None:
    dynamic = ("*.down_proj", "*.layers.1.self_attn.[qkv]_proj")
    edition = make(exact, "quark", "fp8", kv_cache, tmp_path, dynamic=dynamic)
    check_against_octavo(edition, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_stay_float32_in_a_bf16_model(
    quark: Any, kind: str, rounded: Path, tmp_path: Path
) -> None:
    edition = make(rounded, "quark", kind, "fp8", tmp_path)
    peer = from_pretrained(edition)
    assert peer.dtype == torch.bfloat16
    scales = {name: one.dtype for name, one in peer.named_buffers() if name.endswith(".scale")}
    assert set(scales.values()) == {torch.float32}
    check_weights(peer, load(edition)[0])


def quark_writes(quark: Any, model: Path, kind: str, kv_cache: str, directory: Path) -> Path:
    """amd-quark's own edition of ``model``."""
    template = quark.LLMTemplate.get("llama")
    scheme = "ptpc_fp8" if kind == "fp8-dynamic" else "fp8"
    config = template.get_config(
        scheme=scheme, kv_cache_scheme="fp8" if kv_cache == "fp8" else None
    )
    if kind == "fp8-tensor-dynamic":
        # It has no name for this one, but the parts: one scale a weight, and inputs by token.
        by_token = template.get_config(scheme="ptpc_fp8").global_quant_config.input_tensors
        cached = (config.layer_quant_config, config.kv_cache_quant_config)
        for layer in (
            config.global_quant_config,
            *(one for group in cached for one in group.values()),
        ):
            layer.input_tensors = by_token
    auto: Any = AutoModelForCausalLM
    ids = torch.from_numpy(np.load(tiny.save_ids(directory / "quark-ids.npy")))
    quantizer = quark.ModelQuantizer(config)
    quantized = quantizer.quantize_model(auto.from_pretrained(model), [row[None] for row in ids])
    quark.export_safetensors(quantizer.freeze(quantized), str(directory / "quark"))
    return directory / "quark"


@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_config_are_amd_quark_s(
    quark: Any, kind: str, kv_cache: str, rounded: Path, tmp_path: Path
) -> None:
    theirs = quark_writes(quark, rounded, kind, kv_cache, tmp_path)
    ours = make(rounded, "quark", kind, kv_cache, tmp_path)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(one / "model.safetensors").items()}
        for one in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    configs = [json.loads((one / "config.json").read_text()) for one in (ours, theirs)]
    assert configs[0] == configs[1]
    # And Octavo reads what amd-quark wrote, as amd-quark does.
    check_weights(from_pretrained(theirs), load(theirs)[0])
