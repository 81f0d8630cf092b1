"""A Hugging Face model taken apart: embedding, rotary tables and decoder layers, one at a time.

The model's modules come from ``transformers`` and are built on the meta device, where they take no
memory. Weights are read from the checkpoint into one layer, the layer is used, and the weights are
dropped again.

How a layer is called (masks, rotary tables, keyword arguments) is not written here for each
architecture: the model's own ``forward`` runs once with recorders in place of its layers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from octavo.checkpoint import Checkpoint
from octavo.errors import OctavoError, not_finite, one_line

# Architectures whose streamed statistics are tested against the whole model.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

_ATTENTION = "octavo_sdpa"


class KeyValueProbe(nn.Module):
    """Sees keys and values as the cache holds them, after rotary embedding.

    One sits in every attention block under the name ``kv_probe``; its forward does nothing, and
    exists for forward hooks to be attached to.
    """

    def forward(self, key: Tensor, value: Tensor) -> None:
        """Args: key and value, each ``[batch, kv_heads, tokens, head_dim]``."""


def _probed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``transformers``' SDPA attention, after showing keys and values to the block's probe."""
    module.kv_probe(key, value)
    tokens = query.shape[2]
    if (
        attention_mask is None
        and query.device.type == "cpu"
        and _SLICE < tokens == key.shape[2] <= _KEY_BLOCK
    ):
        return _sliced_attention(query, key, value, kwargs.get("scaling")), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return result


# PyTorch's CPU kernel takes this many keys at a time and skips none but whole blocks, so that causal
# attention over up to so many tokens computes the full square.
_KEY_BLOCK = 512
_SLICE = 128


def _sliced_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention, bit for bit PyTorch's, a slice of queries at a time on the keys it may see."""
    slices = []
    for start in range(0, query.shape[2], _SLICE):
        stop = min(start + _SLICE, query.shape[2])
        slices.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, :stop],
                value[:, :, :stop],
                attn_mask=_causal_mask(start, stop, query.dtype) if start else None,
                is_causal=not start,
                scale=scale,
                enable_gqa=True,
            ).transpose(1, 2)
        )
    return torch.cat(slices, dim=1)


@functools.cache
def _causal_mask(start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """What queries ``start`` to ``stop`` add to their scores with keys 0 to ``stop``."""
    return torch.full((stop - start, stop), -torch.inf).triu(start + 1).to(dtype)


AttentionInterface.register(_ATTENTION, _probed_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, passes hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some models choose a layer's mask by an attribute of the layer.
        self.attention_type = getattr(layer, "attention_type", None)
        self.hidden: Tensor | None = None
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.hidden, self.kwargs = hidden, kwargs
        return hidden


class Decoder:
    """The decoder stack of one checkpoint.

    Attributes:
        config: the model's configuration.
        dtype: the dtype it computes in: that of its embedding.
        device: where it computes.
        layers: the decoder layers, on the meta device unless loaded.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Build the skeleton and check every tensor's shape against it.

        Raises:
            OctavoError: the architecture is not supported, or a tensor is missing or misshapen.
        """
        self.checkpoint = checkpoint
        self.device = device
        self.config, model = _build_skeleton(checkpoint)
        model.train(False).requires_grad_(False)
        self._base: Any = model.model
        self._prefix = "model."
        self.layers: list[nn.Module] = list(self._base.layers)
        self._check_shapes(model)
        self.dtype = checkpoint[self._embedding_name].dtype
        # The only buffers of the skeleton that no checkpoint holds.
        self._base.rotary_emb = type(self._base.rotary_emb)(self.config).to(device)
        self._base.norm = nn.Identity()
        for _, block in self.attention_blocks():
            block.kv_probe = KeyValueProbe()
        recorders: Any = [_Recorder(layer) for layer in self.layers]
        self._recorders: list[_Recorder] = recorders
        self._base.layers = nn.ModuleList(recorders)

    def layer_name(self, index: int) -> str:
        """The module name of a layer in the checkpoint, e.g. ``model.layers.0``."""
        return f"{self._prefix}layers.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of a decoder layer by full module name, in the model's order."""
        return {
            f"{self.layer_name(index)}.{name}": module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def attention_blocks(self, index: int | None = None) -> Iterator[tuple[str, Any]]:
        """Full name and module of each attention block, of one decoder layer or of all."""
        for number in range(len(self.layers)) if index is None else (index,):
            for name, module in self.layers[number].named_modules():
                if hasattr(module, "k_proj") and hasattr(module, "v_proj"):
                    yield f"{self.layer_name(number)}.{name}", module

    def tensor_names(self, index: int) -> list[str]:
        """The checkpoint's names of all tensors of a decoder layer, in the model's order."""
        return [f"{self.layer_name(index)}.{name}" for name in self.layers[index].state_dict()]

    def load(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """Give a decoder layer its weights.

        Args:
            index: which layer.
            tensors: those of :meth:`tensor_names`, on any device, in any floating dtype.

        Returns:
            The layer, ready to compute on the decoder's device and in its dtype.
        """
        layer, prefix = self.layers[index], f"{self.layer_name(index)}."
        state = {
            name.removeprefix(prefix): tensor.to(self.device, self.dtype, non_blocking=True)
            for name, tensor in tensors.items()
        }
        layer.load_state_dict(state, assign=True)
        return layer

    def unload(self, index: int) -> None:
        """Drop a layer's weights."""
        self.layers[index].to("meta")

    @torch.inference_mode()
    def embed(self, tokens: Tensor, batch: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """What goes into the first decoder layer, and how each layer is called.

        Only the embedding rows of tokens that occur are read.

        Args:
            tokens: int64 ``[samples, seq_len]``, every id below the vocabulary size.
            batch: samples at a time.

        Returns:
            Hidden states ``[samples, seq_len, hidden_size]`` in the decoder's dtype on its device,
            and for each layer the keyword arguments of its forward, for any batch of that
            ``seq_len`` (they are made for one sample and broadcast).
        """
        used, compact = torch.unique(tokens, return_inverse=True)
        rows = self.checkpoint.read_rows(self._embedding_name, used.tolist())
        if not rows.isfinite().all():
            raise not_finite(self._embedding_name)
        self._base.embed_tokens.weight = nn.Parameter(rows.to(self.device), requires_grad=False)
        compact = compact.to(self.device)
        size = (*tokens.shape, self.config.hidden_size)
        hidden = torch.empty(size, dtype=self.dtype, device=self.device)
        for part, ids in zip(torch.split(hidden, batch), torch.split(compact, batch), strict=True):
            part.copy_(self._record(ids))
        self._record(compact[:1])
        kwargs = [recorder.kwargs for recorder in self._recorders]
        for recorder in self._recorders:
            recorder.hidden = None
        self._base.embed_tokens.to("meta")
        return hidden, kwargs

    def _record(self, tokens: Tensor) -> Tensor:
        self._base(input_ids=tokens, use_cache=False)
        hidden = self._recorders[0].hidden
        assert hidden is not None
        return hidden

    @property
    def _embedding_name(self) -> str:
        return f"{self._prefix}embed_tokens.weight"

    def _check_shapes(self, model: nn.Module) -> None:
        tied = set(getattr(model, "all_tied_weights_keys", ()))
        for name, expected in model.state_dict().items():
            if name in tied and name not in self.checkpoint:
                continue
            if name not in self.checkpoint:
                raise OctavoError(
                    f"{self.checkpoint.directory} has no tensor {name!r}, which config.json "
                    f"(model_type {self.config.model_type!r}) calls for. "
                    "Check that config.json and the weights belong together."
                )
            entry = self.checkpoint[name]
            if entry.shape != tuple(expected.shape):
                raise OctavoError(
                    f"tensor {name!r} in {self.checkpoint.file_of(name)} has shape {list(entry.shape)}, "
                    f"config.json calls for {list(expected.shape)}. "
                    "Check that config.json and the weights belong together."
                )
            if entry.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise OctavoError(
                    f"tensor {name!r} in {self.checkpoint.file_of(name)} is {entry.dtype}, expected "
                    "bfloat16, float16 or float32. Start from the original, unquantized checkpoint."
                )


def _build_skeleton(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, PreTrainedModel]:
    path = checkpoint.directory / "config.json"
    kind = checkpoint.config.get("model_type")
    if kind not in SUPPORTED:
        raise OctavoError(
            f"{path} has model_type {kind!r}, which is not supported. "
            f"Supported: {', '.join(SUPPORTED)}. Octavo never runs code from a checkpoint: "
            "--trust-remote-code does not exist."
        )
    try:
        # A copy: from_dict writes into what it is given.
        content = copy.deepcopy(checkpoint.config)
        config = CONFIG_MAPPING[kind].from_dict(content, attn_implementation=_ATTENTION)
        build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            model: PreTrainedModel = build(config)
    except Exception as error:  # transformers raises many kinds for many faults of a config
        raise OctavoError(
            f"{path} is not a valid {kind} configuration: {one_line(error)}. "
            "Restore the file from the original checkpoint."
        ) from error
    if config.num_hidden_layers < 1:
        raise OctavoError(
            f"{path} has num_hidden_layers {config.num_hidden_layers}, expected at least 1. "
            "Restore the file from the original checkpoint."
        )
    beyond = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(beyond) for name in checkpoint):
        raise OctavoError(
            f"{path} has num_hidden_layers {config.num_hidden_layers}, but the weights have tensors of "
            f"a further layer ({beyond}*). Check that config.json and the weights belong together."
        )
    return config, model
