"""ModelOpt's unified Hugging Face checkpoint, as nvidia-modelopt 0.47 exports it.

Static inputs are its ``FP8`` algorithm; one scale a channel beside dynamic inputs is
``FP8_PER_CHANNEL_PER_TOKEN``.

The producer's name is what engines recognise the dialect by; ``octavo.json`` names the tool that
wrote the edition.
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
from octavo.scheme import KINDS, Scheme

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
_NAMES = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"}
_ALGORITHMS = {"fp8": "FP8", "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN"}
_FP8: Json = {"dynamic": False, "num_bits": 8, "type": "float"}
_GROUPS: dict[str, Json] = {
    "fp8": {"input_activations": _FP8, "weights": _FP8},
    "fp8-dynamic": {
        "input_activations": {**_FP8, "dynamic": True},
        "weights": {**_FP8, "strategy": "channel"},
    },
}


def encode(tensors: Tensors, target: Target) -> dict[str, Tensor]:
    """Canonical tensors to ModelOpt's names and shapes: its channels' scales are ``[out]``."""
    encoded = dict(tensors)
    if target.scheme.weights == "channel":
        for name in tensors:
            if name.endswith(".weight_scale"):
                encoded[name] = tensors[name].reshape(-1)
    return rename_suffixes(encoded, _NAMES)


def configs(target: Target, modules: Modules) -> dict[str, Json]:
    """``config.json`` for current readers and ``hf_quant_config.json`` for older ones."""
    scheme = target.scheme
    algorithm = _ALGORITHMS[scheme.kind]
    ignored = ["lm_head", "model.embed_tokens", *modules.unquantized]
    quantization: Json = {
        "config_groups": {"group_0": {**_GROUPS[scheme.kind], "targets": ["Linear"]}},
        "ignore": ignored,
        "quant_algo": algorithm,
        "producer": _PRODUCER,
        "quant_method": "modelopt",
    }
    if scheme.kv_cache == "fp8":
        quantization["kv_cache_scheme"] = _FP8
    legacy = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if scheme.kv_cache == "fp8" else None,
        "exclude_modules": ignored,
    }
    return {
        "config.json": {**target.config, "quantization_config": quantization},
        "hf_quant_config.json": {"producer": _PRODUCER, "quantization": legacy},
    }


def recognizes(files: Files) -> bool:
    """By the method's name, or in the older file by its producer's."""
    producer = files.get("hf_quant_config.json", {}).get("producer")
    named = isinstance(producer, dict) and producer.get("name") == "modelopt"
    return quantization_section(files).get("quant_method") == "modelopt" or named


def decode(files: Files, tensors: Mapping[str, Described]) -> Decoded:
    """What ``config.json``'s section, or ``hf_quant_config.json``'s, promises."""
    section = quantization_section(files)
    if section.get("quant_method") != "modelopt":
        # The older file keeps everything one level down, and names some of it differently.
        inner = files["hf_quant_config.json"].get("quantization")
        section = inner if isinstance(inner, dict) else {}
    algorithm = section.get("quant_algo")
    kind = next((kind for kind, name in _ALGORITHMS.items() if name == algorithm), None)
    if kind is None:
        raise unsupported("modelopt", f"quant_algo {algorithm!r}")
    cache = section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo")
    if cache not in (None, "FP8") and not (isinstance(cache, dict) and cache.get("num_bits") == 8):
        raise unsupported("modelopt", f"the KV cache {cache!r}")
    weights, inputs = KINDS[kind]
    ignored = section.get("ignore", section.get("exclude_modules"))
    scheme = Scheme(
        weights=weights,
        inputs=inputs,
        kv_cache="fp8" if cache else "none",
        exclude=matching(tensors, ignored),
    )
    return Decoded(without_quantization(files["config.json"]), scheme, renamed(tensors, _NAMES))


DIALECT = Dialect(tuple(_ALGORITHMS), encode, configs, recognizes, decode)
