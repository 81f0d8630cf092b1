"""A Hugging Face model taken apart: embedding, rotary tables and decoder layers, one at a time.

The model's modules come from ``transformers`` and are built on the meta device, where they take no
memory. Weights are read from the checkpoint into one layer, the layer is used, and the weights are
dropped again.

How a layer is called (masks, rotary tables, keyword arguments) is not written here for each
architecture: the model's own ``forward`` runs once with recorders in place of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.attention import KeyValueCache
from octavo.checkpoint import Checkpoint
from octavo.errors import not_finite
from octavo.skeleton import build_skeleton, check_tensors


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
        dtype: the dtype it computes in.
        device: where it computes.
        layers: the decoder layers, on the meta device unless loaded.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """Build the skeleton and check every tensor's shape against it.

        Args:
            checkpoint: the model.
            device: where to compute.
            dtype: to compute in, that of the embedding by default.

        Raises:
            OctavoError: the architecture is not supported, or a tensor is missing or misshapen.
        """
        self.checkpoint = checkpoint
        self.device = device
        self.config, model = build_skeleton(checkpoint)
        self._base: Any = model.model
        self._prefix = "model."
        self.layers: list[nn.Module] = list(self._base.layers)
        check_tensors(checkpoint, model, model.state_dict())
        self.dtype = dtype or checkpoint[self._embedding_name].dtype
        # The only buffers of the skeleton that no checkpoint holds.
        self._base.rotary_emb = type(self._base.rotary_emb)(self.config).to(device)
        self._norm: nn.Module = self._base.norm
        self._base.norm = nn.Identity()
        # Rows of the embedding are numbered anew, so the padding token's number means nothing.
        self._base.embed_tokens.padding_idx = None
        for _, block in self.attention_blocks():
            block.kv_cache = KeyValueCache()
        recorders: Any = [_Recorder(layer) for layer in self.layers]
        self._recorders: list[_Recorder] = recorders
        self._replaced: dict[str, nn.Module] = {}
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

    def replace(self, index: int, name: str, module: nn.Module) -> None:
        """Put another module in the place of one of a layer, until :meth:`restore` or
        :meth:`unload`.

        Args:
            index: the layer.
            name: full name of the module.
            module: what it computes with instead.
        """
        layer, own = self.layers[index], name.removeprefix(f"{self.layer_name(index)}.")
        self._replaced.setdefault(own, layer.get_submodule(own))
        layer.set_submodule(own, module)

    def restore(self, index: int) -> None:
        """Undo :meth:`replace`."""
        while self._replaced:
            self.layers[index].set_submodule(*self._replaced.popitem())

    def unload(self, index: int) -> None:
        """Drop a layer's weights."""
        self.restore(index)
        self.layers[index].to("meta")

    def norm(self) -> nn.Module:
        """What comes behind the last layer and in front of ``lm_head``, with its weight.

        Raises:
            OctavoError: that holds NaN or infinity.
        """
        name = f"{self._prefix}norm.weight"
        weight = self.checkpoint.read(name)
        if not weight.isfinite().all():
            raise not_finite(name)
        self._norm.load_state_dict({"weight": weight.to(self.device, self.dtype)}, assign=True)
        return self._norm

    @property
    def head_name(self) -> str:
        """The checkpoint's name of the tensor that is ``lm_head``: the embedding where they are tied."""
        return self._embedding_name if self.config.tie_word_embeddings else "lm_head.weight"

    @torch.inference_mode()
    def call_arguments(self, seq_len: int) -> list[dict[str, Any]]:
        """How each layer is called: the keyword arguments of its forward, for any batch of samples of
        ``seq_len`` tokens (they are made for one sample and broadcast)."""
        self._give_embedding(torch.zeros(1, self.config.hidden_size, dtype=self.dtype))
        self._record(torch.zeros(1, seq_len, dtype=torch.int64, device=self.device))
        self._base.embed_tokens.to("meta")
        kwargs = [recorder.kwargs for recorder in self._recorders]
        self._forget()
        return kwargs

    @torch.inference_mode()
    def embed(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """What goes into the first decoder layer.

        Only the embedding rows of tokens that occur are read.

        Args:
            batches: int64 ``[samples, seq_len]`` each, every id below the vocabulary size.

        Yields:
            For each batch hidden states ``[samples, seq_len, hidden_size]`` in the decoder's dtype on
            its device.

        Raises:
            OctavoError: the embedding holds NaN or infinity.
        """
        used = torch.unique(torch.cat([batch.reshape(-1) for batch in batches]))
        rows = self.checkpoint.read_rows(self._embedding_name, used.tolist())
        if not rows.isfinite().all():
            raise not_finite(self._embedding_name)
        self._give_embedding(rows)
        for batch in batches:
            yield self._record(torch.searchsorted(used, batch).to(self.device))
        self._forget()
        self._base.embed_tokens.to("meta")

    def _give_embedding(self, rows: Tensor) -> None:
        weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        self._base.embed_tokens.weight = weight

    def _record(self, tokens: Tensor) -> Tensor:
        self._base(input_ids=tokens, use_cache=False)
        hidden = self._recorders[0].hidden
        assert hidden is not None
        return hidden

    def _forget(self) -> None:
        """Let go of what the recorders saw."""
        for recorder in self._recorders:
            recorder.hidden, recorder.kwargs = None, {}

    @property
    def _embedding_name(self) -> str:
        return f"{self._prefix}embed_tokens.weight"
