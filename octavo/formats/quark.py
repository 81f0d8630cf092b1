"""AMD Quark's ``quark_safetensors``, as amd-quark 0.13 exports it.

Quark stores the scales of keys and values as output scales of ``k_proj`` and ``v_proj``. Its own
exports give both the larger of the two; here each keeps its own.

``layer_quant_config`` has what differs from the rest, by module name or pattern. Readers take the first that fits
(``get_layer_quant_config`` of amd-quark 0.13, ``get_layer_quant_config_from_name`` of vLLM 0.32; vLLM wants what it fuses to
be alike), so names come before the patterns that say what is cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
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
    scheme_of,
    unsupported,
    without_quantization,
)
from octavo.scheme import Granularity, Inputs

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"k_scale": "k_proj.output_scale", "v_scale": "v_proj.output_scale"}
_PER_TENSOR: Json = {
    "block_size": None,
    "ch_axis": None,
    "dtype": "fp8_e4m3",
    "enable_buffer_reuse": False,
    "group_size": None,
    "is_dynamic": False,
    "is_scale_quant": False,
    "max_input_numel": 4194304,
    "mx_element_dtype": None,
    "observer_cls": "PerTensorMinMaxObserver",
    "qscheme": "per_tensor",
    "round_method": "half_even",
    "scale_calculation_mode": None,
    "scale_format": None,
    "scale_type": "float",
    "symmetric": True,
    "zero_point_type": "int32",
}
_PER_CHANNEL: Json = {
    **_PER_TENSOR,
    "ch_axis": 0,
    "observer_cls": "PerChannelMinMaxObserver",
    "qscheme": "per_channel",
}
# Quark's channels of an input are its tokens.
_PER_TOKEN: Json = {**_PER_CHANNEL, "ch_axis": 1, "is_dynamic": True}
_KV_CACHE: Json = {**_PER_TENSOR, "scale_type": None}
_WEIGHTS: dict[Granularity, Json] = {"tensor": _PER_TENSOR, "channel": _PER_CHANNEL}
_INPUTS: dict[Inputs, Json] = {"static": _PER_TENSOR, "dynamic": _PER_TOKEN}
_CACHED = ("*k_proj", "*v_proj")
_SCALE = ".weight_scale"


def encode(tensors: Tensors, target: Target) -> dict[str, Tensor]:
    """Canonical tensors to Quark's names and shapes: its channels' scales are ``[out]``."""
    encoded = dict(tensors)
    if target.scheme.weights == "channel":
        for name in tensors:
            if name.endswith(".weight_scale"):
                encoded[name] = tensors[name].reshape(-1)
    return rename_suffixes(encoded, _NAMES)


def configs(target: Target, modules: Modules) -> dict[str, Json]:
    """``config.json`` with Quark's section."""
    scheme = target.scheme
    kv_groups = list(_CACHED) if scheme.kv_cache == "fp8" else []

    def layer(name: str, inputs: Inputs) -> Json:
        cached = _first_fitting(name, kv_groups) is not None
        return {
            "bias": None,
            "input_tensors": _INPUTS[inputs],
            "output_tensors": _KV_CACHE if cached else None,
            "target_device": None,
            "weight": _WEIGHTS[scheme.weights],
        }

    moved = {name: layer(name, "dynamic") for name in modules.dynamic}
    kv_layers = {group: layer(group, scheme.inputs) for group in kv_groups}
    quantization = {
        "algo_config": None,
        "exclude": ["lm_head", *modules.unquantized],
        "export": {
            "kv_cache_group": kv_groups,
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": layer("", scheme.inputs),
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": kv_layers,
        "layer_quant_config": moved | kv_layers,
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": "0.13",
    }
    return {"config.json": {**target.config, "quantization_config": quantization}}


def recognizes(files: Files) -> bool:
    """By the method's name."""
    return quantization_section(files).get("quant_method") == "quark"


def decode(files: Files, tensors: Mapping[str, Described]) -> Decoded:
    """What the section promises."""
    section = quantization_section(files)
    weights, inputs = _arithmetic(section.get("global_quant_config"))
    layers = section.get("layer_quant_config")
    layers = layers if isinstance(layers, dict) else {}
    quantized = [name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)]
    dynamic = []
    for module in quantized:
        own = _first_fitting(module, layers)
        found = (weights, inputs) if own is None else _arithmetic(layers[own])
        if found == (weights, inputs):
            continue
        if inputs != "static" or found != (weights, "dynamic"):
            raise unsupported(
                "quark",
                f"{found[0]} weight scales and {found[1]} inputs of {module} beside {weights} weight scales and {inputs} "
                "inputs of all others",
            )
        dynamic.append(module)
    export = section.get("export")
    groups = export.get("kv_cache_group") if isinstance(export, dict) else None
    scheme = scheme_of(
        "quark",
        CARRIES,
        weights,
        inputs,
        kv_cache="fp8" if groups else "none",
        exclude=matching(tensors, section.get("exclude")),
        dynamic=tuple(dynamic),
    )
    return Decoded(without_quantization(files["config.json"]), scheme, renamed(tensors, _NAMES))


def _first_fitting(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that a module's name fits, as readers of the format have it."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _arithmetic(layer: object) -> tuple[Granularity, Inputs]:
    """How a layer is quantized."""
    fields = layer if isinstance(layer, dict) else {}
    weight, inputs = fields.get("weight"), fields.get("input_tensors")
    for what, tensor in (("weights", weight), ("inputs", inputs)):
        if not isinstance(tensor, dict) or tensor.get("dtype") != "fp8_e4m3":
            raise unsupported("quark", f"{what} of the kind {tensor!r}")
    assert isinstance(weight, dict)
    assert isinstance(inputs, dict)
    granularity = next(
        (name for name, spec in _WEIGHTS.items() if spec["qscheme"] == weight.get("qscheme")), None
    )
    if granularity is None or (granularity == "channel" and weight.get("ch_axis") != 0):
        axis = weight.get("ch_axis")
        raise unsupported("quark", f"weight scales {weight.get('qscheme')!r} along axis {axis!r}")
    dynamic = inputs.get("is_dynamic") is True
    if dynamic and (inputs.get("qscheme"), inputs.get("ch_axis")) != ("per_channel", 1):
        axis = inputs.get("ch_axis")
        raise unsupported("quark", f"dynamic inputs {inputs.get('qscheme')!r} along axis {axis!r}")
    return granularity, "dynamic" if dynamic else "static"


CARRIES = ("fp8", "fp8-dynamic", "fp8-tensor-dynamic")
DIALECT = Dialect(CARRIES, encode, configs, recognizes, decode, by_module=True)
