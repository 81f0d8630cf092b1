"""``octavo.evaluate``: a model, a task, a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from octavo.checkpoint.hub import resolve_model
from octavo.engines import DistributionEngine, Engine, check_engine, open_engine
from octavo.errors import OctavoError
from octavo.evaluation.divergence import DivergenceResult, divergence
from octavo.evaluation.harness import check_installed, run_tasks
from octavo.evaluation.journal import Journal, fingerprint, open_journal, state_directory
from octavo.evaluation.mmlu import MmluResult, mmlu
from octavo.evaluation.perplexity import PerplexityResult, perplexity
from octavo.evaluation.progress import OnProgress, silent
from octavo.evaluation.questions import load_subjects
from octavo.evaluation.text import load_tokens
from octavo.tokenizer import load_tokenizer
from octavo.version import __version__


class HarnessResult(NamedTuple):
    """What lm-evaluation-harness found.

    Attributes:
        tasks: by task, its metrics (``acc,none``) and their standard errors (``acc_stderr,none``).
    """

    tasks: dict[str, dict[str, Any]]


Result: TypeAlias = PerplexityResult | DivergenceResult | MmluResult | HarnessResult


class _Job(NamedTuple):
    """What was asked for, with the model as a directory."""

    model: Path
    reference: Path | None
    names: list[str]
    data: str | Path | None
    engine: str
    seq_len: int
    stride: int | None
    limit: int | None
    shots: int
    subjects: list[str] | None
    device: str
    resume: bool
    on_progress: OnProgress

    def open(self) -> AbstractContextManager[Engine]:
        return closing(open_engine(self.engine, self.model, self.device))

    @contextmanager
    def journal(self, data: bytes | memoryview, *options: str) -> Iterator[Journal]:
        """A journal for this job's data; ``options`` are those that results depend on."""
        described = {name: getattr(self, name) for name in ("engine", "device", *options)}
        models = [self.model] if self.reference is None else [self.model, self.reference]
        name = fingerprint({"octavo": __version__, **described}, data, models)
        with open_journal(state_directory() / f"{name}.jsonl", resume=self.resume) as journal:
            yield journal


def evaluate(
    model: str | Path,
    *,
    task: str,
    data: str | Path | None = None,
    reference: str | Path | None = None,
    engine: str = "transformers",
    seq_len: int = 2048,
    stride: int | None = None,
    limit: int | None = None,
    shots: int = 5,
    subjects: list[str] | None = None,
    device: str = "auto",
    resume: bool = False,
    on_progress: OnProgress = silent,
) -> Result:
    """Measure a checkpoint, BF16 or an FP8 edition.

    Args:
        model: a checkpoint directory, or a hub id.
        task: ``perplexity``, ``kl``, ``mmlu``, or ``lm-eval:NAME,…`` with tasks of
            lm-evaluation-harness.
        data: for ``perplexity`` and ``kl`` a text, see :func:`octavo.evaluation.load_tokens`; for
            ``mmlu`` a directory, see :func:`octavo.evaluation.load_subjects`; for ``lm-eval``
            nothing, or a directory with tasks of one's own.
        reference: for ``kl``, the checkpoint that ``model`` was made from.
        engine: a key of :data:`octavo.engines.ENGINES`; ``kl`` needs one that gives whole distributions.
        seq_len: tokens in a window (``perplexity``, ``kl``).
        stride: tokens from one window to the next (``perplexity``); ``seq_len`` by default.
        limit: windows; questions of each subject; documents of each lm-eval task.
        shots: solved questions shown first (``mmlu``).
        subjects: those wanted (``mmlu``); all by default.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        resume: take up an evaluation with the same arguments where it was stopped.
        on_progress: called after each window, subject or request.

    Returns:
        :class:`PerplexityResult`, :class:`DivergenceResult`, :class:`MmluResult` or
        :class:`HarnessResult`.

    Raises:
        OctavoError: the model, the data or an option does not allow it.
    """
    kind, _, names = task.partition(":")
    if kind not in TASKS or bool(names) != (kind == "lm-eval"):
        raise OctavoError(
            f"Unknown task {task!r}. Expected perplexity, kl, mmlu, or lm-eval:NAME,NAME."
        )
    job = _Job(
        model=resolve_model(model),
        reference=None if reference is None else resolve_model(reference),
        names=names.split(","),
        data=data,
        engine=engine,
        seq_len=seq_len,
        stride=stride,
        limit=limit,
        shots=shots,
        subjects=subjects,
        device=device,
        resume=resume,
        on_progress=on_progress,
    )
    return TASKS[kind](job)


def _perplexity(job: _Job) -> PerplexityResult:
    tokens = load_tokens(_needed(job, "FILE or wikitext2"), job.model)
    # A window's result does not depend on how many there are: a resumed run may have another limit.
    with job.journal(tokens.numpy().data, "seq_len", "stride") as journal, job.open() as engine:
        return perplexity(
            engine,
            tokens,
            seq_len=job.seq_len,
            stride=job.stride,
            limit=job.limit,
            on_progress=job.on_progress,
            journal=journal,
        )


def _divergence(job: _Job) -> DivergenceResult:
    if job.reference is None:
        raise OctavoError("The task kl compares two models: pass the other one as --reference.")
    _check_whole(job.engine)
    tokens = load_tokens(_needed(job, "FILE or wikitext2"), job.reference)
    with (
        job.journal(tokens.numpy().data, "seq_len") as journal,
        closing(_open_whole(job, job.model)) as model,
        closing(_open_whole(job, job.reference)) as reference,
    ):
        return divergence(
            model,
            reference,
            tokens,
            seq_len=job.seq_len,
            limit=job.limit,
            on_progress=job.on_progress,
            journal=journal,
        )


def _check_whole(engine: str) -> None:
    """Raise unless an engine gives whole distributions, before anything is read."""
    if engine == "vllm":
        raise OctavoError(
            f"The task kl needs whole distributions, which the engine {engine} does not give. "
            "Use --engine transformers."
        )
    check_engine(engine)


def _open_whole(job: _Job, model: Path) -> DistributionEngine:
    """An engine that gives whole distributions."""
    engine = open_engine(job.engine, model, job.device)
    assert isinstance(engine, DistributionEngine)
    return engine


def _mmlu(job: _Job) -> MmluResult:
    subjects = load_subjects(
        Path(_needed(job, "DIR")), shots=job.shots, limit=job.limit, only=job.subjects
    )
    tokenizer = load_tokenizer(job.model)
    with job.journal(repr(subjects).encode()) as journal, job.open() as engine:
        return mmlu(engine, tokenizer, subjects, on_progress=job.on_progress, journal=journal)


def _harness(job: _Job) -> HarnessResult:
    check_installed()
    tokenizer = load_tokenizer(job.model)
    # A request's result depends on the request only, and that is what it is kept under.
    with job.journal(b"lm-eval") as journal, job.open() as engine:
        results = run_tasks(
            engine,
            tokenizer,
            job.names,
            limit=job.limit,
            include_path=None if job.data is None else Path(job.data),
            on_progress=job.on_progress,
            journal=journal,
        )
    return HarnessResult(results)


def _needed(job: _Job, what: str) -> str | Path:
    if job.data is None:
        raise OctavoError(f"This task needs data: pass --data {what}.")
    return job.data


TASKS: dict[str, Callable[[_Job], Result]] = {
    "perplexity": _perplexity,
    "kl": _divergence,
    "mmlu": _mmlu,
    "lm-eval": _harness,
}


def as_json(result: Any) -> Any:
    """A result as JSON values: named tuples as objects."""
    if hasattr(result, "_asdict"):
        result = result._asdict()
    if isinstance(result, dict):
        return {key: as_json(value) for key, value in result.items()}
    return [as_json(value) for value in result] if isinstance(result, list) else result
