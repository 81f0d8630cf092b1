"""``octavo.report``: measure an edition against its original, and write what a reader wants to know."""

from __future__ import annotations

import datetime
import math
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from octavo.checkpoint import Checkpoint
from octavo.checkpoint.hub import resolve_model
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.evaluation import Accuracy as Share
from octavo.evaluation import (
    DivergenceResult,
    MmluResult,
    evaluate,
    load_subjects,
)
from octavo.evaluation.progress import OnProgress, silent
from octavo.preflight import pick_device
from octavo.reporting import (
    Accuracy,
    Divergence,
    Environment,
    Estimate,
    Evaluation,
    Histogram,
    Mmlu,
    MmluComparison,
    Perplexity,
    PerplexityComparison,
    Results,
    check_report_target,
    read_base_card,
    read_record,
    write_report,
)
from octavo.reporting import Edition as Described
from octavo.version import __version__

_SHOTS = 5


def report(
    model: str | Path,
    reference: str | Path,
    output: str | Path,
    *,
    data: str | Path = "builtin",
    mmlu: str | Path | None = None,
    seq_len: int = 2048,
    limit: int | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Results:
    """Write a model card, an HTML page and a file of all numbers about an FP8 edition.

    Perplexity and KL divergence come from one pass of both models over ``data``; MMLU, where its
    questions are given, from both models. What the edition's own record holds needs no pass.

    Args:
        model: the edition.
        reference: the checkpoint it was made from.
        output: the directory for ``README.md``, ``report.html`` and ``results.json``.
        data: a held-out text, see :func:`octavo.evaluation.load_tokens`.
        mmlu: a directory with MMLU's questions; without one, MMLU is left out.
        seq_len: tokens in a window.
        limit: windows, and questions of each subject, at most.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        resume: take up a report with the same arguments where it was stopped.
        overwrite: replace a report in ``output``.
        on_progress: called after each window and each subject.

    Returns:
        What was written.

    Raises:
        OctavoError: a model, the data or the output does not allow it; nothing is written.
    """
    edition_path, base_path, target = resolve_model(model), resolve_model(reference), Path(output)
    check_report_target(target, overwrite=overwrite)
    described = _describe(edition_path, base_path)
    record, card = read_record(edition_path), read_base_card(base_path)

    def measure(path: Path, task: str, data: str | Path) -> object:
        return evaluate(
            path,
            task=task,
            data=data,
            reference=base_path if task == "kl" else None,
            seq_len=seq_len,
            limit=limit,
            shots=_SHOTS,
            device=device,
            resume=resume,
            on_progress=on_progress,
        )

    found = measure(edition_path, "kl", data)
    assert isinstance(found, DivergenceResult)
    evaluation = Evaluation(
        perplexity=_perplexities(found, Path(data).name),
        divergence=_divergence(found, Path(data).name),
    )
    if mmlu is not None:
        before, after = (measure(path, "mmlu", mmlu) for path in (base_path, edition_path))
        assert isinstance(before, MmluResult)
        assert isinstance(after, MmluResult)
        truth = {
            subject.name: "".join(question.answer for question in subject.questions)
            for subject in load_subjects(Path(mmlu), shots=_SHOTS, limit=limit)
        }
        evaluation = evaluation.model_copy(update={"mmlu": _accuracies(before, after, truth)})
    results = Results(
        environment=_environment(device),
        edition=described,
        base_card=card,
        evaluation=evaluation,
        commands=(_command(described, data, mmlu, seq_len, limit),),
        record=record,
    )
    write_report(results, target, overwrite=overwrite)
    return results


def _describe(path: Path, base_path: Path) -> Described:
    checkpoint, base = Checkpoint(path), Checkpoint(base_path)
    edition = Edition(checkpoint)
    if edition.dialect is None or edition.scheme is None:
        raise OctavoError(
            f"{path} is not quantized: its config.json has no quantization_config. "
            "Pass the FP8 edition first and its original as --reference."
        )
    return Described(
        name=path.resolve().name,
        base_model=base_path.resolve().name,
        format=edition.dialect,
        scheme=edition.scheme,
        bytes_before=base.nbytes,
        bytes_after=checkpoint.nbytes,
    )


def _estimate(value: float, error: float | None) -> Estimate:
    return Estimate(value=value, standard_error=error)


def _perplexities(found: DivergenceResult, data: str) -> PerplexityComparison:
    def one(value: float, error: float | None) -> Perplexity:
        return Perplexity(
            value=value,
            standard_error=error,
            data=data,
            tokens=found.tokens,
            windows=found.windows,
            seq_len=found.seq_len,
        )

    return PerplexityComparison(
        before=one(found.reference_perplexity, found.reference_standard_error),
        after=one(found.perplexity, found.perplexity_standard_error),
        ratio=_estimate(found.perplexity_ratio, found.ratio_standard_error),
    )


def _divergence(found: DivergenceResult, data: str) -> Divergence:
    return Divergence(
        mean=_estimate(found.kl, found.kl_standard_error),
        worst_1_percent=found.worst_mean,
        top1_agreement=_estimate(found.top1_agreement, found.top1_standard_error),
        histogram=Histogram(
            edges=tuple(found.histogram.edges), counts=tuple(found.histogram.counts)
        ),
        data=data,
        tokens=found.tokens,
        windows=found.windows,
        seq_len=found.seq_len,
    )


def _accuracies(before: MmluResult, after: MmluResult, truth: dict[str, str]) -> MmluComparison:
    def accuracy(share: Share) -> Accuracy:
        error = _estimate(share.accuracy, share.standard_error)
        return Accuracy(**error.model_dump(), questions=share.questions)

    def one(result: MmluResult) -> Mmlu:
        return Mmlu(
            **accuracy(result.overall).model_dump(),
            shots=result.shots,
            categories={name: accuracy(share) for name, share in result.categories.items()},
            subjects={name: accuracy(share) for name, share in result.subjects.items()},
        )

    changes = [
        (now == right) - (then == right)
        for subject, letters in truth.items()
        for right, then, now in zip(
            letters, before.answers[subject], after.answers[subject], strict=True
        )
    ]
    return MmluComparison(before=one(before), after=one(after), change=_paired(changes))


def _paired(changes: Sequence[int]) -> Estimate:
    """The mean change from question to question."""
    count = len(changes)
    mean = sum(changes) / count
    variance = sum((change - mean) ** 2 for change in changes) / max(count - 1, 1)
    return Estimate(value=mean, standard_error=math.sqrt(variance / count))


def _environment(device: str) -> Environment:
    chosen = pick_device(device)
    return Environment(
        octavo=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        engine="transformers",
        device=torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor(),
        os=platform.platform(),
        date=datetime.date.today(),
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "unknown"


def _command(
    edition: Described, data: str | Path, mmlu: str | Path | None, seq_len: int, limit: int | None
) -> str:
    """The command line that measures it again. Files go by their names: where they lie is no one's
    business but the author's."""
    parts = ["octavo", "report", edition.name, "--reference", edition.base_model, "-o", "report"]
    parts += ["--data", Path(data).name, "--seq-len", str(seq_len)]
    parts += [] if mmlu is None else ["--mmlu", Path(mmlu).name]
    parts += [] if limit is None else ["--limit", str(limit)]
    return shlex.join(parts)
