"""``octavo.analyze``: where a model loses by FP8, before it is quantized."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from octavo.analysis.cost import Cost, cost_of
from octavo.analysis.measuring import Measured, all_units, measure, nearest
from octavo.analysis.units import LAYER, Unit, extra_bytes, extra_cache_bytes, moved
from octavo.calibration import BATCH_TOKENS, Calibration
from octavo.calibration.text import BUILTIN
from octavo.calibration.tokens import check_vocabulary
from octavo.checkpoint import Workspace
from octavo.checkpoint.hub import resolve_model
from octavo.errors import OctavoError
from octavo.evaluation.estimate import cluster_mean
from octavo.evaluation.progress import OnProgress, Progress, silent
from octavo.evaluation.text import load_tokens
from octavo.evaluation.windows import cut
from octavo.job import Job, calibration_tokens, layer_shape, open_job
from octavo.memory import Settings, choose_settings, program_memory
from octavo.preflight import check_target, pick_device
from octavo.reporting.analysis import (
    Analysis,
    InputError,
    LinearError,
    Loss,
    Model,
    Text,
    UnitLoss,
)
from octavo.reporting.analysis_writing import write_analysis
from octavo.reporting.record import CalibrationRecord, WeightError
from octavo.reporting.writing import check_drawing
from octavo.scheme import Scheme
from octavo.transfer import meta
from octavo.version import __version__

# A dialect that carries every scheme: an analysis depends on none.
_FORMAT = "compressed-tensors"

_SEQ_LEN = 512


def analyze(
    model: str | Path,
    output: str | Path,
    *,
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
    data: str | Path = BUILTIN,
    windows: int = 4,
    seq_len: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    on_start: Callable[[Cost], None] = lambda _: None,
    on_progress: OnProgress = silent,
) -> Analysis:
    """Measure what quantizing each part of a model to FP8 would cost.

    For each group of linear layers that engines fuse, each layer's KV cache and each whole layer: KL(model ‖ model
    with only that quantized), in nats per token, of the next-token distributions; and for each linear layer the
    errors of its weight and its inputs. The layers are read once, one at a time.

    Args:
        model: a BF16, FP16 or FP32 checkpoint directory, or a hub id.
        output: the directory to create, with ``analysis.json`` and ``analysis.html``; it appears only when complete.
        scheme: what would be quantized and how, as for :func:`octavo.quantize`. Weights are rounded to nearest.
        calibration: the text that static scales are taken on.
        data: the text that is measured on, see :func:`octavo.evaluation.load_tokens`: another than calibration's.
        windows: of that text, taken from all over it.
        seq_len: tokens in each; 512, or as many as the model has positions for.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overwrite: replace ``output`` if it exists.
        on_start: called with what is going to be done.
        on_progress: called after each pass of the windows through a layer.

    Returns:
        What ``analysis.json`` holds.

    Raises:
        OctavoError: the model, an option, the text or the disk does not allow it; nothing is written.
    """
    check_drawing()
    calibration = calibration or Calibration()
    source, target = resolve_model(model), Path(output)
    check_target(source, target)
    with ExitStack() as stack:
        job = open_job(source, nearest(scheme or Scheme()), _FORMAT, pick_device(device))
        stack.callback(job.checkpoint.close)
        samples = calibration_tokens(job, calibration)
        tokens = _load_windows(job, data, windows, seq_len)
        settings = _settings(job, samples)
        work = stack.enter_context(Workspace(target, overwrite=overwrite))
        units = all_units(job)
        cost = cost_of(job, units, samples, tokens, settings)
        on_start(cost)
        meter = _Meter(cost, on_progress)
        found = measure(job, units, samples, tokens, settings, work.directory, target, meter.add)
        losses = _losses(job, found)
        analysis = Analysis(
            octavo=__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            model=_model(job),
            scheme=job.scheme,
            device=job.decoder.device.type,
            calibration=_record(calibration, samples),
            text=Text(data=Path(data).name, windows=tokens.shape[0], seq_len=tokens.shape[1] + 1),
            units=tuple(loss for loss in losses if loss.unit != LAYER),
            layers=tuple(loss for loss in losses if loss.unit == LAYER),
            everything=_loss(found.everything, "everything"),
            linears=_linears(found),
            warnings=tuple(_warnings(calibration, samples, data, windows, tokens)),
        )
        write_analysis(analysis, work.edition)
        work.publish()
    return analysis


class LinearLoss(NamedTuple):
    """What a group of linear layers costs.

    Attributes:
        loss: quantized as the scheme has it.
        dynamic: quantized with dynamic inputs; None where that was not asked, or the scheme has it so.
    """

    loss: UnitLoss
    dynamic: UnitLoss | None


def linear_losses(
    source: Path,
    directory: Path,
    target: Path,
    *,
    scheme: Scheme,
    dynamic: bool,
    calibration: Calibration,
    data: str | Path,
    windows: int,
    seq_len: int,
    device: str,
    on_progress: OnProgress = silent,
) -> list[LinearLoss]:
    """What :func:`analyze` finds of the groups of linear layers alone, for two thirds of the work.

    Args:
        source: a checkpoint directory.
        directory: an existing one, for files of hidden states.
        target: the output they are for, named in errors.
        dynamic: also what each costs with dynamic inputs in the place of static ones: twice the work.

    Others, and errors, as for :func:`analyze`.
    """
    with ExitStack() as stack:
        job = open_job(source, nearest(scheme), _FORMAT, pick_device(device))
        stack.callback(job.checkpoint.close)
        samples = calibration_tokens(job, calibration)
        tokens = _load_windows(job, data, windows, seq_len)
        settings = _settings(job, samples)
        groups = [unit for unit in all_units(job) if unit.modules and unit.name != LAYER]
        others = moved(groups, job.scheme) if dynamic else []
        units = sorted([*groups, *others], key=lambda unit: unit.layer)
        meter = _Meter(cost_of(job, units, samples, tokens, settings), on_progress)
        found = measure(job, units, samples, tokens, settings, directory, target, meter.add)
        losses = dict(zip(units, _losses(job, found), strict=True))
        return [
            LinearLoss(losses[unit], losses.get(unit._replace(dynamic=True))) for unit in groups
        ]


class _Meter:
    """Adds up what is done."""

    def __init__(self, cost: Cost, on_progress: OnProgress) -> None:
        self._total, self._done, self._on_progress = cost.work, 0.0, on_progress

    def add(self, work: float) -> None:
        self._done += work
        self._on_progress(Progress(round(self._done), round(self._total), "layer passes"))


def _load_windows(job: Job, data: str | Path, count: int, seq_len: int | None) -> Tensor:
    """What goes through the model: int64 ``[windows, seq_len - 1]``. The last token of a window is only predicted,
    so that the same tokens are compared as by :func:`octavo.evaluation.divergence`."""
    if count < 1:
        raise OctavoError(f"--windows {count} leaves nothing to measure on. Choose at least 1.")
    config = job.decoder.config
    positions = config.max_position_embeddings
    tokens = load_tokens(data, job.checkpoint.directory)
    check_vocabulary(tokens.numpy(), str(data), config.vocab_size)
    length = seq_len or min(_SEQ_LEN, positions)
    every = cut(len(tokens), length, None, limit=None, max_positions=positions)
    count = min(count, len(every))
    # From all over the text: what lies together is about the same thing.
    chosen = [every[number * len(every) // count] for number in range(count)]
    return torch.stack([tokens[window.begin : window.end - 1] for window in chosen])


def _settings(job: Job, samples: Tensor | None) -> Settings:
    device = job.decoder.device.type
    on_gpu = device == "cuda"
    count, seq_len = (0, 0) if samples is None else samples.shape
    return choose_settings(
        layer_shape(job, on_gpu=on_gpu),
        None,
        BATCH_TOKENS[device],
        seq_len=0 if on_gpu else seq_len,
        cores=torch.get_num_threads(),
        layers=len(job.plans),
        samples=count,
        rows=0 if samples is None else len(torch.unique(samples)),
        program=program_memory(),
    )


def _model(job: Job) -> Model:
    return Model(
        name=job.source.directory.resolve().name,
        architecture=job.decoder.config.model_type,
        layers=len(job.plans),
        bytes=job.checkpoint.nbytes,
    )


def _record(calibration: Calibration, samples: Tensor | None) -> CalibrationRecord | None:
    if samples is None:
        return None
    return CalibrationRecord(
        source=Path(calibration.source).name,
        text_field=calibration.text_field,
        samples=samples.shape[0],
        seq_len=samples.shape[1],
        seed=calibration.seed,
    )


def _losses(job: Job, found: Measured) -> list[UnitLoss]:
    source = {name: meta(job.source, name) for name in job.source}

    def one(unit: Unit, kl: Tensor) -> UnitLoss:
        return UnitLoss(
            **_loss(kl, f"{unit.name} of layer {unit.layer}").model_dump(),
            layer=unit.layer,
            unit=unit.name,
            modules=unit.modules,
            bytes=extra_bytes(unit, job.plans[unit.layer], source, job.scheme),
            cache_bytes_per_token=extra_cache_bytes(unit, source),
        )

    return [one(unit, kl) for unit, kl in zip(found.units, found.kl, strict=True)]


def _loss(kl: Tensor, what: str) -> Loss:
    """Of KL ``[windows, tokens]``."""
    sums = kl.sum(dim=1).tolist()
    mean = cluster_mean(sums, [kl.shape[1]] * len(sums))
    if not torch.isfinite(kl).all():
        raise OctavoError(
            f"KL divergence with {what} quantized is {mean.mean}: the model overflows on this text. "
            "Check the checkpoint with another tool."
        )
    return Loss(kl=mean.mean, kl_standard_error=mean.standard_error)


def _linears(found: Measured) -> dict[str, LinearError]:
    return {
        name: LinearError(
            weight=WeightError(**error), input=InputError(**found.inputs[name]._asdict())
        )
        for name, error in found.weights.items()
    }


def _warnings(
    calibration: Calibration,
    samples: Tensor | None,
    data: str | Path,
    windows: int,
    tokens: Tensor,
) -> list[str]:
    found = []
    if samples is not None and str(data) == calibration.source != BUILTIN:
        found.append(
            f"{Path(data).name} is the calibration text too: what static scales cost on other text is not measured. "
            "Pass another --data."
        )
    if len(tokens) < windows:
        found.append(
            f"The text {Path(data).name} gave {len(tokens)} windows of {tokens.shape[1] + 1} tokens, {windows} were "
            "asked for."
        )
    return found
