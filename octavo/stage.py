"""A run of decoder layers: calibrated, quantized, written, and journaled as they are finished.

The layers are taken in passes. Those of a pass are in memory together (one layer, in a single process); the
next pass is read while they compute. A pass leaves two kinds of records in the journal: what calibration
found, once the hidden states behind it are on disk, and each layer, once its tensors are. Whatever a run
finds there it does not do again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo import canonical
from octavo.calibration import CalibrationStream
from octavo.checkpoint import CheckpointWriter, Journal
from octavo.in_turn import LayerInTurn
from octavo.job import Job
from octavo.lane import Lane
from octavo.memory import WAITING, release
from octavo.read_ahead import read_groups
from octavo.stopwatch import Stopwatch
from octavo.transfer import carry_tensors, meta


class Stage(NamedTuple):
    """What is to be done, and with what.

    Attributes:
        job: the model.
        passes: numbers of the layers of each pass, in order.
        stream: carries the calibration samples; None without calibration.
        tokens: the samples, where the stream begins with them: int64 ``[samples, seq_len]``.
        keep_states: whether the hidden states behind the last pass are wanted.
        writer: takes the tensors.
        journal: of these layers.
        read_ahead: read the next pass while one computes, into memory of its own.
        cores: strips of a weight that are cast at a time.
        clock: takes times by stage.
        before_unit: called before each group of tensors that is quantized.
    """

    job: Job
    passes: Sequence[Sequence[int]]
    stream: CalibrationStream | None
    tokens: Tensor | None
    keep_states: bool
    writer: CheckpointWriter
    journal: Journal
    read_ahead: bool
    cores: int
    clock: Stopwatch
    before_unit: Callable[[], None] = lambda: None

    def run(
        self,
        on_layer: Callable[[int], None] = lambda _: None,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Do all that the journal does not have.

        Args:
            on_layer: called with the number of each layer once it is in the journal, from any thread.
            on_batch: called with each batch whose hidden states behind the last pass are there.
        """
        with self.clock("verify"):
            written = _written(self.journal, self.writer)
            complete = [written.issuperset(layers) for layers in self.passes]
            begin = self._first_pass(complete)
        in_turn = self._in_turn
        todo = [number for number, done in enumerate(complete) if number >= begin or not done]
        if begin == len(self.passes) and self.stream is not None:
            for batch in range(len(self.stream.states(0).shape.batches)):
                on_batch(batch)
        with (
            Lane() as lane,
            ThreadPoolExecutor(self.cores, "octavo-cast") as casts,
            closing(self._read(todo)) as loaded,
        ):
            for index in sorted(written):
                on_layer(index)
            for number in todo:
                tensors = next(loaded)
                aligned = [b for i in self.passes[number] for b in self.job.align_keys(i, tensors)]
                weights = self._measure(tensors, casts)
                if in_turn:
                    self._quantize_in_turn(number, tensors, weights, aligned, lane, casts, on_batch)
                    lane.settle(partial(on_layer, self.passes[number][0]))
                    del tensors
                    continue
                if number >= begin:
                    activations = self._calibrate(number, tensors, lane, on_batch)
                else:
                    activations = _calibrated(self.journal, number)
                for index in self.passes[number]:
                    if index not in written:
                        self._quantize(index, tensors, weights, activations, aligned, lane, casts)
                        lane.settle(partial(on_layer, index))
                del tensors
            with self.clock("wait for disk"):
                lane.drain()

    @property
    def _in_turn(self) -> bool:
        """Whether codes depend on the inputs too, so that a layer is quantized while it is calibrated."""
        return self.job.scheme.rounding != "nearest"

    def _first_pass(self, complete: Sequence[bool]) -> int:
        """The first pass to compute. The hidden states behind the ones before are on disk, as far as
        they are needed: behind the last calibrated pass, or the one before it in the other file.

        Args:
            complete: for each pass whether its layers are on disk.
        """
        if self.stream is None:
            return len(self.passes)
        found = _passes(self.journal)
        if self._in_turn:
            # What was calibrated is of no use for a layer that is not there.
            found = {n: record for n, record in found.items() if all(complete[: n + 1])}
        done = next((n for n in range(len(self.passes)) if n not in found), len(self.passes))
        if done == len(self.passes) and not self.keep_states:
            return done
        for number in (done, done - 1):
            if number > 0 and self.stream.states(number).holds(found[number - 1]["hidden"]):
                return number
        if self.tokens is not None:
            with self.clock("embed"):
                self.stream.embed(self.tokens)
            # The embedding's rows, before there are layers.
            release()
        elif self._in_turn:
            self.stream.receive()
        return 0

    def _measure(self, tensors: Mapping[str, Tensor], casts: ThreadPoolExecutor) -> dict[str, Any]:
        # Before the layer is run: a NaN is the weight's fault, not the activations'.
        with self.clock("quantize"):
            return {
                name: canonical.finite_amax(name, tensor, casts.map)
                for name, tensor in tensors.items()
            }

    def _calibrate(
        self,
        number: int,
        tensors: Mapping[str, Tensor],
        lane: Lane,
        on_batch: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """Run the samples through the layers of a pass, and have that journaled."""
        assert self.stream is not None
        layers, decoder = self.passes[number], self.job.decoder
        with self.clock("calibrate"):
            for index in layers:
                names = self.job.plans[index].tensors
                decoder.load(index, {name: tensors[name] for name in names})
        maxima = self._move_on(number, {}, lane, on_batch)
        for index in layers:
            decoder.unload(index)
        return maxima

    def _move_on(
        self,
        number: int,
        known: Mapping[str, Tensor],
        lane: Lane,
        on_batch: Callable[[int], None],
    ) -> dict[str, Tensor]:
        """Run the samples through the loaded layers of a pass, and have what was found journaled.

        Args:
            number: of the pass.
            known: amax of activations; where there are none, they are found now.
            lane: to the disk.
            on_batch: called with each batch behind the last pass.
        """
        assert self.stream is not None
        layers = self.passes[number]
        at_end = number + 1 == len(self.passes)
        dropped = at_end and not self.keep_states
        self._wait_for_place(lane)
        maxima = dict(known)
        if not (known and dropped):
            watched = [one for index in layers for one in canonical.inputs(self.job.plans[index])]
            with self.clock("calibrate"):
                found = self.stream.run(
                    number,
                    layers,
                    [] if known else watched,
                    last=dropped,
                    on_batch=on_batch if at_end else lambda _: None,
                )
            maxima = maxima or found
        states = self.stream.states(number + 1)
        digest = None if dropped else states.digest()
        record = {"pass": number, "amax": _values(maxima), "hidden": digest}

        def finish() -> None:
            if not dropped:
                states.sync()
            self.journal.append(record)

        lane.calibrated = lane.settle(finish)
        return maxima

    def _quantize(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        maxima: Mapping[str, Tensor],
        activations: Mapping[str, Tensor],
        aligned: Collection[str],
        lane: Lane,
        casts: ThreadPoolExecutor,
    ) -> None:
        """Quantize a layer and have it written and journaled."""
        plan, scheme = self.job.plans[index], self.job.scheme
        amax = canonical.weight_amax(plan.linears, maxima, scheme)
        output = _Output(self, lane)
        for unit in canonical.units(plan, self.job.dialect.fuses):
            self.before_unit()
            with self.clock("quantize"):
                folded, noise = canonical.quantize_unit(
                    unit, tensors, amax, activations, scheme, casts.map
                )
            output.put(folded, noise)
        output.put(canonical.cache_scales(plan, activations, scheme, aligned))
        output.finish(index, maxima, aligned)

    def _quantize_in_turn(
        self,
        number: int,
        tensors: dict[str, Tensor],
        maxima: Mapping[str, Tensor],
        aligned: Collection[str],
        lane: Lane,
        casts: ThreadPoolExecutor,
        on_batch: Callable[[int], None],
    ) -> None:
        """Quantize the one layer of a pass while it is calibrated, and have it written and journaled."""
        assert self.stream is not None
        (index,) = self.passes[number]
        output = _Output(self, lane)
        layer = LayerInTurn(
            self.job,
            index,
            tensors,
            maxima,
            aligned,
            stream=self.stream,
            place=number,
            free_place=partial(self._wait_for_place, lane),
            put=output.put,
            casts=casts.map,
            clock=self.clock,
            before_unit=self.before_unit,
        )
        activations = layer.quantize()
        # Before the pass, which a run that finds the layer unfinished has to do again.
        output.finish(index, maxima, aligned)
        self._move_on(number, activations, lane, on_batch)
        self.job.decoder.unload(index)

    def _wait_for_place(self, lane: Lane) -> None:
        """Wait until what lies behind a pass is no longer what a resumed run would begin with."""
        with self.clock("wait for disk"):
            lane.calibrated.result()

    def _read(self, todo: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        """The tensors of each pass to do."""
        plans = self.job.plans
        return read_groups(
            self.job.checkpoint,
            [[t for index in self.passes[n] for t in plans[index].tensors] for n in todo],
            self.job.decoder.device,
            ahead=self.read_ahead,
            waiting=partial(self.clock, "wait for disk"),
        )


class _Output:
    """What becomes of one layer, on its way to the disk and the journal."""

    def __init__(self, stage: Stage, lane: Lane) -> None:
        self._stage, self._lane = stage, lane
        self._names: list[str] = []
        self._errors: dict[str, Any] = {}

    def put(self, tensors: Mapping[str, Tensor], errors: Mapping[str, Any] | None = None) -> None:
        """Have canonical tensors written, and keep what rounding did to them."""
        stage, encoded = self._stage, self._stage.job.encode(tensors)
        self._names.extend(encoded)
        self._errors |= errors or {}
        with stage.clock("wait for disk"):
            self._lane.wait_below(WAITING)

        def write() -> None:
            for name, tensor in encoded.items():
                stage.writer.write(name, tensor.cpu())

        self._lane.write(write)

    def finish(self, index: int, maxima: Mapping[str, Tensor], aligned: Collection[str]) -> None:
        """Have layer ``index`` journaled, once it is on the disk."""
        stage, plan = self._stage, self._stage.job.plans[index]
        found = {
            "amax": _values({name: maxima[name] for name in plan.tensors}),
            "errors": self._errors,
            "aligned_keys": [block for block in plan.attention if block in aligned],
        }

        def settle() -> None:
            stage.writer.sync()
            digests = {name: stage.writer.digests[name] for name in self._names}
            stage.journal.append({"layer": index, **found, "tensors": digests})

        with stage.clock("wait for disk"):
            self._lane.finish(settle)


def carry_rest(job: Job, writer: CheckpointWriter, journal: Journal) -> None:
    """Carry over the tensors outside the decoder layers, unless the journal has them."""
    known = [record["carried"] for record in journal.records if "carried" in record]
    if known and all(writer.holds(name, digest) for name, digest in known[-1].items()):
        return

    def check(name: str, piece: Tensor) -> None:
        if piece.dtype.is_floating_point:
            canonical.finite_amax(name, piece)

    carry_tensors(job.source, job.outside(), writer, job.encode, check)
    writer.sync()
    names = [copy for name in job.outside() for copy in job.encode({name: meta(job.source, name)})]
    journal.append({"carried": {name: writer.digests[name] for name in names}})


def _written(journal: Journal, writer: CheckpointWriter) -> set[int]:
    """The layers that are on disk as the journal says."""
    layers = {record["layer"]: record for record in journal.records if "layer" in record}
    return {
        index
        for index, record in layers.items()
        if all(writer.holds(name, digest) for name, digest in record["tensors"].items())
    }


def _passes(journal: Journal) -> dict[int, dict[str, Any]]:
    return {record["pass"]: record for record in journal.records if "pass" in record}


def _calibrated(journal: Journal, number: int) -> dict[str, Tensor]:
    """The amax of activations that a pass left in the journal; none without calibration."""
    amax = _passes(journal).get(number, {"amax": {}})["amax"]
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in amax.items()}


def _values(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in tensors.items()}
