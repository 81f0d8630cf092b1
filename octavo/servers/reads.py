"""What each engine reads: schemes (keys of :data:`octavo.scheme.KINDS`) by dialect.

vLLM 0.32 reads every dialect of Hugging Face's shape, with all its schemes. What TensorRT-LLM takes of
those is in its ``load_hf_quant_config`` (tensorrt_llm/_torch/model_config.py) and
``update_quant_config_from_compressed_tensors`` (tensorrt_llm/models/quant_config_utils.py): ModelOpt's,
blocks of 128 x 128, and of compressed-tensors channels with dynamic inputs and blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from octavo.formats import FORMATS

Reads: TypeAlias = Mapping[str, Sequence[str]]

VLLM: Reads = {
    name: FORMATS[name].carries
    for name in ("modelopt", "quark", "compressed-tensors", "vllm-fp8", "block-fp8")
}
TENSORRT_LLM: Reads = {
    "modelopt": ("fp8", "fp8-dynamic"),
    "compressed-tensors": ("fp8-dynamic", "fp8-block"),
    "block-fp8": ("fp8-block",),
    "tensorrt-llm": ("fp8",),
}
