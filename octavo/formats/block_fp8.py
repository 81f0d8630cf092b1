"""Block FP8, the layout of DeepSeek-V3 (arXiv:2412.19437, section 3.3).

One scale for each 128 x 128 block of a weight, in ``weight_scale_inv``: the name is DeepSeek's, the
number is what codes are multiplied with, as everywhere. Inputs are scaled for each 128 elements of
each token as they come. The config has no word for the KV cache; scales beside the attention block
are the promise, as in vLLM's own dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from octavo.formats.dialect import (
    Decoded,
    Described,
    Dialect,
    Files,
    Json,
    Modules,
    Target,
    Tensors,
    matching,
    quantization_section,
    rename_suffixes,
    renamed,
    unsupported,
    without_quantization,
)
from octavo.scheme import BLOCK, Scheme

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"weight_scale": "weight_scale_inv"}


def encode(tensors: Tensors, target: Target) -> dict[str, Tensor]:
    """Canonical tensors to DeepSeek's names."""
    return rename_suffixes(tensors, _NAMES)


def configs(target: Target, modules: Modules) -> dict[str, Json]:
    """``config.json`` with DeepSeek's section, as `transformers` and vLLM read it."""
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *modules.unquantized],
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return {"config.json": {**target.config, "quantization_config": quantization}}


def recognizes(files: Files) -> bool:
    """By the method's name and the block size."""
    section = quantization_section(files)
    return section.get("quant_method") == "fp8" and section.get("weight_block_size") is not None


def decode(files: Files, tensors: Mapping[str, Described]) -> Decoded:
    """What the section promises."""
    section = quantization_section(files)
    for key, expected in (
        ("weight_block_size", [BLOCK, BLOCK]),
        ("activation_scheme", "dynamic"),
        ("fmt", "e4m3"),
        ("scale_fmt", "float"),
    ):
        # The last two are often left out.
        if section.get(key, expected) != expected:
            raise unsupported("block-fp8", f"{key} {section[key]!r}")
    ignored = section.get("modules_to_not_convert") or section.get("ignored_layers")
    scheme = Scheme(
        weights="block",
        inputs="dynamic",
        kv_cache="fp8" if any(name.endswith(".k_scale") for name in tensors) else "none",
        exclude=matching(tensors, ignored),
    )
    return Decoded(without_quantization(files["config.json"]), scheme, renamed(tensors, _NAMES))


DIALECT = Dialect(("fp8-block",), encode, configs, recognizes, decode)
