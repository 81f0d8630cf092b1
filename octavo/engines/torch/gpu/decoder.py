"""The decoder on a GPU: a cache in blocks, and one way through the layers for tokens of any sequences."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.engines.torch.batch import Batch
from octavo.engines.torch.gpu import reference
from octavo.engines.torch.gpu.cache import BlockCache, cached_bytes
from octavo.engines.torch.gpu.network import Layer, Network, read_network
from octavo.engines.torch.gpu.places import Places, places_of
from octavo.engines.torch.gpu.prefill import prefill_attention
from octavo.engines.torch.gpu.steps import MOST, Step, filled, size_for


class GpuDecoder:
    """A :class:`octavo.engines.torch.batch.Model`. Not for several threads at a time.

    Attributes:
        vocab_size: token ids are below.
        max_positions: tokens of a sequence, at most.
        cached_bytes: of a token's keys and values in all layers.
        device: where it computes.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self.device = network.embedding.device
        shape = network.shape
        self.vocab_size, self.max_positions = shape.vocab, shape.positions
        self.cached_bytes = cached_bytes(shape, network.cache_dtype)
        self._kernels = _kernels_for(self.device)
        here: Any = torch.cuda.device_of  # has no types
        self._current = partial(here, network.embedding)
        # The reference of attention would read all that a sequence might ever have: a graph knows no lengths.
        self._captures = self._kernels is not reference and network.waits_for_nothing
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    def new_cache(self, blocks: int) -> BlockCache:
        """See :meth:`octavo.engines.torch.batch.Model.new_cache`."""
        network = self._network
        return BlockCache(network.shape, blocks, network.cache_dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: BlockCache) -> Tensor:
        """See :meth:`octavo.engines.torch.batch.Model.forward`."""
        wanted, count = batch.wanted.to(self.device), len(batch.tokens)
        # Kernels are launched on the thread's own GPU, which may be another.
        with self._current():
            if len(batch.tables) == count <= MOST:
                return self._step(batch, size_for(count), cache)[wanted]
            return self._run(places_of(batch, self.device), cache)[wanted]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See :meth:`octavo.engines.torch.batch.Model.logits`."""
        return torch.nn.functional.linear(hidden, self._network.head)

    def close(self) -> None:
        """There are no threads."""

    def _step(self, batch: Batch, size: int, cache: BlockCache) -> Tensor:
        """Single tokens: hidden states of these and of the rows that fill the batch."""
        places = places_of(filled(batch, size, cache.blocks), self.device)
        if not self._captures:
            return self._run(places, cache)
        if size not in cache.steps:
            cache.steps[size] = Step(
                lambda own: self._run(own, cache),
                *(size, self.max_positions, cache.blocks, self.device, self._pool),
            )
        return cache.steps[size](places)

    def _run(self, places: Places, cache: BlockCache) -> Tensor:
        """All layers and the final norm: BF16 ``[n, hidden]``."""
        network, kernels = self._network, self._kernels
        eps = network.shape.eps
        hidden = network.embedding[places.tokens]
        update: Tensor | None = None
        for layer, *stored in zip(network.layers, cache.keys, cache.values, strict=True):
            normed = kernels.add_rms_norm(hidden, update, layer.before, eps, layer.qkv.scale)
            attended = self._attend(layer, layer.qkv(normed), tuple(stored), places)
            (update,) = layer.out(kernels.quantize(attended, layer.out.scale))
            normed = kernels.add_rms_norm(hidden, update, layer.behind, eps, layer.gate_up.scale)
            gate, up = layer.gate_up(normed)
            (update,) = layer.down(kernels.silu_mul(gate, up, layer.down.scale))
        result: Tensor = kernels.add_rms_norm(hidden, update, network.norm, eps, None)
        return result

    def _attend(
        self, layer: Layer, qkv: list[Tensor], stored: tuple[Tensor, Tensor], places: Places
    ) -> Tensor:
        """Attention of new tokens, whose keys and values go into the cache: ``[n, heads * head_dim]``."""
        network = self._network
        queries, keys, values = (one.view(len(one), -1, network.shape.head_dim) for one in qkv)
        if layer.head_norms is not None:
            queries, keys = (
                self._kernels.add_rms_norm(
                    one.flatten(0, 1), None, weight, network.shape.eps, None
                ).view(one.shape)
                for one, weight in zip((queries, keys), layer.head_norms, strict=True)
            )
        scales = (layer.key_scale, layer.value_scale)
        queries = self._kernels.rotate_and_store(
            *(queries, keys, values, network.cos, network.sin),
            *(stored, places.tables, places.sequences, places.positions, scales),
        )
        if not places.chunks:
            rows = places.tables, places.positions
            found: Tensor = self._kernels.decode_attention(
                queries, stored, *rows, layer.window, scales
            )
            return found.flatten(1)
        attended = torch.empty_like(queries)
        if len(at := places.singles):
            rows = places.tables[places.sequences[at]], places.positions[at]
            attended[at] = self._kernels.decode_attention(
                queries[at], stored, *rows, layer.window, scales
            )
        for chunk in places.chunks:
            attended[chunk.tokens] = prefill_attention(
                queries[chunk.tokens],
                *(stored, places.tables[chunk.rows], chunk, layer.window, scales),
            )
        return attended.flatten(1)


def _kernels_for(device: torch.device) -> Any:
    """What computes between the matrix products: compiled kernels where they can run, or else their reference."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return import_module("octavo.engines.torch.gpu.kernels")
    return reference


def open_decoder(directory: Path, device: torch.device) -> GpuDecoder:
    """Read a checkpoint to a device.

    Args:
        directory: BF16 or FP8, in any dialect.
        device: a GPU, or a CPU to test it.

    Raises:
        OctavoError: not a model the embedded engine computes.
    """
    return GpuDecoder(read_network(directory, device))
