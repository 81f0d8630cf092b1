"""The main job: a checkpoint in, its FP8 edition out, one decoder layer at a time.

What happens to the layers is in :mod:`octavo.stage`; here a run begins, goes on where an interrupted one
stopped, and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
    batches_at_once,
)
from octavo.calibration.text import BUILTIN
from octavo.canonical import LayerPlan
from octavo.checkpoint import CheckpointWriter, Journal, Workspace
from octavo.checkpoint.hub import resolve_model
from octavo.cluster import (
    Order,
    Outcome,
    Report,
    hold_layers,
    make_orders,
    run_stages,
    worker_device,
    worker_memory,
    worker_threads,
)
from octavo.errors import OctavoError
from octavo.job import Job, calibration_tokens, hidden_shape, layer_shape, open_job
from octavo.memory import (
    Settings,
    check_text,
    choose_settings,
    peak_resident,
    program_memory,
    release,
)
from octavo.preflight import check_target, pick_device
from octavo.reconstruction import Learning
from octavo.resumption import check_same
from octavo.rounding.gptq import DAMPING
from octavo.scheme import Scheme
from octavo.stage import Stage, carry_rest
from octavo.stopwatch import Stopwatch
from octavo.threads import one_thread_each
from octavo.transfer import carry_files
from octavo.version import __version__


class Progress(NamedTuple):
    """How far a run is: ``done`` of ``total`` decoder layers, over ``tokens`` tokens each; ``detail`` says
    what each worker has done."""

    done: int
    total: int
    tokens: int
    detail: str = ""


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
        peak_memory: peak resident memory of the process in bytes; of the largest, if there are workers.
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
    workers: int | None = None,
    cluster: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_learning: Callable[[Learning], None] = lambda _: None,
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
        max_memory: bytes of memory the process may take, or each worker. Smaller batches round otherwise,
            so that a limit may change the last bits of activation scales.
        workers: run as so many stages of decoder layers on Ray (:mod:`octavo.cluster`).
        cluster: address of a Ray cluster; without, workers run on this machine.
        overwrite: replace ``output`` if it exists, and an interrupted run if there is one.
        resume: go on with an interrupted run if there is one.
        on_learning: called with what learning will take before it begins, where codes are learned.
        on_progress: called after each decoder layer.

    Returns:
        Sizes, counts, times.

    Raises:
        OctavoError: the input, an option or the disk does not allow it. After a mistake nothing is left
            behind; after an interruption (a signal, a full disk), what can be resumed is.
    """
    clock = Stopwatch()
    scheme, calibration = scheme or Scheme(), calibration or Calibration()
    if cluster is not None and workers is None:
        raise OctavoError("--cluster needs --workers N: how many stages to run there.")
    with ExitStack() as stack:
        with clock("open"):
            source, target = resolve_model(model), Path(output)
            check_target(source, target)
            job = open_job(source, scheme, format, _own_device(device, workers))
            stack.callback(job.checkpoint.close)
        with clock("tokenize"):
            _check_text(job, calibration, max_memory)
            tokens = calibration_tokens(job, calibration)
        kind = job.decoder.device.type if workers is None else worker_device(device)
        settings = _settings(job, tokens, kind, workers, max_memory)
        if tokens is not None and job.scheme.rounding == "learned":
            batches = len(hidden_shape(job, tokens, settings).batches)
            on_learning(Learning.of(len(job.plans), batches, tokens.numel()))
        options = {
            "model": source.resolve().name,
            "format": format,
            "scheme": job.scheme.model_dump(mode="json"),
            "calibration": None if tokens is None else calibration.model_dump(mode="json"),
            "device": kind,
            "shard size": shard_size,
            "tokens in a batch": settings.batch_tokens,
            "workers": workers,
        }
        with clock("reserve"):
            files = job.configs()
            layout = job.layout()
            work = stack.enter_context(Workspace(target, overwrite=overwrite, resume=resume))
            journal = stack.enter_context(Journal(work.journal, target))
            check_same(journal, options, job.checkpoint, tokens)
            finished = _Finished(sum("layer" in record for record in journal.records))
            stack.enter_context(_told(work, finished, len(job.plans)))
            writer = stack.enter_context(
                CheckpointWriter(work.place, layout, shard_size=shard_size, digest=True)
            )
        run = _Run(job, tokens, settings, work, journal, writer, clock, on_progress, finished)
        if workers is None:
            records, peaks = _run_here(run), []
        else:
            orders = make_orders(
                job,
                tokens,
                settings,
                kind,
                workers,
                work,
                shard_size,
                journal.records[0],
                limited=max_memory is not None,
            )
            outcomes = _run_on_workers(run, orders, cluster)
            records = [record for outcome in outcomes for record in outcome.records]
            peaks = [outcome.report.peak_memory for outcome in outcomes]
        with clock("finish"):
            carry_files(source, writer)
            for file, content in files.items():
                writer.write_json(file, content)
            found = _statistics(job.plans, records)
            writer.write_json("octavo.json", _record(job, calibration, format, tokens, found))
            writer.seal()
            work.publish()
    return QuantizeResult(
        output=str(target),
        format=format,
        layers=len(job.plans),
        linears=sum(len(plan.linears) for plan in job.plans),
        tensors=len(layout),
        tokens=0 if tokens is None else tokens.numel(),
        bytes_before=job.checkpoint.nbytes,
        bytes_after=sum(tensor.nbytes for tensor in layout.values()),
        peak_memory=max([peak_resident(), *peaks]),
        seconds=clock.seconds(),
        warnings=[
            *_warnings(job, calibration, tokens),
            *_damped(found.errors),
            *_not_learned(found.errors),
        ],
    )


class _Finished:
    """How many layers are finished, those of an earlier run included."""

    def __init__(self, layers: int) -> None:
        self.layers = layers


class _Run(NamedTuple):
    """What both ways of running share."""

    job: Job
    tokens: Tensor | None
    settings: Settings
    work: Workspace
    journal: Journal
    writer: CheckpointWriter
    clock: Stopwatch
    on_progress: Callable[[Progress], None]
    finished: _Finished

    def progress(self, done: int, detail: str = "") -> None:
        """Pass on how many layers are done."""
        self.finished.layers = done
        count = 0 if self.tokens is None else self.tokens.numel()
        self.on_progress(Progress(done, len(self.job.plans), count, detail))


def _run_here(run: _Run) -> list[dict[str, Any]]:
    """All layers in this process, one to a pass."""
    finished: set[int] = set()

    def on_layer(index: int) -> None:
        finished.add(index)
        run.progress(len(finished))

    with ExitStack() as stack:
        cores, stream = stack.enter_context(one_thread_each()), None
        if run.tokens is not None:
            stream = CalibrationStream(
                run.job.decoder,
                hidden_shape(run.job, run.tokens, run.settings),
                run.work.directory,
                run.work.target,
                scales=run.job.scheme.scales,
                workers=batches_at_once(run.job.decoder.device, min(cores, run.settings.workers)),
                before_batch=partial(release, run.settings.threshold),
            )
            stack.enter_context(stream)
        with run.clock("carry"):
            carry_rest(run.job, run.writer, run.journal)
        Stage(
            job=run.job,
            passes=[(index,) for index in range(len(run.job.plans))],
            stream=stream,
            tokens=run.tokens,
            keep_states=False,
            writer=run.writer,
            journal=run.journal,
            read_ahead=run.settings.read_ahead,
            cores=cores,
            clock=run.clock,
            before_unit=partial(release, run.settings.threshold),
        ).run(on_layer)
    return run.journal.records


def _run_on_workers(run: _Run, orders: Sequence[Order], cluster: str | None) -> list[Outcome]:
    """A stage of the layers to each worker."""
    batches = len(orders[0].shape.batches) if orders[0].shape else 0

    def show(reports: Sequence[Report]) -> None:
        told = [
            f"{number}: {report.layers}/{sum(map(len, order.passes))} layers"
            + (f", {report.batches}/{batches} batches" if batches else "")
            for number, (report, order) in enumerate(zip(reports, orders, strict=True), start=1)
        ]
        run.progress(sum(report.layers for report in reports), "; ".join(told))

    def carry() -> None:
        carry_rest(run.job, run.writer, run.journal)

    with run.clock("workers"):
        return run_stages(orders, cluster, run.writer, carry, show)


@contextmanager
def _told(work: Workspace, finished: _Finished, total: int) -> Iterator[None]:
    """Tell whoever is told of an interruption what is left, and how to go on."""
    try:
        yield
    except BaseException as error:
        work.keep = finished.layers > 0
        if work.keeps(error):
            error.add_note(
                f"{finished.layers} of {total} layers are finished and kept in {work.directory}: the same "
                "command with --resume goes on from there."
            )
        raise


def _own_device(device: str, workers: int | None) -> torch.device:
    """Where this process computes: with workers nothing, so that it needs no GPU."""
    return pick_device("cpu" if workers is not None else device)


def _settings(
    job: Job, tokens: Tensor | None, kind: str, workers: int | None, max_memory: int | None
) -> Settings:
    # On a GPU batches and layers are in its own memory.
    on_gpu = kind == "cuda"
    samples, seq_len = (0, 0) if tokens is None else tokens.shape
    program = program_memory() if workers is None else worker_memory(job, seq_len, kind, workers)
    settings = choose_settings(
        layer_shape(job, on_gpu=on_gpu),
        max_memory,
        BATCH_TOKENS[kind],
        seq_len=0 if on_gpu else seq_len,
        cores=worker_threads(workers or 1),
        layers=1 if on_gpu else len(job.plans),
        samples=samples,
        rows=0 if tokens is None else len(torch.unique(tokens)),
        program=program,
    )
    if workers is None or tokens is None:
        # Without calibration nothing is gained by holding several layers.
        return settings
    limit = None if on_gpu else max_memory
    return hold_layers(job, settings, tokens.shape, kind, workers, limit)


def _check_text(job: Job, calibration: Calibration, max_memory: int | None) -> None:
    """Raise if tokenizing takes more than a run may. Documents of one file each are known beforehand."""
    source = Path(calibration.source)
    if not job.scheme.needs_calibration or source.suffix == ".npy":
        return
    files = [job.checkpoint.directory / "tokenizer.json", source]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in files]
    check_text(max_memory, sizes[0], sizes[1] if source.suffix in (".txt", ".raw") else 0)


class _Statistics(NamedTuple):
    """What a run found out on the way, for the edition's record.

    Attributes:
        amax: of weights, and what the scales of inputs, keys and values are taken from, by name.
        errors: what rounding did to each linear layer's weight.
        aligned: attention blocks whose keys were moved onto the cache's numbers.
    """

    amax: dict[str, float]
    errors: dict[str, Any]
    aligned: list[str]


def _statistics(plans: Sequence[LayerPlan], records: Sequence[Mapping[str, Any]]) -> _Statistics:
    """Those of a journal, in the order of the layers."""
    amax: dict[str, float] = {}
    errors: dict[str, Any] = {}
    aligned: set[str] = set()
    for record in records:
        amax |= record.get("amax", {})
        errors |= record.get("errors", {})
        aligned.update(record.get("aligned_keys", []))
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
        [block for plan in plans for block in plan.attention if block in aligned],
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
        "rotation": job.source.rotation,
        "calibration": None if tokens is None else calibration.drawn(tokens),
        "amax": found.amax,
        "weights": found.errors,
        "aligned_keys": found.aligned,
    }


def _damped(errors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to know of linear layers whose inputs told GPTQ too little."""
    raised = {name: one["damping"] for name, one in errors.items() if "damping" in one}
    raised = {name: damping for name, damping in raised.items() if damping > DAMPING}
    if not raised:
        return []
    return [
        f"The second moments of {len(raised)} linear layers' inputs, those of {next(iter(raised))} among them, could be "
        f"factored only with damping of up to {max(raised.values()):g} in the place of {DAMPING:g}: too few tokens, or "
        "inputs that are always alike. Their codes are nearer to nearest ones. Pass more text."
    ]


def _not_learned(errors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to know of decoder layers whose loss did not become smaller."""
    kept = [
        name for name, one in errors.items() if "learned_codes" in one and not one["learned_codes"]
    ]
    kept = [
        name for name in kept if errors[name]["block_loss"] == errors[name]["block_loss_before"]
    ]
    if not kept:
        return []
    return [
        f"Learning made the outputs of the decoder layers of {len(kept)} linear layers no better, those of {kept[0]} among "
        "them: they keep the codes of GPTQ. It takes many tokens to tell more than chance: pass more text."
    ]


def _warnings(job: Job, calibration: Calibration, tokens: Tensor | None) -> list[str]:
    found = []
    if tokens is not None and calibration.samples and len(tokens) < calibration.samples:
        found.append(
            f"The calibration text {calibration.source} gave {len(tokens)} samples of "
            f"{tokens.shape[1]} tokens, {calibration.samples} were asked for."
        )
    if job.scheme.rounding != "nearest" and calibration.source == BUILTIN:
        found.append(
            f"--rounding {job.scheme.rounding} chooses codes for the text it sees, and the built-in text is about Python "
            "alone. Pass --calib with text like what the model will read, or with what the model writes itself "
            "(octavo write-calibration)."
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
