"""The main job: a checkpoint in, its FP8 edition out, one decoder layer at a time.

What happens to the layers is in :mod:`octavo.stage`; here a run begins, goes on where an interrupted one
stopped, and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from octavo import canonical
from octavo.calibration import (
    BATCH_TOKENS,
    Calibration,
    CalibrationStream,
    HiddenShape,
    batch_sizes,
    load_tokens,
)
from octavo.canonical import LayerPlan
from octavo.checkpoint import CheckpointWriter, Journal, Workspace
from octavo.checkpoint.hub import resolve_model
from octavo.job import Job, open_job
from octavo.memory import LayerShape, Settings, choose_settings, peak_resident
from octavo.preflight import check_target, pick_device
from octavo.resumption import check_same
from octavo.scheme import Scheme
from octavo.stage import Stage, carry_rest
from octavo.stopwatch import Stopwatch
from octavo.transfer import carry_files
from octavo.version import __version__


class Progress(NamedTuple):
    """How far a run is: ``done`` of ``total`` decoder layers, over ``tokens`` tokens each."""

    done: int
    total: int
    tokens: int


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
    max_memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
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
        max_memory: bytes of memory the process may take. Smaller batches round otherwise, so that a
            limit may change the last bits of activation scales.
        overwrite: replace ``output`` if it exists, and an interrupted run if there is one.
        resume: go on with an interrupted run if there is one.
        on_progress: called after each decoder layer.

    Returns:
        Sizes, counts, times.

    Raises:
        OctavoError: the input, an option or the disk does not allow it. After a mistake nothing is left
            behind; after an interruption (a signal, a full disk), what can be resumed is.
    """
    clock = Stopwatch()
    scheme, calibration = scheme or Scheme(), calibration or Calibration()
    with ExitStack() as stack:
        with clock("open"):
            source, target = resolve_model(model), Path(output)
            check_target(source, target)
            job = open_job(source, scheme, format, pick_device(device))
            stack.callback(job.checkpoint.close)
        with clock("tokenize"):
            tokens = _load_tokens(job, calibration)
        settings = _settings(job, tokens, max_memory)
        with clock("reserve"):
            kept = [name for plan in job.plans for name in plan.kept]
            files = job.dialect.configs(job.target, kept)
            layout = job.layout()
            work = stack.enter_context(Workspace(target, overwrite=overwrite, resume=resume))
            journal = stack.enter_context(Journal(work.journal, target))
            stack.enter_context(_told(work, journal, len(job.plans)))
            check_same(
                journal,
                {
                    "model": source.resolve().name,
                    "format": format,
                    "scheme": job.scheme.model_dump(mode="json"),
                    "calibration": calibration.model_dump(mode="json")
                    if tokens is not None
                    else None,
                    "device": job.decoder.device.type,
                    "shard size": shard_size,
                    "tokens in a batch": settings.batch_tokens,
                },
                job.checkpoint,
                tokens,
            )
            writer = stack.enter_context(
                CheckpointWriter(work, layout, shard_size=shard_size, digest=True)
            )
            stream = (
                None
                if tokens is None
                else stack.enter_context(_open_stream(job, tokens, settings, work))
            )
        _run(job, stream, tokens, writer, journal, settings, clock, on_progress)
        with clock("finish"):
            carry_files(source, writer)
            for file, content in files.items():
                writer.write_json(file, content)
            record = _record(
                job, calibration, format, tokens, _statistics(job.plans, journal.records)
            )
            writer.write_json("octavo.json", record)
            writer.commit()
    return QuantizeResult(
        output=str(target),
        format=format,
        layers=len(job.plans),
        linears=sum(len(plan.linears) for plan in job.plans),
        tensors=len(layout),
        tokens=0 if tokens is None else tokens.numel(),
        bytes_before=job.checkpoint.nbytes,
        bytes_after=sum(tensor.nbytes for tensor in layout.values()),
        peak_memory=peak_resident(),
        seconds=clock.seconds(),
        warnings=_warnings(job, calibration, tokens),
    )


def _run(
    job: Job,
    stream: CalibrationStream | None,
    tokens: Tensor | None,
    writer: CheckpointWriter,
    journal: Journal,
    settings: Settings,
    clock: Stopwatch,
    on_progress: Callable[[Progress], None],
) -> None:
    """All layers, and what is outside them, one layer to a pass."""
    total, count = len(job.plans), 0 if tokens is None else tokens.numel()
    with clock("carry"):
        carry_rest(job, writer, journal)
    stage = Stage(
        job=job,
        passes=[(index,) for index in range(total)],
        stream=stream,
        tokens=tokens,
        keep_states=False,
        writer=writer,
        journal=journal,
        read_ahead=settings.read_ahead,
        clock=clock,
    )
    stage.run(lambda index: on_progress(Progress(index + 1, total, count)))


@contextmanager
def _told(work: Workspace, journal: Journal, total: int) -> Iterator[None]:
    """Tell whoever is told of an interruption what is left, and how to go on."""
    try:
        yield
    except BaseException as error:
        done = len({record["layer"] for record in journal.records if "layer" in record})
        work.keep = any("pass" in record or "layer" in record for record in journal.records)
        if work.keeps(error):
            error.add_note(
                f"{done} of {total} layers are finished and kept in {work.directory}: the same command with "
                "--resume goes on from there."
            )
        raise


def _settings(job: Job, tokens: Tensor | None, max_memory: int | None) -> Settings:
    sizes = [job.layer_bytes(index) for index in range(len(job.plans))]
    largest = max(job.checkpoint[name].nbytes for plan in job.plans for name in plan.tensors)
    itemsize = job.decoder.dtype.itemsize
    return choose_settings(
        LayerShape.of(job.decoder.config, max(sizes), largest // itemsize, itemsize),
        max_memory,
        BATCH_TOKENS[job.decoder.device.type],
        seq_len=0 if tokens is None else tokens.shape[1],
        cores=torch.get_num_threads(),
        layers=len(sizes),
    )


def _open_stream(
    job: Job, tokens: Tensor, settings: Settings, work: Workspace
) -> CalibrationStream:
    samples, seq_len = tokens.shape
    shape = HiddenShape(
        batch_sizes(samples, seq_len, settings.batch_tokens),
        seq_len,
        job.decoder.config.hidden_size,
        job.decoder.dtype,
    )
    return CalibrationStream(job.decoder, shape, work.directory, work.target)


def _load_tokens(job: Job, calibration: Calibration) -> Tensor | None:
    if not job.scheme.needs_calibration:
        return None
    config = job.decoder.config
    return load_tokens(
        calibration,
        job.checkpoint.directory,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


class _Statistics(NamedTuple):
    """What a run found out on the way, for the edition's record.

    Attributes:
        amax: of weights, inputs, keys and values, by name.
        errors: what rounding did to each linear layer's weight.
    """

    amax: dict[str, float]
    errors: dict[str, Any]


def _statistics(plans: Sequence[LayerPlan], records: Sequence[Mapping[str, Any]]) -> _Statistics:
    """Those of a journal, in the order of the layers."""
    amax: dict[str, float] = {}
    errors: dict[str, Any] = {}
    for record in records:
        amax |= record.get("amax", {})
        errors |= record.get("errors", {})
    names = [
        name
        for plan in plans
        for name in (
            *plan.linears,
            *(f"{block}.{kind}" for block in plan.attention for kind in ("k", "v")),
            *plan.tensors,
        )
    ]
    linears = [module for plan in plans for module in plan.linears]
    return _Statistics(
        {name: amax[name] for name in names if name in amax},
        {module: errors[module] for module in linears},
    )


def _record(
    job: Job,
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
        "weights": found.errors,
    }


def _warnings(job: Job, calibration: Calibration, tokens: Tensor | None) -> list[str]:
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
