"""A decoder's weights as the GPU path takes them: the modules of a ``transformers`` model, in the order they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo import fp8
from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.engines.torch.weights import Shape, check_codes, rotary_tables, shape_of, windows_of
from octavo.linear import Fp8Linear
from octavo.loading import Fp8KeyValueCache, fill, fp8_skeleton

# Sums of FP8 products on Hopper's tensor cores in some 22 bits instead of float32: what vLLM and TensorRT-LLM serve
# with. octavo.load, which is the reference, keeps float32.
_FAST_ACCUMULATION = True


class Linears:
    """Linear layers that share an input.

    Attributes:
        scale: float32 scalar, the one scale that all of them round their input with; None if they do not.
    """

    def __init__(self, *modules: Any) -> None:
        self._modules = modules
        for module in modules:
            module.fast_accumulation = _FAST_ACCUMULATION
        scales = {
            module.input_scale.item()
            if isinstance(module, Fp8Linear) and module.input_scale is not None
            else None
            for module in modules
        }
        self.scale: Tensor | None = None
        if len(scales) == 1 and None not in scales:
            self.scale = modules[0].input_scale

    @property
    def weights(self) -> list[Tensor]:
        """Of each, ``[out, in]``."""
        return [module.weight for module in self._modules]

    def to(self, device: torch.device) -> Linears:
        """The same on another device, which the modules move to."""
        return Linears(*(module.to(device) for module in self._modules))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Args: x, ``[tokens, in]``, BF16, or E4M3 codes on :attr:`scale`. Returns each product, BF16."""
        if x.dtype == fp8.E4M3:
            return [module.multiply(x) for module in self._modules]
        return [module(x) for module in self._modules]


class Layer(NamedTuple):
    """A decoder layer.

    Attributes:
        before: BF16 ``[hidden]``, the norm in front of attention.
        qkv: projections to queries, keys and values.
        head_norms: BF16 ``[head_dim]`` of queries and of keys, or None.
        out: the projection behind attention.
        behind: BF16 ``[hidden]``, the norm in front of the MLP.
        gate_up: projections into the MLP.
        down: the one out of it.
        window: tokens that a token sees, itself included.
        key_scale: of cached keys; 1 if the cache is BF16.
        value_scale: of cached values.
    """

    before: Tensor
    qkv: Linears
    head_norms: tuple[Tensor, Tensor] | None
    out: Linears
    behind: Tensor
    gate_up: Linears
    down: Linears
    window: int
    key_scale: float
    value_scale: float


class Network(NamedTuple):
    """A decoder.

    Attributes:
        embedding: BF16 ``[vocab, hidden]``.
        layers: the decoder layers.
        norm: BF16 ``[hidden]``, the final one.
        head: BF16 ``[vocab, hidden]``.
        cos: BF16 ``[positions, head_dim / 2]``.
        sin: likewise.
        cache_dtype: of keys and values: E4M3 or BF16.
        shape: sizes.
        waits_for_nothing: whether its layers can be launched on a GPU without looking at results.
    """

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    cache_dtype: torch.dtype
    shape: Shape
    waits_for_nothing: bool


def read_network(directory: Path, device: torch.device) -> Network:
    """Read a checkpoint, BF16 or FP8 in any dialect. FP16 and float32 numbers are rounded to BF16.

    Raises:
        OctavoError: not a model the embedded engine computes; names the file and what is the matter.
    """
    checkpoint = Checkpoint(directory)
    try:
        edition = Edition(checkpoint)
        model = fp8_skeleton(edition)
        shape_of(model.config, directory / "config.json")
        fill(model, edition, device, torch.bfloat16)
        for name, module in model.named_modules():
            if isinstance(module, Fp8Linear):
                check_codes(edition, f"{name}.weight", module.weight)
    finally:
        checkpoint.close()
    return network_of(model, directory / "config.json")


def network_of(model: Any, path: Path) -> Network:
    """The decoder of a ``transformers`` model with weights in BF16, its linear layers in FP8 or not.

    Args:
        model: of a family of :data:`octavo.skeleton.SUPPORTED`, on one device.
        path: its ``config.json``, for messages.

    Raises:
        OctavoError: see :func:`read_network`.
    """
    shape = shape_of(model.config, path)
    windows = windows_of(model.config, shape)
    embedding = model.model.embed_tokens.weight.data
    tables = [torch.from_numpy(table) for table in rotary_tables(model, shape, path)]
    cos, sin = (table.to(embedding.device, torch.bfloat16) for table in tables)
    layers = [
        _layer(one, int(window)) for one, window in zip(model.model.layers, windows, strict=True)
    ]
    cached = any(isinstance(one, Fp8KeyValueCache) for one in model.modules())
    return Network(
        embedding=embedding,
        layers=layers,
        norm=model.model.norm.weight.data,
        head=model.lm_head.weight.data,
        cos=cos,
        sin=sin,
        cache_dtype=fp8.E4M3 if cached else torch.bfloat16,
        shape=shape,
        waits_for_nothing=not any(
            isinstance(one, Fp8Linear) and one.waits for one in model.modules()
        ),
    )


def _layer(layer: Any, window: int) -> Layer:
    block, mlp = layer.self_attn, layer.mlp
    head_norms = None
    if hasattr(block, "q_norm"):
        head_norms = (block.q_norm.weight.data, block.k_norm.weight.data)
    cache = getattr(block, "kv_cache", None)
    scales = (1.0, 1.0) if cache is None else (cache.k_scale.item(), cache.v_scale.item())
    return Layer(
        before=_weight(layer.input_layernorm),
        qkv=Linears(block.q_proj, block.k_proj, block.v_proj),
        head_norms=head_norms,
        out=Linears(block.o_proj),
        behind=_weight(layer.post_attention_layernorm),
        gate_up=Linears(mlp.gate_proj, mlp.up_proj),
        down=Linears(mlp.down_proj),
        window=window,
        key_scale=scales[0],
        value_scale=scales[1],
    )


def _weight(norm: nn.Module) -> Tensor:
    weight: Any = norm.weight
    result: Tensor = weight.data
    return result
