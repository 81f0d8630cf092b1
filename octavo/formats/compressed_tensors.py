"""compressed-tensors, as llm-compressor 0.14 exports ``float-quantized`` models.

The format's specification is compressed-tensors' ``QuantizationArgs``. Scales are never scalars
there: ``[1]``, ``[out, 1]`` or one for each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.formats.dialect import (
    Decoded,
    Described,
    Dialect,
    Files,
    Json,
    Target,
    Tensors,
    excluded,
    quantization_section,
    renamed,
    scheme_of,
    unsupported,
    without_quantization,
)
from octavo.scheme import BLOCK, Granularity

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR: Json = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "minmax",
    "observer_kwargs": {},
    "scale_dtype": None,
    "strategy": "tensor",
    "symmetric": True,
    "type": "float",
    "zp_dtype": None,
}
_WEIGHT: Json = {**_TENSOR, "observer": "memoryless_minmax"}
_WEIGHTS: dict[Granularity, Json] = {
    "tensor": _WEIGHT,
    "channel": {**_WEIGHT, "strategy": "channel"},
    "block": {**_WEIGHT, "strategy": "block", "block_structure": [BLOCK, BLOCK]},
}
_COMPUTED: Json = {**_TENSOR, "dynamic": True, "observer": None}
_TOKEN: Json = {**_COMPUTED, "strategy": "token"}
_GROUP: Json = {**_COMPUTED, "strategy": "group", "group_size": BLOCK}
_INPUTS: dict[str, Json] = {
    "fp8": _TENSOR,
    "fp8-channel-static": _TENSOR,
    "fp8-dynamic": _TOKEN,
    "fp8-tensor-dynamic": _TOKEN,
    "fp8-block": _GROUP,
}
_KV_CACHE: Json = {**_TENSOR, "observer": None}


def encode(tensors: Tensors, target: Target) -> dict[str, Tensor]:
    """Canonical tensors in the format's shapes; its names are the canonical ones."""
    return {
        name: tensor.reshape(1) if name.endswith("_scale") and not tensor.ndim else tensor
        for name, tensor in tensors.items()
    }


def configs(target: Target, unquantized: Sequence[str]) -> dict[str, Json]:
    """``config.json`` with the format's section."""
    scheme = target.scheme
    group = {
        "format": "float-quantized",
        "input_activations": _INPUTS[scheme.kind],
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _WEIGHTS[scheme.weights],
    }
    quantization = {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", *unquantized],
        "kv_cache_scheme": _KV_CACHE if scheme.kv_cache == "fp8" else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }
    return {"config.json": {**target.config, "quantization_config": quantization}}


def recognizes(files: Files) -> bool:
    """By the method's name."""
    return quantization_section(files).get("quant_method") == "compressed-tensors"


def decode(files: Files, tensors: Mapping[str, Described]) -> Decoded:
    """What the section promises."""
    section = quantization_section(files)
    if section.get("format") != "float-quantized":
        raise unsupported("compressed-tensors", f"the format {section.get('format')!r}")
    groups = section.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if (
        len(groups) != 1
        or not isinstance(groups[0], dict)
        or groups[0].get("targets") != ["Linear"]
    ):
        raise unsupported("compressed-tensors", "other groups than one of all Linear modules")
    weights = _known(groups[0].get("weights"), _WEIGHTS, "weights")
    inputs = groups[0].get("input_activations")
    kinds = [kind for kind, spec in _INPUTS.items() if _agrees(inputs, spec)]
    if not kinds or not isinstance(inputs, dict):
        raise unsupported("compressed-tensors", f"input_activations of the kind {inputs!r}")
    cache = section.get("kv_cache_scheme")
    if cache is not None and not _agrees(cache, _KV_CACHE):
        raise unsupported("compressed-tensors", f"the KV cache {cache!r}")
    scheme = scheme_of(
        "compressed-tensors",
        tuple(kinds),
        weights,
        "dynamic" if inputs["dynamic"] else "static",
        kv_cache="none" if cache is None else "fp8",
        exclude=excluded(tensors, section.get("ignore")),
    )
    return Decoded(without_quantization(files["config.json"]), scheme, renamed(tensors, {}))


def _known(found: object, known: Mapping[Granularity, Json], what: str) -> Granularity:
    for name, spec in known.items():
        if _agrees(found, spec):
            return name
    raise unsupported("compressed-tensors", f"{what} of the kind {found!r}")


def _agrees(found: Any, spec: Json) -> bool:
    """Whether quantization arguments ask for the arithmetic of ``spec``. Older versions leave out
    what is null."""
    decisive = (
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "block_structure",
        "group_size",
        "dynamic",
    )
    return isinstance(found, dict) and all(found.get(key) == spec[key] for key in decisive)


DIALECT = Dialect(tuple(_INPUTS), encode, configs, recognizes, decode)
