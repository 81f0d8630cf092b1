"""Statistics taken with transformers alone, for Octavo's to be compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface


def whole(model: Path, tokens: Tensor) -> dict[str, float]:
    """Amax of every linear input (``<module>``) and of keys and values (``<block>.k``, ``<block>.v``),
    from the whole model and one forward pass over ``tokens`` [samples, seq_len]."""
    found: dict[str, float] = {}

    def see(name: str, tensor: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), tensor.abs().max().item())

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Any:
        see(f"{names[module]}.k", k)
        see(f"{names[module]}.v", v)
        return sdpa_attention_forward(module, q, k, v, *args, **kw)

    AttentionInterface.register("test_sdpa", attention)
    AttentionMaskInterface.register("test_sdpa", sdpa_mask)
    auto: Any = AutoModelForCausalLM
    loaded = auto.from_pretrained(model, dtype="auto", attn_implementation="test_sdpa")
    names = {module: name for name, module in loaded.named_modules()}
    for name, module in loaded.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
    with torch.inference_mode():
        loaded.model(input_ids=tokens, use_cache=False)
    return found
