"""vLLM's own ``fp8`` checkpoints: one weight scale a tensor, inputs ``static`` or ``dynamic``.

Its readers (``Fp8Config`` of vLLM 0.32) take ``weight_scale``, ``input_scale`` and, beside the
attention block, ``k_scale`` and ``v_scale``. The config has no word for the KV cache: that the scales
are there is the promise, and ``--kv-cache-dtype fp8`` is what makes the engine take them.
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
    renamed,
    unsupported,
    without_quantization,
)
from octavo.scheme import Inputs, Scheme

if TYPE_CHECKING:
    from torch import Tensor

_ACTIVATIONS: dict[str, Inputs] = {"static": "static", "dynamic": "dynamic"}


def encode(tensors: Tensors, target: Target) -> dict[str, Tensor]:
    """The canonical names and shapes are vLLM's."""
    return dict(tensors)


def configs(target: Target, modules: Modules) -> dict[str, Json]:
    """``config.json`` with vLLM's section."""
    quantization = {
        "activation_scheme": target.scheme.inputs,
        "ignored_layers": ["lm_head", *modules.unquantized],
        "quant_method": "fp8",
    }
    return {"config.json": {**target.config, "quantization_config": quantization}}


def recognizes(files: Files) -> bool:
    """By the method's name; with a block size it is another dialect."""
    section = quantization_section(files)
    return section.get("quant_method") == "fp8" and section.get("weight_block_size") is None


def decode(files: Files, tensors: Mapping[str, Described]) -> Decoded:
    """What the section promises."""
    section = quantization_section(files)
    activations = section.get("activation_scheme")
    if activations not in _ACTIVATIONS:
        raise unsupported("vllm-fp8", f"activation_scheme {activations!r}")
    ignored = section.get("ignored_layers") or section.get("modules_to_not_convert")
    scheme = Scheme(
        inputs=_ACTIVATIONS[activations],
        kv_cache="fp8" if any(name.endswith(".k_scale") for name in tensors) else "none",
        exclude=matching(tensors, ignored),
    )
    return Decoded(without_quantization(files["config.json"]), scheme, renamed(tensors, {}))


DIALECT = Dialect(("fp8", "fp8-tensor-dynamic"), encode, configs, recognizes, decode)
