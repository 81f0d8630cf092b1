"""Hidden states on their way through the decoder, some layers at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from octavo.calibration.hidden import HiddenShape, HiddenStates
from octavo.calibration.moments import SecondMoments
from octavo.calibration.observers import Observer
from octavo.decoder import Decoder
from octavo.errors import OctavoError
from octavo.fp8 import Map
from octavo.fused import fused_kernels
from octavo.scheme import Scales

# Tokens computed at a time: enough to keep matrix products efficient, few enough that the
# activations of a batch stay small.
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}

# Tokens whose second moments are taken: with four times as many, KL differed by no more than noise (SmolLM2).
MOMENT_TOKENS = 16384

# How often the hidden states of one pass are brought to the disk while it computes, so that little is left
# to wait for at its end.
_SYNCS = 4


def batches_at_once(device: torch.device, cores: int) -> int:
    """How many batches to compute at a time: one on each core of a CPU
    (:func:`octavo.threads.one_thread_each`); on a GPU one is copied while another is computed."""
    return 2 if device.type == "cuda" else cores


class Inputs(NamedTuple):
    """What linear layers that share an input see.

    Attributes:
        ranges: by name, float32 scalars, as :meth:`CalibrationStream.run` gives them.
        moments: the sum of ``xᵀ x`` over some of the tokens, float32 ``[width, width]``.
    """

    ranges: dict[str, Tensor]
    moments: Tensor


class Examples(NamedTuple):
    """What a layer should make of what.

    Attributes:
        read: gives inputs and targets of a batch, each ``[samples, seq_len, hidden_size]``.
        batches: how many there are.
        arguments: what the layer is called with beside its input.
    """

    read: Callable[[int], tuple[Tensor, Tensor]]
    batches: int
    arguments: Mapping[str, Any]


class _Reached(Exception):  # noqa: N818 (nothing is wrong)
    """A forward pass has come as far as it is needed."""


class CalibrationStream:
    """The calibration samples' hidden states between decoder layers.

    They belong to the unquantized model, or to the quantized one if layers are replaced before the samples move on;
    with two streams, the first is the unquantized model's and the second the quantized one's. Two files take
    turns: a pass reads one and writes the other. A context manager: it holds the files, and threads.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: HiddenShape,
        directory: Path,
        target: Path,
        *,
        scales: Scales = "amax",
        workers: int = 1,
        before_batch: Callable[[], None] = lambda: None,
        source: Callable[[int], Tensor] | None = None,
    ) -> None:
        """
        Args:
            decoder: whose layers will be run.
            shape: of the hidden states.
            directory: where the files are, those of an interrupted run or new ones.
            target: the output they are for, named in errors.
            scales: what they are taken from.
            workers: batches at a time.
            before_batch: called before each of them, in each pass.
            source: gives the batches that go into the first pass, of all streams, in the place of :meth:`embed`.
        """
        self._decoder, self._source, self._before_batch = decoder, source, before_batch
        self._scales = scales
        # The stream that is looked at: the only one, or the quantized model's.
        self._last = shape.streams - 1
        # The batch that a thread computes, and the attention block whose output is kept.
        self._current = threading.local()
        self._kept: str | None = None
        with ExitStack() as opened:
            self._states = []
            for number in (0, 1):
                states = HiddenStates(directory / f"hidden-{number}", shape, target)
                opened.callback(states.close)
                self._states.append(states)
            # Kept open, now that there was room for both.
            opened.pop_all()
        self._kwargs = decoder.call_arguments(shape.seq_len)
        # A batch to each core: no operation waits for another thread, those that PyTorch does not
        # parallelize run in parallel too, and a core that is busy elsewhere delays one batch instead of
        # every operation.
        self._workers = workers
        self._tokens = sum(shape.batches) * shape.seq_len
        self._pool = ThreadPoolExecutor(workers, "octavo-layer")
        self._disk = ThreadPoolExecutor(1, "octavo-hidden")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._disk.shutdown(cancel_futures=True)
        for states in self._states:
            states.close()

    def embed(self, tokens: Tensor) -> None:
        """Fill the place in front of the first pass.

        Args:
            tokens: int64 ``[samples, seq_len]``.
        """
        batches = torch.split(tokens, list(self._states[0].shape.batches))
        for index, hidden in enumerate(self._decoder.embed(batches)):
            for stream in range(self._states[0].shape.streams):
                self._states[0].write(index, hidden.cpu(), stream)

    def receive(self) -> None:
        """Take all batches from the source into the place in front of the first pass, to be read more than once."""
        assert self._source is not None
        source, self._source = self._source, None
        for index in range(len(self._states[0].shape.batches)):
            self._states[0].write_all(index, source(index))

    def states(self, place: int) -> HiddenStates:
        """The hidden states behind pass number ``place - 1`` and in front of number ``place``."""
        return self._states[place % 2]

    def run(
        self,
        place: int,
        layers: Sequence[int],
        watched: Sequence[Sequence[str]],
        *,
        last: bool,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Tensor]:
        """Move the hidden states through decoder layers, which must be loaded.

        Args:
            place: number of the pass.
            layers: the layers, in order.
            watched: linear layers whose inputs are measured, in groups that share one.
            last: nothing comes after it, so what the last layer returns is dropped.
            on_batch: called with the number of each batch that has been written.

        Returns:
            What scales are taken from, float32 scalars: for each watched linear under its name, and for
            each attention block as ``<block>.k`` and ``<block>.v``.

        Raises:
            OctavoError: an activation is NaN or infinite.
        """
        modules = [self._decoder.layers[index] for index in layers]
        source = self._read_source if self._source and not place else self.states(place).read
        stream, target = self._last, self.states(place + 1)
        device = self._decoder.device

        @torch.inference_mode()
        def step(index: int) -> None:
            self._before_batch()
            self._current.batch = index
            with _own_stream(device):
                hidden = source(index, stream).to(device, non_blocking=True)
                for module, number in zip(modules, layers, strict=True):
                    hidden = module(hidden, **self._kwargs[number])
                if not last:
                    target.write(index, hidden.cpu(), stream)
            on_batch(index)

        with ExitStack() as contexts:
            observer = contexts.enter_context(Observer(self._scales))
            for module in modules:
                contexts.enter_context(fused_kernels(module))
            for number in layers:
                self._watch(observer, number, watched)
            if self._kept is not None:
                (layer,) = layers
                contexts.enter_context(self._attention(place, layer, self._kept))
                self._kept = None
            self._all_batches(step, target, last)
        return self._ranges(observer)

    def follow(self, place: int, layer: int) -> None:
        """Move the unquantized model's hidden states through a loaded layer, which has its original weights.

        Args:
            place: number of the pass.
            layer: which.
        """
        module, target = self._decoder.layers[layer], self.states(place + 1)

        @torch.inference_mode()
        def step(index: int) -> None:
            self._before_batch()
            with _own_stream(self._decoder.device):
                hidden = self._inputs(place, index, 0)
                target.write(index, module(hidden, **self._kwargs[layer]).cpu(), 0)

        with fused_kernels(module):
            deque(self._pool.map(step, range(len(target.shape.batches))), maxlen=0)

    def examples(self, place: int, layer: int) -> Examples:
        """What the quantized model gives a layer, and what it should make of it: what :meth:`follow` has.

        What was kept of the layer is forgotten, since it will change.

        Args:
            place: number of the pass.
            layer: which.
        """
        self._kept = None

        def read(index: int) -> tuple[Tensor, Tensor]:
            self._before_batch()
            return self._inputs(place, index, self._last), self._inputs(place + 1, index, 0)

        return Examples(read, len(self._states[0].shape.batches), self._kwargs[layer])

    @property
    def over(self) -> Map:
        """Applies a function to batches, one on each core."""
        return self._pool.map

    def _inputs(self, place: int, index: int, stream: int) -> Tensor:
        return self.states(place).read(index, stream).to(self._decoder.device, non_blocking=True)

    def _read_source(self, index: int, stream: int) -> Tensor:
        assert self._source is not None
        return self._source(index)[stream]

    def look(
        self, place: int, layer: int, names: Sequence[str], *, cache: bool, after: str | None = None
    ) -> Inputs:
        """Run the samples into a loaded decoder layer, as far as what is looked for.

        What an attention block gives out need not be computed again once nothing in it changes any more: the first call
        with its name keeps it, in the place of the hidden states behind this pass, and from then on until these are
        there it is taken from there.

        Args:
            place: number of the pass.
            layer: which.
            names: linear layers that share an input.
            cache: also look at what the cache gets, which comes after these inputs.
            after: full name of an attention block whose output these inputs depend on.

        Raises:
            OctavoError: an activation is NaN or infinite.
        """
        module, device = self._decoder.layers[layer], self._decoder.device
        linear = self._decoder.linears(layer)[names[0]]
        moments = SecondMoments(linear.in_features, device)
        seen = threading.local()

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.inputs = args[0]

        def stop(*_: Any) -> None:
            raise _Reached

        @torch.inference_mode()
        def step(index: int) -> Tensor:
            self._before_batch()
            self._current.batch = index
            with _own_stream(device), suppress(_Reached):
                module(self._inputs(place, index, self._last), **self._kwargs[layer])
            inputs: Tensor = seen.inputs
            return inputs

        with ExitStack() as contexts:
            observer = contexts.enter_context(Observer(self._scales))
            contexts.enter_context(fused_kernels(module))
            if after is not None:
                contexts.enter_context(self._attention(place, layer, after))
            observer.watch_input(names, linear)
            contexts.callback(linear.register_forward_pre_hook(catch).remove)
            last = linear
            if cache:
                for name, block in self._decoder.attention_blocks(layer):
                    observer.watch_key_value(f"{name}.k", f"{name}.v", block.kv_cache)
                    last = block.kv_cache
            # After the observer's: hooks are called in the order they came.
            contexts.callback(last.register_forward_pre_hook(stop).remove)
            count = len(self._states[0].shape.batches)
            enough = min(-(-count * MOMENT_TOKENS // self._tokens), count)
            # From all over the text, in whose order the samples are.
            chosen = [number * count // enough for number in range(enough)]
            for first in range(0, enough, self._workers):
                batches = chosen[first : first + self._workers]
                moments.add(list(self._pool.map(step, batches)), self._pool.map)
            rest = set(range(count)) - set(chosen)
            deque(self._pool.map(step, rest), maxlen=0)
        if after is not None:
            self._kept = after
        return Inputs(self._ranges(observer), moments.result())

    @contextmanager
    def _attention(self, place: int, layer: int, name: str) -> Iterator[None]:
        """Keep what an attention block gives out, or have it give out what was kept."""
        blocks = dict(self._decoder.attention_blocks(layer))
        block, states = blocks[name], self.states(place + 1)

        def keep(_: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
            states.write(self._current.batch, output[0].cpu(), self._last)

        def give(*_: Any, **__: Any) -> tuple[Tensor, None]:
            return self._inputs(place + 1, self._current.batch, self._last), None

        if self._kept != name:
            hook = block.register_forward_hook(keep)
            try:
                yield
            finally:
                hook.remove()
            return
        # On the instance: the class keeps its own.
        block.forward = give
        try:
            yield
        finally:
            del block.forward

    def _all_batches(self, step: Callable[[int], None], target: HiddenStates, last: bool) -> None:
        count = len(target.shape.batches)
        syncs: list[Future[None]] = []
        for done, _ in enumerate(self._pool.map(step, range(count)), start=1):
            if not last and done < count and done * _SYNCS // count > len(syncs):
                syncs.append(self._disk.submit(target.sync))
        for sync in syncs:
            sync.result()

    def _watch(self, observer: Observer, index: int, watched: Sequence[Sequence[str]]) -> None:
        linears = self._decoder.linears(index)
        for names in watched:
            if names[0] in linears:
                observer.watch_input(names, linears[names[0]])
        for name, block in self._decoder.attention_blocks(index):
            observer.watch_key_value(f"{name}.k", f"{name}.v", block.kv_cache)

    def _ranges(self, observer: Observer) -> dict[str, Tensor]:
        for name, value in observer.maxima().items():
            if not value.isfinite():
                raise OctavoError(
                    f"The calibration activations at {name} reach {value.item()}: the model overflows "
                    f"in {self._decoder.dtype} on this text. Check the checkpoint with another tool, "
                    "or convert it to bfloat16."
                )
        return observer.ranges()


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream for the calling thread's batch; all of it is done at the end."""
    if device.type != "cuda":
        yield
        return
    new: Any = torch.cuda.Stream  # has no types
    stream = new(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
