"""One pass over the decoder layers: errors of weights and inputs, and what each unit's quantization costs.

Each layer is read once. Its scales come from the calibration samples on the unquantized stream, in the model's dtype,
as in a quantization. Then the model's hidden states go through it with one unit quantized, once for each unit: so variants
begin. Those of layers before go through it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo import canonical
from octavo.analysis.cost import calibration_work, head_work
from octavo.analysis.divergence import divergences
from octavo.analysis.inputs import InputError, InputErrors
from octavo.analysis.units import Unit, units_of
from octavo.analysis.variants import EVERYTHING, FIRST, ORIGINAL, Variants, variants_shape
from octavo.calibration import CalibrationStream, batches_at_once
from octavo.decoder import Decoder
from octavo.job import Job, hidden_shape
from octavo.linear import Fp8Linear
from octavo.loading import fp8_caches, fp8_linears
from octavo.memory import Settings, release
from octavo.scheme import Scheme
from octavo.threads import one_thread_each

OnWork = Callable[[float], None]


class Measured(NamedTuple):
    """What the pass found.

    Attributes:
        units: what was quantized, each on its own.
        kl: KL(model ‖ model with the unit quantized), float64 ``[units, windows, seq_len]``, in nats.
        everything: with all units quantized at once, float64 ``[windows, seq_len]``.
        weights: what rounding did to each linear layer's weight, as :class:`octavo.fp8.RoundingError`.
        inputs: what rounding did to its inputs.
    """

    units: list[Unit]
    kl: Tensor
    everything: Tensor
    weights: dict[str, dict[str, Any]]
    inputs: dict[str, InputError]


def nearest(scheme: Scheme) -> Scheme:
    """The scheme whose weights are rounded to nearest."""
    return scheme.model_copy(update={"rounding": "nearest"})


def all_units(job: Job) -> list[Unit]:
    """The units of all layers, in order; each layer's last is the whole layer."""
    return [
        unit for index, plan in enumerate(job.plans) for unit in units_of(index, plan, job.scheme)
    ]


def measure(
    job: Job,
    units: Sequence[Unit],
    samples: Tensor | None,
    tokens: Tensor,
    settings: Settings,
    directory: Path,
    target: Path,
    on_work: OnWork = lambda _: None,
) -> Measured:
    """Find out what quantizing each unit of a model costs, as much as :func:`octavo.analysis.cost.cost_of` says.

    Args:
        job: the model and the scheme. Whatever the scheme's rounding, weights are rounded to nearest.
        units: of it, in the order of their layers.
        samples: for calibration, int64 ``[samples, seq_len]``; None where the scheme needs none.
        tokens: to measure on, int64 ``[windows, seq_len]``, of another text than the samples.
        settings: how memory is used.
        directory: an existing one, for files of hidden states.
        target: the output they are for, named in errors.
        on_work: called with how much more is done, in passes of the windows through a layer.

    Raises:
        OctavoError: a tensor or an activation is NaN or infinite.
        WriteError: the disk has no space for the hidden states.
    """
    device = job.decoder.device
    slots = FIRST + len(units)
    # Apart from the one that calibrates, in the model's own dtype, as a quantization does.
    decoder = Decoder(job.checkpoint, device, torch.float32)
    with ExitStack() as stack:
        cores = stack.enter_context(one_thread_each())
        workers = batches_at_once(device, min(cores, settings.workers))
        before_batch = partial(release, settings.threshold)
        stream = None
        if samples is not None:
            stream = CalibrationStream(
                job.decoder,
                hidden_shape(job, samples, settings),
                directory,
                target,
                scales=job.scheme.scales,
                workers=workers,
                before_batch=before_batch,
            )
            stack.enter_context(stream)
            stream.embed(samples)
        variants = Variants(
            decoder,
            variants_shape(decoder, slots, *tokens.shape),
            slots,
            directory,
            target,
            workers=workers,
            before_batch=before_batch,
        )
        stack.enter_context(variants)
        variants.embed(tokens)
        casts = stack.enter_context(ThreadPoolExecutor(cores, "octavo-cast"))
        layers = _Layers(job, decoder, units, stream, variants, casts, on_work)
        for index in range(len(job.plans)):
            layers.measure(index)
            on_work(calibration_work(samples, tokens))
        head = slots * head_work(job)
        kl = divergences(decoder, variants, workers, lambda share: on_work(share * head))
    return Measured(list(units), kl[FIRST:], kl[EVERYTHING], layers.weights, layers.inputs.result())


class _Quantized(NamedTuple):
    """What takes the places of a layer's modules.

    Attributes:
        linears: by name of the linear layer.
        caches: by name of the attention block.
    """

    linears: dict[str, Fp8Linear]
    caches: Mapping[str, nn.Module]

    def of(self, units: Iterable[Unit]) -> dict[str, nn.Module]:
        """Those of some units, by name of the module they take the place of."""
        found: dict[str, nn.Module] = {}
        for unit in units:
            linears = {name: self.linears[name] for name in unit.modules}
            if unit.dynamic:
                linears = {name: linear.with_dynamic_inputs() for name, linear in linears.items()}
            found |= linears
            found |= {f"{block}.kv_cache": self.caches[block] for block in unit.blocks}
        return found


class _Layers:
    """The decoder layers, measured one after another.

    Attributes:
        weights: what rounding did to each linear layer's weight so far.
        inputs: and to its inputs.
    """

    def __init__(
        self,
        job: Job,
        decoder: Decoder,
        units: Sequence[Unit],
        stream: CalibrationStream | None,
        variants: Variants,
        casts: ThreadPoolExecutor,
        on_work: OnWork,
    ) -> None:
        self._job, self._decoder, self._scheme = job, decoder, nearest(job.scheme)
        self._slots = dict(zip(units, range(FIRST, variants.slots), strict=True))
        self._stream, self._variants, self._casts = stream, variants, casts
        self._on_pass = partial(on_work, 1.0)
        self.weights: dict[str, dict[str, Any]] = {}
        self.inputs = InputErrors()

    def measure(self, index: int) -> None:
        """Measure a layer, and move all hidden states behind it."""
        checkpoint, device = self._job.checkpoint, self._decoder.device
        tensors = {
            name: checkpoint.read(name).to(device) for name in self._job.plans[index].tensors
        }
        aligned = self._job.align_keys(index, tensors)
        weights = {
            name: canonical.finite_amax(name, tensor, self._casts.map)
            for name, tensor in tensors.items()
        }
        activations = self._calibrate(index, tensors)
        self._decoder.load(index, tensors)
        quantized = self._quantize(index, tensors, weights, activations, aligned)
        del tensors
        self._begin(index, quantized)
        self._advance(index, quantized, activations)
        self._decoder.unload(index)

    def _calibrate(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._stream is None:
            return {}
        watched = canonical.inputs(self._job.plans[index])
        last = index + 1 == len(self._job.plans)
        self._job.decoder.load(index, tensors)
        activations = self._stream.run(index, [index], watched, last=last)
        self._job.decoder.unload(index)
        return activations

    def _quantize(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        activations: Mapping[str, Tensor],
        aligned: Collection[str],
    ) -> _Quantized:
        plan = self._job.plans[index]
        names = [f"{module}.weight" for module in plan.linears]
        folded, errors = canonical.quantize_unit(
            names,
            tensors,
            canonical.weight_amax(plan.linears, weights, self._scheme),
            activations,
            self._scheme,
            self._casts.map,
        )
        self.weights |= errors
        scales = canonical.cache_scales(plan, activations, self._scheme, aligned)
        return _Quantized(
            fp8_linears(self._decoder.linears(index), folded),
            fp8_caches(plan.attention, scales) if scales else {},
        )

    def _begin(self, index: int, quantized: _Quantized) -> None:
        """Run the model's hidden states through the layer with one unit quantized at a time, and those of the
        quantized model with all of them, in one way each."""
        slots = {unit: slot for unit, slot in self._slots.items() if unit.layer == index}
        for unit, slot in slots.items():
            with _replaced(self._decoder, index, quantized.of([unit])):
                self._variants.run(index, [(ORIGINAL, slot)], self._on_pass)
        everything = [unit for unit in slots if not unit.dynamic]
        with _replaced(self._decoder, index, quantized.of(everything)):
            self._variants.run(index, [(EVERYTHING, EVERYTHING)], self._on_pass)

    def _advance(
        self, index: int, quantized: _Quantized, activations: Mapping[str, Tensor]
    ) -> None:
        """Run the model's hidden states and all earlier variants' through the layer as it is."""
        linears = self._decoder.linears(index)
        watched = {name: linears[name] for name in quantized.linears}
        static = [name for name in watched if self._scheme.inputs_of(name) == "static"]
        maxima = {name: activations[name] for name in static}
        with self.inputs.watch(watched, quantized.linears, maxima):
            self._variants.run(index, [(ORIGINAL, ORIGINAL)], self._on_pass)
        earlier = [slot for unit, slot in self._slots.items() if unit.layer < index]
        self._variants.run(index, [(slot, slot) for slot in earlier], self._on_pass)


@contextmanager
def _replaced(decoder: Decoder, index: int, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A loaded layer computes with other modules inside the context."""
    for name, module in modules.items():
        decoder.replace(index, name, module)
    try:
        yield
    finally:
        decoder.restore(index)
