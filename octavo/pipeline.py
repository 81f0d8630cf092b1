"""The main job: a checkpoint in, its FP8 edition out, one decoder layer at a time.

A layer is read, run over the calibration tokens, folded into FP8, written and forgotten. While it
computes, one thread reads the next layer and another writes the last one.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from octavo import canonical
from octavo.calibration import Calibration, CalibrationStream, load_tokens
from octavo.canonical import LayerPlan
from octavo.checkpoint import Checkpoint, CheckpointWriter
from octavo.checkpoint.hub import resolve_model
from octavo.decoder import Decoder
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.formats import Dialect, Target, get_format
from octavo.formats.dialect import without_quantization
from octavo.fp8 import RoundingError
from octavo.preflight import check_target, pick_device, refuse_quantized
from octavo.scheme import Scheme
from octavo.stopwatch import Stopwatch
from octavo.transfer import carry_files, carry_tensors, meta
from octavo.version import __version__


class Progress(NamedTuple):
    """How far a run is: ``done`` of ``total`` decoder layers, over ``tokens`` tokens each."""

    done: int
    total: int
    tokens: int


class _Statistics(NamedTuple):
    """What a run finds out on the way, for the edition's record.

    Attributes:
        amax: of weights, inputs, keys and values, by name.
        errors: what rounding did to each linear layer's weight.
    """

    amax: dict[str, float]
    errors: dict[str, RoundingError]


class _Job(NamedTuple):
    """What every step of a run needs to know."""

    source: Edition
    decoder: Decoder
    plans: list[LayerPlan]
    dialect: Dialect
    target: Target
    clock: Stopwatch

    @property
    def scheme(self) -> Scheme:
        return self.target.scheme

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors to the dialect's."""
        return self.dialect.encode(tensors, self.target)


class QuantizeResult(NamedTuple):
    """What a run did. Sizes in bytes, times in seconds.

    Attributes:
        output: the edition's directory.
        format: its dialect.
        layers: decoder layers.
        linears: linear layers quantized.
        tensors: tensors written.
        tokens: calibration tokens, 0 without calibration.
        bytes_before: tensors of the input.
        bytes_after: tensors of the edition.
        peak_memory: peak resident memory of the process, in bytes.
        seconds: wall-clock time by stage, in order, and ``total``.
        warnings: what the user should know, a sentence each.
    """

    output: str
    format: str
    layers: int
    linears: int
    tensors: int
    tokens: int
    bytes_before: int
    bytes_after: int
    peak_memory: int
    seconds: dict[str, float]
    warnings: list[str]


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
    format: str = "modelopt",
    device: str = "auto",
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> QuantizeResult:
    """Write the FP8 edition of a BF16, FP16 or FP32 checkpoint.

    Args:
        model: a Hugging Face checkpoint directory, or a hub id.
        output: the directory to create; it appears only when complete.
        scheme: what is quantized and how; static inputs and an FP8 KV cache by default.
        calibration: the text the activations' scales are taken on; the built-in text by default.
            Not used where ``scheme`` needs none.
        format: the dialect to write, a name of :data:`octavo.formats.FORMATS` that carries the
            scheme. One that has a single scale for what engines fuse merges the scales.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` (CUDA where there is one).
        shard_size: bytes of tensors in one file, at most.
        overwrite: replace ``output`` if it exists.
        on_progress: called after each decoder layer.

    Returns:
        Sizes, counts, times.

    Raises:
        OctavoError: the input, an option or the disk does not allow it; nothing is left behind.
    """
    clock = Stopwatch()
    scheme, calibration = scheme or Scheme(), calibration or Calibration()
    with clock("open"):
        dialect = get_format(format, scheme.kind)
        if dialect.merges:
            scheme = scheme.model_copy(update={"merge_scales": True})
        source, target = resolve_model(model), Path(output)
        check_target(source, target)
        checkpoint = Checkpoint(source)
        refuse_quantized(checkpoint)
        decoder = Decoder(checkpoint, pick_device(device))
        plans = [_plan_layer(decoder, index, scheme) for index in range(len(decoder.layers))]
        written = Target(without_quantization(checkpoint.config), scheme)
        job = _Job(Edition(checkpoint), decoder, plans, dialect, written, clock)
        if not any(plan.linears for plan in plans):
            raise OctavoError(
                f"--exclude {' '.join(scheme.exclude)} leaves no linear layer to quantize. "
                "Narrow the patterns."
            )
    with clock("tokenize"):
        tokens = _load_tokens(scheme, calibration, decoder)
        token_count = 0 if tokens is None else tokens.numel()
    with clock("reserve"):
        kept = [name for plan in plans for name in plan.kept]
        files = dialect.configs(job.target, kept)
        layout = _layout(job)
        writer = CheckpointWriter(target, layout, shard_size=shard_size, overwrite=overwrite)
    try:
        with writer:
            with clock("embed"):
                calibrated = nullcontext() if tokens is None else CalibrationStream(decoder, tokens)
            with calibrated as stream:
                found = _run_layers(
                    job,
                    stream,
                    writer,
                    lambda done: on_progress(Progress(done, len(plans), token_count)),
                )
            with clock("finish"):
                carry_files(source, writer)
                for file, content in files.items():
                    writer.write_json(file, content)
                writer.write_json("octavo.json", _record(job, calibration, format, tokens, found))
                writer.commit()
    finally:
        checkpoint.close()
    return QuantizeResult(
        output=str(target),
        format=format,
        layers=len(plans),
        linears=sum(len(plan.linears) for plan in plans),
        tensors=len(layout),
        tokens=token_count,
        bytes_before=checkpoint.nbytes,
        bytes_after=sum(tensor.nbytes for tensor in layout.values()),
        peak_memory=_peak_memory(),
        seconds=clock.seconds(),
        warnings=_warnings(job, calibration, tokens),
    )


def _run_layers(
    job: _Job,
    stream: CalibrationStream | None,
    writer: CheckpointWriter,
    on_layer: Callable[[int], None],
) -> _Statistics:
    """Calibrate, quantize and write every layer, and carry the rest over."""
    found = _Statistics({}, {})
    with (
        ThreadPoolExecutor(1, "octavo-write") as writes,
        ThreadPoolExecutor(torch.get_num_threads(), "octavo-cast") as casts,
        closing(_read_ahead(job)) as layers,
    ):
        # Each layer waits for the one before to be on disk, so at most two are held in memory.
        written = writes.submit(_carry_rest, job, writer)
        for index, tensors in layers:
            plan = job.plans[index]
            tensors = {name: tensor.to(job.decoder.device) for name, tensor in tensors.items()}
            with job.clock("quantize"):
                # Before the layer is run: a NaN is the weight's fault, not the activations'.
                amax = casts.map(canonical.finite_amax, tensors.keys(), tensors.values())
                weights = dict(zip(tensors, amax, strict=True))
            activations: dict[str, Tensor] = {}
            if stream is not None:
                with job.clock("calibrate"):
                    job.decoder.load(index, tensors)
                    activations = stream.run(index, set(plan.linears))
                    job.decoder.unload(index)
            with job.clock("quantize"):
                layer, errors = canonical.quantize_layer(
                    plan, tensors, weights, activations, job.scheme, casts
                )
            with job.clock("wait for disk"):
                written.result()
            written = writes.submit(_write_all, writer, job.encode(layer))
            found.amax.update(
                {name: value.item() for name, value in (activations | weights).items()}
            )
            found.errors.update(errors)
            on_layer(index + 1)
        with job.clock("wait for disk"):
            written.result()
    return found


def _read_ahead(job: _Job) -> Generator[tuple[int, dict[str, Tensor]], None, None]:
    """Each layer's tensors, the next layer's being read meanwhile.

    Two buffers take turns: a layer's tensors are valid until the next layer is asked for.
    """
    checkpoint, plans = job.source.checkpoint, job.plans

    def size(plan: LayerPlan) -> int:
        return sum(checkpoint[name].nbytes for name in plan.tensors)

    def read(index: int) -> dict[str, Tensor]:
        rest, tensors = buffers[index % 2], {}
        # Wide dtypes first keeps every tensor aligned.
        for name in sorted(plans[index].tensors, key=lambda name: -checkpoint[name].dtype.itemsize):
            nbytes = checkpoint[name].nbytes
            tensors[name] = checkpoint.read(name, rest[:nbytes])
            rest = rest[nbytes:]
        return tensors

    largest = max(size(plan) for plan in plans)
    buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(min(2, len(plans)))]
    with ThreadPoolExecutor(1, "octavo-read") as reads:
        upcoming = reads.submit(read, 0)
        for index in range(len(plans)):
            with job.clock("wait for disk"):
                tensors = upcoming.result()
            if index + 1 < len(plans):
                upcoming = reads.submit(read, index + 1)
            yield index, tensors


def _write_all(writer: CheckpointWriter, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    # Now, while layers compute, rather than all at the end.
    writer.sync()


def _carry_rest(job: _Job, writer: CheckpointWriter) -> None:
    """Carry over the tensors outside the decoder layers."""

    def check(name: str, piece: Tensor) -> None:
        if piece.dtype.is_floating_point:
            canonical.finite_amax(name, piece)

    names = _outside(job.source, job.plans)
    carry_tensors(job.source, names, writer, job.encode, check)


def _layout(job: _Job) -> dict[str, Tensor]:
    """Every tensor of the edition as a meta tensor: embedding, decoder layers, the rest."""
    source = {name: meta(job.source, name) for name in job.source}
    first: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for name in _outside(job.source, job.plans):
        encoded = job.encode({name: source[name]})
        (first if "embed" in name else last).update(encoded)
    for plan in job.plans:
        layer = canonical.layout_layer(plan, source, job.scheme)
        first |= job.encode(layer)
    return first | last


def _plan_layer(decoder: Decoder, index: int, scheme: Scheme) -> LayerPlan:
    linears = tuple(decoder.linears(index))
    return LayerPlan(
        tensors=tuple(decoder.tensor_names(index)),
        linears=tuple(name for name in linears if not scheme.excludes(name)),
        kept=tuple(name for name in linears if scheme.excludes(name)),
        attention=tuple(name for name, _ in decoder.attention_blocks(index)),
    )


def _outside(source: Edition, plans: list[LayerPlan]) -> list[str]:
    """Names of tensors that belong to no decoder layer."""
    inside = {name for plan in plans for name in plan.tensors}
    return [name for name in source if name not in inside]


def _load_tokens(scheme: Scheme, calibration: Calibration, decoder: Decoder) -> Tensor | None:
    if not scheme.needs_calibration:
        return None
    return load_tokens(
        calibration,
        decoder.checkpoint.directory,
        vocab_size=decoder.config.vocab_size,
        max_positions=decoder.config.max_position_embeddings,
    )


def _record(
    job: _Job,
    calibration: Calibration,
    format: str,
    tokens: Tensor | None,
    found: _Statistics,
) -> dict[str, Any]:
    """The edition's own account of how it was made; engines ignore it. Holds nothing of the
    moment or the machine, so that equal runs give equal bytes."""
    return {
        "octavo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base_model": job.source.directory.resolve().name,
        "format": format,
        "scheme": job.scheme.model_dump(mode="json"),
        "calibration": None
        if tokens is None
        else {
            **calibration.model_dump(mode="json"),
            "source": Path(calibration.source).name,
            "samples": tokens.shape[0],
            "seq_len": tokens.shape[1],
        },
        "amax": found.amax,
        "weights": {module: error._asdict() for module, error in found.errors.items()},
    }


def _warnings(job: _Job, calibration: Calibration, tokens: Tensor | None) -> list[str]:
    found = []
    if tokens is not None and calibration.samples and len(tokens) < calibration.samples:
        found.append(
            f"The calibration text {calibration.source} gave {len(tokens)} samples of "
            f"{tokens.shape[1]} tokens, {calibration.samples} were asked for."
        )
    if job.scheme.weights == "block":
        linears = [module for plan in job.plans for module in plan.linears]
        shapes = {module: job.source[f"{module}.weight"].shape for module in linears}
        found += filter(None, [canonical.partial_blocks(shapes)])
    for plan in job.plans:
        for group in canonical.fused_groups(plan.linears + plan.kept):
            kept = [name for name in group if name in plan.kept]
            if kept and len(kept) < len(group):
                found.append(
                    f"{kept[0]} is excluded but not all of its group: engines that fuse q/k/v or "
                    "gate/up refuse a group of mixed precision."
                )
    return found


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Rather than getrusage, whose peak begins with that of the process this one came from.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
