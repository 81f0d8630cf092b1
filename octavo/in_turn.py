"""A decoder layer whose linear layers are quantized one after the other, while it is calibrated: those that share an
input together and in the order they are computed in. Each sees its inputs as those before it, quantized, give them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from octavo import canonical, fp8
from octavo.calibration import CalibrationStream
from octavo.job import Job
from octavo.loading import fp8_caches, fp8_linears
from octavo.reconstruction import reconstruct
from octavo.rounding import gptq
from octavo.stopwatch import Stopwatch


class Folded(NamedTuple):
    """Canonical tensors that are stored together, and what rounding did to each weight among them."""

    tensors: dict[str, Tensor]
    errors: dict[str, dict[str, Any]]


class LayerInTurn:
    """Quantizes one decoder layer, whose codes depend on its inputs."""

    def __init__(
        self,
        job: Job,
        index: int,
        tensors: dict[str, Tensor],
        maxima: Mapping[str, Tensor],
        aligned: Collection[str],
        *,
        stream: CalibrationStream,
        place: int,
        free_place: Callable[[], None],
        put: Callable[..., None],
        casts: fp8.Map,
        clock: Stopwatch,
        before_unit: Callable[[], None],
    ) -> None:
        """
        Args:
            job: the model.
            index: of the layer.
            tensors: the layer's, as stored in the checkpoint.
            maxima: amax of each of them.
            aligned: attention blocks whose keys were moved onto the cache's numbers.
            stream: carries the calibration samples.
            place: number of the pass in it.
            free_place: waits until what lies behind the pass may be overwritten.
            put: takes what is finished, canonical tensors and what rounding did to them.
            casts: applied to strips of a weight.
            clock: takes times.
            before_unit: called before each group of tensors that is quantized.
        """
        self._job, self._index, self._tensors, self._aligned = job, index, tensors, aligned
        self._stream, self._place, self._free_place = stream, place, free_place
        self._put, self._casts, self._clock, self._before_unit = put, casts, clock, before_unit
        self._plan = job.plans[index]
        self._amax = canonical.weight_amax(self._plan.linears, maxima, job.scheme)
        self._units = canonical.units(self._plan, job.dialect.fuses)
        self._activations: dict[str, Tensor] = {}
        self._learns = job.scheme.rounding == "learned"
        # What is learned is not finished before all of the layer is quantized.
        self._waiting: list[Folded] = []
        with clock("calibrate"):
            job.decoder.load(index, tensors)
        self._linears = job.decoder.linears(index)

    def quantize(self) -> dict[str, Tensor]:
        """Do it; amax of the layer's activations. The decoder's layer then computes as quantized."""
        if self._learns:
            self._free_place()
            with self._clock("calibrate"):
                self._stream.follow(self._place, self._index)
        for turn in canonical.turns(self._plan):
            self._quantize_turn(turn)
        if self._learns:
            self._learn()
        for folded in self._waiting:
            self._put(*folded)
        for unit in self._units:
            self._put(self._quantize_unit(unit).tensors)
        return self._activations

    def _quantize_turn(self, turn: Sequence[str]) -> None:
        """Linear layers that share an input, and behind keys and values the cache."""
        scheme, attention = self._job.scheme, self._plan.attention
        cached = scheme.kv_cache == "fp8" and any(name.endswith("k_proj") for name in turn)
        if not cached and not self._amax.keys() & set(turn):
            return
        after = next((name for name in attention if not turn[0].startswith(name)), None)
        if after is not None:
            # What is kept of it goes where the hidden states behind this pass will.
            self._free_place()
        with self._clock("calibrate"):
            inputs = self._stream.look(self._place, self._index, turn, cache=cached, after=after)
        self._activations |= inputs.ranges
        with self._clock("round"):
            feedback = gptq.prepare(inputs.moments)
        del inputs
        for unit in [u for u in self._units if any(f"{name}.weight" in u for name in turn)]:
            self._units.remove(unit)
            self._before_unit()
            with self._clock("round"):
                folded = self._quantize_unit(unit, feedback)
            self._compute_with(folded.tensors)
            if self._learns:
                self._waiting.append(folded)
            else:
                self._put(*folded)
        # Before there are others.
        del feedback
        if cached:
            scales = canonical.cache_scales(self._plan, self._activations, scheme, self._aligned)
            for block, fp8_cache in fp8_caches(attention, scales).items():
                self._job.decoder.replace(self._index, f"{block}.kv_cache", fp8_cache)
            self._put(scales)

    def _quantize_unit(self, unit: Sequence[str], feedback: gptq.Feedback | None = None) -> Folded:
        return Folded(
            *canonical.quantize_unit(
                unit,
                self._tensors,
                self._amax,
                self._activations,
                self._job.scheme,
                self._casts,
                feedback,
            )
        )

    def _compute_with(self, tensors: Mapping[str, Tensor]) -> None:
        """Have the decoder's layer compute with quantized tensors."""
        for module, fp8_linear in fp8_linears(self._linears, tensors).items():
            self._job.decoder.replace(self._index, module, fp8_linear)

    def _learn(self) -> None:
        """Learn codes from those the layer computes with; they take the others' places."""
        decoder = self._job.decoder
        whole = {name: tensor for one in self._waiting for name, tensor in one.tensors.items()}
        prefix = f"{decoder.layer_name(self._index)}."
        quantized = {
            name: (name.removeprefix(prefix), linear)
            for name, linear in self._linears.items()
            if f"{name}.weight_scale" in whole
        }
        if not quantized:
            return
        with self._clock("learn"):
            found = reconstruct(
                decoder.layers[self._index],
                quantized,
                whole,
                self._stream.examples(self._place, self._index),
                self._stream.over,
            )
            for one in self._waiting:
                for name in one.errors:
                    weight = f"{name}.weight"
                    one.tensors[weight] = found.codes[name]
                    scale = one.tensors[f"{weight}_scale"]
                    error = fp8.measure(self._tensors[weight], found.codes[name], scale)
                    one.errors[name] = {
                        **error._asdict(),
                        "damping": one.errors[name]["damping"],
                        "learned_codes": found.changed[name],
                        "block_loss_before": found.before,
                        "block_loss": found.after,
                    }
                self._compute_with(one.tensors)
