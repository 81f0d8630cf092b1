"""``octavo.load``: a BF16 checkpoint or an FP8 edition as a ``transformers`` model that computes in FP8.

The model is built on the meta device; its quantized linear layers become :class:`Fp8Linear`, its
attention blocks get the cache their scales describe, and every tensor is read from the safetensors
file to where it stays. Nothing is held twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from octavo import fp8
from octavo.attention import KeyValueCache
from octavo.checkpoint import Checkpoint
from octavo.checkpoint.hub import resolve_model
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.linear import Fp8Linear
from octavo.preflight import pick_device
from octavo.skeleton import build_skeleton, check_tensors
from octavo.tokenizer import find_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Fp8KeyValueCache(KeyValueCache):
    """Keys and values as an FP8 cache would give them back.

    Attributes:
        k_scale: float32 scalar.
        v_scale: likewise.
    """

    k_scale: Tensor
    v_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("k_scale", "v_scale"):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, device="meta"))

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each ``[batch, kv_heads, tokens, head_dim]``, rounded; once is enough."""
        if hasattr(key, "octavo_cached"):
            return key, value
        return _as_cached(key, self.k_scale), _as_cached(value, self.v_scale)

    def around(self, cache: Any) -> _RoundingCache:
        """``cache`` with keys and values rounded on their way in."""
        return _RoundingCache(cache, self)


class _RoundingCache:
    """A ``transformers`` cache that holds what an FP8 cache would: rounded when stored, not at each use."""

    def __init__(self, cache: Any, rounding: Fp8KeyValueCache) -> None:
        self._cache, self._rounding = cache, rounding

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = self._cache.update(*self._rounding(key, value), *args, **kwargs)
        # A mark of our own, for the attention that comes next.
        key.octavo_cached = True  # type: ignore[attr-defined]
        return key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def fp8_linears(
    linears: Mapping[str, nn.Linear], folded: Mapping[str, Tensor]
) -> dict[str, Fp8Linear]:
    """What takes the places of a loaded layer's linear layers, once their weights are folded.

    Args:
        linears: those of the layer, by name.
        folded: canonical tensors of some of them.
    """
    found = {}
    for name, linear in linears.items():
        if f"{name}.weight_scale" in folded:
            device = linear.weight.device
            found[name] = Fp8Linear.of(
                linear,
                folded[f"{name}.weight"],
                folded[f"{name}.weight_scale"].to(device),
                folded[f"{name}.input_scale"].to(device)
                if f"{name}.input_scale" in folded
                else None,
            )
    return found


def fp8_caches(blocks: Iterable[str], scales: Mapping[str, Tensor]) -> dict[str, Fp8KeyValueCache]:
    """What rounds the keys and values of attention blocks as an FP8 cache does, by name of the block.

    Args:
        blocks: their names.
        scales: canonical, float32 scalars.
    """
    found = {}
    for block in blocks:
        cache = found[block] = Fp8KeyValueCache()
        cache.k_scale, cache.v_scale = (scales[f"{block}.{kind}_scale"] for kind in ("k", "v"))
    return found


def load(
    model: str | Path, device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Open a checkpoint for inference.

    Linear layers with FP8 weights hold them and compute as the checkpoint means it (see
    :mod:`octavo.linear`); keys and values pass through their FP8 scales. Memory peaks at the
    checkpoint's size.

    Args:
        model: a BF16, FP16 or FP32 checkpoint, or an FP8 edition in any dialect of
            :data:`octavo.formats.FORMATS`: a directory, or a hub id.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``.

    Returns:
        A causal language model of ``transformers``, in inference mode, and its tokenizer; None where
        the directory holds none.

    Raises:
        OctavoError: not a checkpoint Octavo can compute with; names the file and the tensor.
    """
    checkpoint = Checkpoint(resolve_model(model))
    try:
        edition = Edition(checkpoint)
        built = fp8_skeleton(edition)
        fill(built, edition, pick_device(device))
    finally:
        checkpoint.close()
    generation = checkpoint.directory / "generation_config.json"
    if generation.is_file():
        built.generation_config = GenerationConfig.from_pretrained(
            checkpoint.directory, local_files_only=True
        )
    return built, find_tokenizer(checkpoint.directory)


def fp8_skeleton(edition: Edition) -> PreTrainedModel:
    """An edition's model on the meta device, FP8 modules in place, each tensor of it found in the files in its shape.

    Raises:
        OctavoError: not a model Octavo can compute with; names the file and the tensor.
    """
    _, model = build_skeleton(edition)
    _quantize_modules(model, edition)
    state = {canonical_name(name): tensor for name, tensor in model.state_dict().items()}
    scales = {name: tensor for name, tensor in state.items() if name.endswith("_scale")}
    check_tensors(edition, model, {name: state[name] for name in state if name not in scales})
    _check_scales(edition, scales)
    return model


def _quantize_modules(model: PreTrainedModel, edition: Edition) -> None:
    """Put FP8 modules where the edition has FP8 tensors."""
    if edition.scheme is None:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and edition.is_quantized(name):
            model.set_submodule(
                name,
                Fp8Linear(module, edition.scheme.inputs_of(name), _scale_shape(edition, name)),
            )
        elif hasattr(module, "k_proj") and edition.scheme.kv_cache == "fp8":
            module.kv_cache = Fp8KeyValueCache()
            module.register_forward_pre_hook(_round_what_is_cached, with_kwargs=True)


def _scale_shape(edition: Edition, module: str) -> tuple[int, ...]:
    """Of its weight scale; that it is missing is told when all scales are checked."""
    return edition.weight_scale_shape(module) if f"{module}.weight_scale" in edition else ()


def _round_what_is_cached(
    block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache = kwargs.get("past_key_values")
    if cache is not None:
        kwargs = {**kwargs, "past_key_values": block.kv_cache.around(cache)}
    return args, kwargs


def fill(
    model: PreTrainedModel,
    edition: Edition,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Read every tensor to where it stays.

    Args:
        model: the edition's, of :func:`fp8_skeleton`.
        edition: whose tensors they are.
        device: where to.
        dtype: of all that is neither codes nor scales; that of the embedding by default.
    """
    dtype = dtype or edition[_embedding(model)].dtype
    model.config.dtype = dtype
    for name in model.state_dict():
        canonical = canonical_name(name)
        if canonical not in edition:
            continue
        tensor = edition.read(canonical)
        if name.endswith("_scale") or tensor.dtype == fp8.E4M3:
            _assign(model, name, tensor.to(device))
        else:
            _assign(model, name, tensor.to(device, dtype))
    model.tie_weights()
    for name, module in list(model.named_modules()):
        # Tables that no checkpoint holds.
        if type(module).__name__.endswith("RotaryEmbedding"):
            build: Any = type(module)
            model.set_submodule(name, build(model.config).to(device))


def _check_scales(edition: Edition, scales: dict[str, Tensor]) -> None:
    for name, expected in scales.items():
        if name not in edition:
            raise OctavoError(
                f"{edition.directory} has no tensor {name!r}, which its {edition.dialect} config "
                "promises. The edition is incomplete: quantize the original checkpoint again."
            )
        shape = edition[name].shape
        if math.prod(shape) != expected.numel():
            raise OctavoError(
                f"tensor {name!r} in {edition.file_of(name)} has shape {list(shape)}, expected "
                f"{expected.numel()} values. The edition is damaged, or of a scheme Octavo does not read."
            )


def canonical_name(name: str) -> str:
    """A tensor of the model under its canonical name: the cache's scales belong to the block."""
    return name.replace(".kv_cache.", ".")


def _embedding(model: PreTrainedModel) -> str:
    embedding: Any = model.get_input_embeddings()
    name: str = next(name for name, one in model.named_modules() if one is embedding)
    return f"{name}.weight"


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor


def _as_cached(tensor: Tensor, scale: Tensor) -> Tensor:
    """``tensor`` ``[batch, heads, tokens, head_dim]`` after FP8 storage, laid out by token."""
    return fp8.round_trip(tensor.transpose(1, 2).contiguous(), scale).transpose(1, 2)
