"""Statistics taken with transformers alone, for Octavo's to be compared with."""

from __future__ import annotations

from collections.abc import Mapping
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
    return {name: tensor.abs().max().item() for name, tensor in activations(model, tokens).items()}


def activations(model: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What :func:`whole` takes the maxima of."""
    found: dict[str, Tensor] = {}

    def see(name: str, tensor: Tensor) -> None:
        found[name] = tensor.clone()

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


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` quantized to E4M3 with ``scale`` and back, with PyTorch's own casts, in float32."""
    codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float() * scale


def fake_quantized(source: Path, edition: Mapping[str, Tensor]) -> Any:
    """The unquantized model in float32, with everything an edition in the ModelOpt dialect rounds
    (or one without a KV cache in any dialect with these names), rounded, by operations on whole
    float32 tensors."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(
        source, dtype=torch.float32, attn_implementation="test_fp8_cache"
    ).eval()
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in edition:
            codes, scale = edition[f"{name}.weight"], edition[f"{name}.weight_scale"]
            blocks = blocks_of(codes, scale)
            scale = spread(scale, codes.shape) if blocks else scale.reshape(-1, 1)
            module.weight.data = codes.float() * scale
            static = edition.get(f"{name}.input_scale")
            module.register_forward_pre_hook(
                lambda _, args, static=static, blocks=blocks: (
                    rounded_groups(args[0]) if blocks else rounded_input(args[0], static)
                )
            )
        if f"{name}.k_proj.k_scale" in edition:
            module.scales = [edition[f"{name}.{kind}_proj.{kind}_scale"] for kind in "kv"]
    return model


def rounded_input(x: Tensor, static: Tensor | None) -> Tensor:
    return rounded(x, x.abs().amax(-1, keepdim=True) / 448 if static is None else static)


def blocks_of(codes: Tensor, scale: Tensor) -> bool:
    """Whether there is a scale for each block of 128 x 128."""
    rows, columns = codes.shape
    return tuple(scale.shape) == (-(-rows // 128), -(-columns // 128))


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Each block's scale at each of its elements."""
    rows, columns = (torch.arange(size) // 128 for size in shape)
    return scale[rows][:, columns]


def rounded_groups(x: Tensor) -> Tensor:
    """``x`` with each 128 elements of a token rounded with a scale of their own."""
    parts = torch.split(x, 128, dim=-1)
    return torch.cat([rounded(part, part.abs().amax(-1, keepdim=True) / 448) for part in parts], -1)


def _fp8_cache_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any
) -> Any:
    if hasattr(module, "scales"):
        k, v = rounded(k, module.scales[0]), rounded(v, module.scales[1])
    return sdpa_attention_forward(module, q, k, v, *args, **kw)


AttentionInterface.register("test_fp8_cache", _fp8_cache_attention)
AttentionMaskInterface.register("test_fp8_cache", sdpa_mask)
