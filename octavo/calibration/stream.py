"""Hidden states on their way through the decoder, one layer at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.calibration.observers import AmaxObserver
from octavo.decoder import Decoder
from octavo.errors import OctavoError
from octavo.fused import fused_kernels

# Tokens computed at a time: enough to keep matrix products efficient, few enough that the
# activations of a batch stay small.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}


class CalibrationStream:
    """The calibration samples' hidden states in front of the next decoder layer.

    They belong to the unquantized model: every layer computes with its original weights. A context
    manager: on a CPU it holds a pool of threads.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """
        Args:
            decoder: whose layers will be run.
            tokens: int64 ``[samples, seq_len]``.
        """
        self._decoder = decoder
        batch = max(1, _BATCH_TOKENS[decoder.device.type] // tokens.shape[1])
        hidden, self._kwargs = decoder.embed(tokens, batch)
        # A multiple of four batches of equal size, so that no core of a few waits for a last one.
        # Not of the number of cores: results should not depend on that.
        self._batches = torch.tensor_split(
            hidden, min(-(-len(tokens) // (4 * batch)) * 4, len(tokens))
        )
        # On a CPU each core works on a batch of its own: no operation waits for another thread,
        # those that PyTorch does not parallelize run in parallel too, and a core that is busy
        # elsewhere delays one batch instead of every operation.
        self._threads = threads = torch.get_num_threads()
        workers = min(threads, len(self._batches)) if decoder.device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(
            workers, "octavo-layer", lambda: torch.set_num_threads(threads // workers)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()
        # A thread's number of threads is also the default of threads to come.
        torch.set_num_threads(self._threads)

    def run(self, index: int, watched: set[str]) -> dict[str, Tensor]:
        """Move the hidden states through decoder layer ``index``, which must be loaded.

        Args:
            index: the layer; layers are run in order.
            watched: linear layers whose inputs are measured.

        Returns:
            Amax as float32 scalars: for each watched linear under its name, and for each attention
            block as ``<block>.k`` and ``<block>.v``.

        Raises:
            OctavoError: an activation is NaN or infinite.
        """
        layer = self._decoder.layers[index]
        with AmaxObserver() as observer, fused_kernels(layer):
            for name, linear in self._decoder.linears(index).items():
                if name in watched:
                    observer.watch_input(name, linear)
            for name, block in self._decoder.attention_blocks(index):
                observer.watch_key_value(f"{name}.k", f"{name}.v", block.kv_cache)
            self._forward(layer, self._kwargs[index])
        maxima = observer.result()
        for name, value in maxima.items():
            if not value.isfinite():
                raise OctavoError(
                    f"The calibration activations at {name} reach {value.item()}: the model overflows "
                    f"in {self._decoder.dtype} on this text. Check the checkpoint with another tool, "
                    "or convert it to bfloat16."
                )
        return maxima

    def _forward(self, layer: nn.Module, kwargs: dict[str, Any]) -> None:
        """Replace the hidden states by the layer's output, batch by batch."""

        @torch.inference_mode()
        def step(hidden: Tensor) -> None:
            hidden.copy_(layer(hidden, **kwargs))

        list(self._pool.map(step, self._batches))
