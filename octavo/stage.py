"""A run of decoder layers: calibrated, quantized, written, and journaled as they are finished.

The layers are taken in passes. Those of a pass are in memory together (one layer, in a single process); the
next pass is read while they compute. A pass leaves two kinds of records in the journal: what calibration
found, once the hidden states behind it are on disk, and each layer, once its tensors are. Whatever a run
finds there it does not do again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo import canonical, fp8
from octavo.calibration import CalibrationStream
from octavo.checkpoint import CheckpointWriter, Journal
from octavo.job import Job
from octavo.loading import fp8_caches, fp8_linears
from octavo.memory import WAITING, release
from octavo.reconstruction import reconstruct
from octavo.rounding import gptq
from octavo.stopwatch import Stopwatch
from octavo.transfer import carry_tensors, meta

# Tensors that are read at a time, each by a thread of its own: a disk serves several sooner than one after another.
_READS = 4


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
            ThreadPoolExecutor(1, "octavo-write") as writes,
            ThreadPoolExecutor(1, "octavo-sync") as syncs,
            ThreadPoolExecutor(self.cores, "octavo-cast") as casts,
            closing(self._read(todo)) as loaded,
        ):
            lane = _Lane(writes, syncs)
            for index in sorted(written):
                on_layer(index)
            for number in todo:
                tensors = next(loaded)
                weights = self._measure(tensors, casts)
                if in_turn:
                    self._quantize_in_turn(number, tensors, weights, lane, casts, on_batch)
                    lane.settle(partial(on_layer, self.passes[number][0]))
                    del tensors
                    continue
                if number >= begin:
                    activations = self._calibrate(number, tensors, lane, on_batch)
                else:
                    activations = _calibrated(self.journal, number)
                for index in self.passes[number]:
                    if index not in written:
                        self._quantize(index, tensors, weights, activations, lane, casts)
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
        lane: _Lane,
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
        lane: _Lane,
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
        lane: _Lane,
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
        output.put(canonical.cache_scales(plan, activations, scheme))
        output.finish(index, maxima)

    def _quantize_in_turn(
        self,
        number: int,
        tensors: dict[str, Tensor],
        maxima: Mapping[str, Tensor],
        lane: _Lane,
        casts: ThreadPoolExecutor,
        on_batch: Callable[[int], None],
    ) -> None:
        """Quantize the one layer of a pass, the linear layers that share an input together and in the order they
        are computed in: each sees its inputs as those before it, quantized, give them."""
        assert self.stream is not None
        (index,) = self.passes[number]
        plan, scheme, decoder = self.job.plans[index], self.job.scheme, self.job.decoder
        amax = canonical.weight_amax(plan.linears, maxima, scheme)
        output, activations = _Output(self, lane), dict[str, Tensor]()
        units = canonical.units(plan, self.job.dialect.fuses)
        with self.clock("calibrate"):
            decoder.load(index, tensors)
        linears = decoder.linears(index)
        learns = scheme.rounding == "learned"
        if learns:
            self._wait_for_place(lane)
            with self.clock("calibrate"):
                self.stream.follow(number, index)
        waiting: list[_Folded] = []
        for turn in canonical.turns(plan):
            cached = scheme.kv_cache == "fp8" and any(name.endswith("k_proj") for name in turn)
            if not cached and not amax.keys() & set(turn):
                continue
            after = next((name for name in plan.attention if not turn[0].startswith(name)), None)
            if after is not None:
                # What is kept of it goes where the hidden states behind this pass will.
                self._wait_for_place(lane)
            with self.clock("calibrate"):
                inputs = self.stream.look(number, index, turn, cache=cached, after=after)
            activations |= inputs.ranges
            with self.clock("round"):
                feedback = gptq.prepare(inputs.moments)
            del inputs
            for unit in [unit for unit in units if any(f"{name}.weight" in unit for name in turn)]:
                units.remove(unit)
                self.before_unit()
                with self.clock("round"):
                    folded = _Folded(
                        *canonical.quantize_unit(
                            unit, tensors, amax, activations, scheme, casts.map, feedback
                        )
                    )
                for module, fp8_linear in fp8_linears(linears, folded.tensors).items():
                    decoder.replace(index, module, fp8_linear)
                if learns:
                    waiting.append(folded)
                else:
                    output.put(*folded)
            # Before there are others.
            del feedback
            if cached:
                scales = canonical.cache_scales(plan, activations, scheme)
                for block, fp8_cache in fp8_caches(plan.attention, scales).items():
                    decoder.replace(index, f"{block}.kv_cache", fp8_cache)
                output.put(scales)
        if learns:
            self._learn(number, linears, tensors, waiting)
        for folded in waiting:
            output.put(*folded)
        for unit in units:
            output.put(canonical.quantize_unit(unit, tensors, amax, activations, scheme)[0])
        # Before the pass, which a run that finds the layer unfinished has to do again.
        output.finish(index, maxima)
        self._move_on(number, activations, lane, on_batch)
        decoder.unload(index)

    def _learn(
        self,
        number: int,
        linears: Mapping[str, nn.Linear],
        tensors: Mapping[str, Tensor],
        folded: Sequence[_Folded],
    ) -> None:
        """Learn the codes of the one layer of a pass, from those it computes with; they take the others' places.

        Args:
            number: of the pass.
            linears: the layer's original linear layers, by name.
            tensors: the layer's, as stored in the checkpoint.
            folded: what was quantized of it.
        """
        assert self.stream is not None
        (index,) = self.passes[number]
        decoder = self.job.decoder
        whole = {name: tensor for one in folded for name, tensor in one.tensors.items()}
        prefix = f"{decoder.layer_name(index)}."
        quantized = {
            name: (name.removeprefix(prefix), linear)
            for name, linear in linears.items()
            if f"{name}.weight_scale" in whole
        }
        if not quantized:
            return
        with self.clock("learn"):
            found = reconstruct(
                decoder.layers[index],
                quantized,
                whole,
                self.stream.examples(number, index),
                self.stream.over,
            )
            for one in folded:
                for name in one.errors:
                    weight = f"{name}.weight"
                    one.tensors[weight] = found.codes[name]
                    scale = one.tensors[f"{weight}_scale"]
                    error = fp8.measure(tensors[weight], found.codes[name], scale)
                    one.errors[name] = {
                        **error._asdict(),
                        "damping": one.errors[name]["damping"],
                        "learned_codes": found.changed[name],
                        "block_loss_before": found.before,
                        "block_loss": found.after,
                    }
                for module, fp8_linear in fp8_linears(linears, one.tensors).items():
                    decoder.replace(index, module, fp8_linear)

    def _wait_for_place(self, lane: _Lane) -> None:
        """Wait until what lies behind a pass is no longer what a resumed run would begin with."""
        with self.clock("wait for disk"):
            lane.calibrated.result()

    def _read(self, todo: Sequence[int]) -> Generator[dict[str, Tensor], None, None]:
        """The tensors of each pass to do; with read-ahead, the next pass is read meanwhile.

        Tensors are valid until the next are asked for: on a CPU they lie in buffers that take turns.
        """
        checkpoint, device = self.job.checkpoint, self.job.decoder.device
        on_gpu = device.type == "cuda"
        ahead = self.read_ahead and len(todo) > 1
        names = {n: [t for i in self.passes[n] for t in self.job.plans[i].tensors] for n in todo}
        if on_gpu:
            # One tensor at a time goes through it.
            size, count = max(checkpoint[name].nbytes for n in todo for name in names[n]), 1
        else:
            size = max(sum(checkpoint[name].nbytes for name in names[n]) for n in todo)
            count = 2 if ahead else 1
        buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(count)]

        def read(position: int) -> dict[str, Tensor]:
            rest, places = buffers[position % count], {}
            # Wide dtypes first keeps every tensor aligned.
            for name in sorted(
                names[todo[position]], key=lambda name: -checkpoint[name].dtype.itemsize
            ):
                nbytes = checkpoint[name].nbytes
                places[name] = rest[:nbytes]
                if not on_gpu:
                    rest = rest[nbytes:]
            return dict(
                zip(places, files.map(fill, *zip(*places.items(), strict=True)), strict=True)
            )

        def fill(name: str, place: Tensor) -> Tensor:
            tensor = checkpoint.read(name, place)
            return _upload(tensor, device) if on_gpu else tensor

        with (
            ThreadPoolExecutor(1, "octavo-read") as reads,
            ThreadPoolExecutor(1 if on_gpu else _READS, "octavo-file") as files,
        ):
            upcoming: Future[dict[str, Tensor]] | None = None
            for position in range(len(todo)):
                with self.clock("wait for disk"):
                    tensors = (upcoming or reads.submit(read, position)).result()
                if ahead and position + 1 < len(todo):
                    upcoming = reads.submit(read, position + 1)
                yield tensors


class _Folded(NamedTuple):
    """Canonical tensors that are stored together, and what rounding did to each weight among them."""

    tensors: dict[str, Tensor]
    errors: dict[str, dict[str, Any]]


class _Output:
    """What becomes of one layer, on its way to the disk and the journal."""

    def __init__(self, stage: Stage, lane: _Lane) -> None:
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

    def finish(self, index: int, maxima: Mapping[str, Tensor]) -> None:
        """Have layer ``index`` journaled, once it is on the disk."""
        stage = self._stage
        weights = _values({name: maxima[name] for name in stage.job.plans[index].tensors})

        def settle() -> None:
            stage.writer.sync()
            digests = {name: stage.writer.digests[name] for name in self._names}
            stage.journal.append(
                {"layer": index, "amax": weights, "errors": self._errors, "tensors": digests}
            )

        with stage.clock("wait for disk"):
            self._lane.finish(settle)


class _Lane:
    """The way to the disk: one thread that writes, and one that waits until what was written is there and
    journals it, each in the order it is asked to. After a failure neither does anything more, lest something be
    journaled that rests on what failed; whoever waits next is told.

    Attributes:
        calibrated: when the last calibrated pass is journaled.
    """

    def __init__(self, writes: ThreadPoolExecutor, syncs: ThreadPoolExecutor) -> None:
        self._writes, self._syncs = writes, syncs
        self._waiting: deque[Future[None]] = deque()
        self._failure: BaseException | None = None
        self._written = self._settled = self._finished = self.calibrated = _done()

    def write(self, task: Callable[[], None]) -> None:
        """Have something written."""
        self._written = self._writes.submit(self._run, task)
        self._waiting.append(self._written)

    def settle(self, task: Callable[[], None]) -> Future[None]:
        """Have something done when all that was asked to be written before is written."""
        written = self._written

        def when_written() -> None:
            written.result()
            task()

        self._settled = self._syncs.submit(self._run, when_written)
        return self._settled

    def finish(self, task: Callable[[], None]) -> None:
        """Have a layer settled, when the one before it is: no more than one is ever lost."""
        self._finished.result()
        self._finished = self.settle(task)

    def _run(self, task: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            task()
        except BaseException as error:
            self._failure = error
            raise

    def wait_below(self, count: int) -> None:
        """Wait until fewer than ``count`` things are left to write."""
        while len(self._waiting) >= count:
            self._waiting.popleft().result()

    def drain(self) -> None:
        """Wait for all."""
        self.wait_below(1)
        self._settled.result()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


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


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the GPU, made on a stream of its own beside what is computed there."""
    new: Any = torch.cuda.Stream  # has no types
    stream = new(device)
    with torch.cuda.stream(stream):
        copy = tensor.to(device, non_blocking=True)
    stream.synchronize()
    # Its memory is handed out again only when what computes with it is done.
    copy.record_stream(torch.cuda.default_stream(device))
    return copy


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
