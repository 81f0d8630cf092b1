"""ModelOpt's unified Hugging Face checkpoint, as nvidia-modelopt 0.47 exports it.

Static inputs are its ``FP8`` algorithm. It has no per-tensor weights with dynamic inputs, so those
are written as ``FP8_PER_CHANNEL_PER_TOKEN`` with the one scale repeated for each output channel:
the same numbers, in a layout engines read.

The producer's name is what engines recognise the dialect by; ``octavo.json`` names the tool that
wrote the edition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from octavo.formats.dialect import (
    Dialect,
    Json,
    Tensors,
    inverse,
    rename_suffix,
    rename_suffixes,
    unsupported,
)
from octavo.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_KV_SCALES = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"}
_INPUTS: dict[str, Literal["static", "dynamic"]] = {
    "FP8": "static",
    "FP8_PER_CHANNEL_PER_TOKEN": "dynamic",
}
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


def encode(tensors: Tensors, scheme: Scheme) -> dict[str, Tensor]:
    """Canonical tensors to ModelOpt's names and shapes."""
    encoded = dict(tensors)
    if scheme.inputs == "dynamic":
        for name in tensors:
            if name.endswith(".weight_scale"):
                channels = tensors[name.removesuffix("_scale")].shape[0]
                encoded[name] = tensors[name].expand(channels)
    return rename_suffixes(encoded, _KV_SCALES)


def configs(base: Json, scheme: Scheme, unquantized: Sequence[str]) -> dict[str, Json]:
    """``config.json`` for current readers and ``hf_quant_config.json`` for older ones."""
    static = scheme.inputs == "static"
    algorithm = "FP8" if static else "FP8_PER_CHANNEL_PER_TOKEN"
    excluded = ["lm_head", "model.embed_tokens", *unquantized]
    group = {
        "input_activations": _FP8 if static else {**_FP8, "dynamic": True},
        "weights": _FP8 if static else {**_FP8, "strategy": "channel"},
        "targets": ["Linear"],
    }
    quantization: Json = {
        "config_groups": {"group_0": group},
        "ignore": excluded,
        "quant_algo": algorithm,
        "producer": _PRODUCER,
        "quant_method": "modelopt",
    }
    if scheme.kv_cache == "fp8":
        quantization["kv_cache_scheme"] = _FP8
    legacy = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if scheme.kv_cache == "fp8" else None,
        "exclude_modules": excluded,
    }
    return {
        "config.json": {**base, "quantization_config": quantization},
        "hf_quant_config.json": {"producer": _PRODUCER, "quantization": legacy},
    }


def recognizes(section: Json) -> bool:
    """Both of its files, merged by the reader, say who produced them."""
    producer = section.get("producer")
    named = isinstance(producer, dict) and producer.get("name") == "modelopt"
    return section.get("quant_method") == "modelopt" or named


def scheme(section: Json) -> Scheme:
    """What ``config.json``'s section, or ``hf_quant_config.json``'s, promises."""
    # The older file keeps everything one level down, and names the cache differently.
    inner = section.get("quantization")
    section = {**section, **inner} if isinstance(inner, dict) else section
    algorithm = section.get("quant_algo")
    if algorithm not in _INPUTS:
        raise unsupported("modelopt", f"quant_algo {algorithm!r}")
    cache = section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo")
    if cache not in (None, "FP8") and not (isinstance(cache, dict) and cache.get("num_bits") == 8):
        raise unsupported("modelopt", f"the KV cache {cache!r}")
    return Scheme(inputs=_INPUTS[algorithm], kv_cache="fp8" if cache else "none")


def canonical_name(name: str) -> str:
    """ModelOpt keeps KV scales beside the projections they belong to."""
    return rename_suffix(name, inverse(_KV_SCALES))


DIALECT = Dialect(encode, configs, recognizes, scheme, canonical_name)
