"""compressed-tensors, as llm-compressor 0.14 exports ``float-quantized`` models.

The format's specification is compressed-tensors' ``QuantizationArgs``. Scales are never scalars
there: ``[1]``, ``[out, 1]`` or one for each block.

A config group of all ``Linear`` modules says how most are quantized; a second one names those with dynamic
inputs beside static ones. Readers look for a module's own name first, then for its class (``match_targets`` of
compressed-tensors 0.20, ``find_matched_target`` of vLLM 0.32; vLLM wants what it fuses to be in one group).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
    renamed,
    scheme_of,
    unsupported,
    without_quantization,
)
from octavo.scheme import BLOCK, KINDS, Granularity, Inputs

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


def configs(target: Target, modules: Modules) -> dict[str, Json]:
    """``config.json`` with the format's section."""
    scheme = target.scheme
    group = {
        "format": "float-quantized",
        "input_activations": _INPUTS[scheme.kind],
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _WEIGHTS[scheme.weights],
    }
    groups = {"group_0": group}
    if modules.dynamic:
        groups["group_1"] = {
            **group,
            "input_activations": _TOKEN,
            "targets": list(modules.dynamic),
        }
    quantization = {
        "config_groups": groups,
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", *modules.unquantized],
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
    of_all = [group for group in groups if _targets(group) == ["Linear"]]
    if len(of_all) != 1:
        raise unsupported("compressed-tensors", "other groups than one of all Linear modules")
    weights, inputs = _arithmetic(of_all[0])
    dynamic: tuple[str, ...] = ()
    for group in groups:
        if group is of_all[0]:
            continue
        if inputs != "static" or _arithmetic(group) != (weights, "dynamic"):
            raise unsupported(
                "compressed-tensors",
                "more than one group, other than of dynamic inputs beside static ones of all Linear modules",
            )
        dynamic += matching(tensors, _targets(group))
    cache = section.get("kv_cache_scheme")
    if cache is not None and not _agrees(cache, _KV_CACHE):
        raise unsupported("compressed-tensors", f"the KV cache {cache!r}")
    scheme = scheme_of(
        "compressed-tensors",
        tuple(_INPUTS),
        weights,
        inputs,
        kv_cache="none" if cache is None else "fp8",
        exclude=matching(tensors, section.get("ignore")),
        dynamic=dynamic,
    )
    return Decoded(without_quantization(files["config.json"]), scheme, renamed(tensors, {}))


def _targets(group: object) -> object:
    return group.get("targets") if isinstance(group, dict) else None


def _arithmetic(group: object) -> tuple[Granularity, Inputs]:
    """How the modules of a group are quantized."""
    fields = group if isinstance(group, dict) else {}
    found, activations = fields.get("weights"), fields.get("input_activations")
    weights = next((name for name, spec in _WEIGHTS.items() if _agrees(found, spec)), None)
    if weights is None:
        raise unsupported("compressed-tensors", f"weights of the kind {found!r}")
    fitting = (KINDS[kind] for kind, spec in _INPUTS.items() if _agrees(activations, spec))
    inputs = next((inputs for granularity, inputs in fitting if granularity == weights), None)
    if inputs is None:
        raise unsupported(
            "compressed-tensors",
            f"input_activations of the kind {activations!r} beside {weights} weight scales",
        )
    return weights, inputs


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


DIALECT = Dialect(tuple(_INPUTS), encode, configs, recognizes, decode, by_module=True)
