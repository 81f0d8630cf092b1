"""``octavo eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.allocator import quick_imports
from octavo.cli.program import command
from octavo.console import CountProgress, estimate, results_table, stdout

if TYPE_CHECKING:
    from octavo.evaluation import (
        DivergenceResult,
        HarnessResult,
        MmluResult,
        PerplexityResult,
    )

RESUME = "the same command with --resume takes it up where it stopped"

Rows = list[tuple[str, str]]

Model = Annotated[str, typer.Argument(help="Checkpoint directory, BF16 or FP8, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
EngineName = Annotated[str, typer.Option(help="What runs the model: transformers or vllm.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


@command("eval", after_interrupt=RESUME)
def evaluate(
    model: Model,
    task: Annotated[
        str, typer.Option(help="perplexity, kl, mmlu, or lm-eval:NAME,NAME of its harness.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="perplexity and kl: builtin, wikitext2, or a .txt, .raw, .jsonl, .parquet or .npy file; "
            "mmlu: a directory with dev/*.csv and test/*.csv; lm-eval: a directory of tasks."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="kl: the checkpoint the edition was made from.")
    ] = None,
    engine: EngineName = "transformers",
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="perplexity: tokens from one window to the next; --seq-len."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Windows; questions of each subject; documents of each task."),
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="mmlu: solved questions shown first.")] = 5,
    subject: Annotated[
        list[str] | None, typer.Option(help="mmlu: only this subject. Repeatable.")
    ] = None,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same evaluation was stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure a checkpoint: perplexity, KL divergence, MMLU, or tasks of lm-evaluation-harness."""
    with CountProgress(quiet=quiet) as progress:
        with quick_imports():
            from octavo.evaluation import as_json as plain
            from octavo.evaluation import evaluate as run
        result: Any = run(
            model,
            task=task,
            data=data,
            reference=reference,
            engine=engine,
            seq_len=seq_len,
            stride=stride,
            limit=limit,
            shots=shots,
            subjects=subject,
            device=device,
            resume=resume,
            on_progress=lambda step: progress.update(*step),
        )
    if as_json:
        print(json.dumps(plain(result)))
    elif not quiet:
        rows = _ROWS[task.partition(":")[0]](result)
        stdout.print(results_table(f"{Path(model).name}: {task}", rows))


def _perplexity_rows(result: PerplexityResult) -> Rows:
    return [
        ("perplexity", estimate(result.perplexity, result.standard_error)),
        ("mean NLL, nats/token", estimate(result.nll, result.nll_standard_error, digits=4)),
        ("windows × tokens", f"{result.windows} × {result.seq_len}"),
        ("tokens scored", f"{result.tokens:,}"),
        ("tokens/s", f"{result.tokens_per_second:,.0f}"),
    ]


def _divergence_rows(result: DivergenceResult) -> Rows:
    return [
        ("KL, nats/token", estimate(result.kl, result.kl_standard_error, digits=5)),
        ("worst 1 % of tokens", f"{result.worst_mean:.4f} on average"),
        (
            "same likeliest token",
            estimate(100 * result.top1_agreement, _percent(result.top1_standard_error), "%"),
        ),
        (
            "perplexity of the reference",
            estimate(result.reference_perplexity, result.reference_standard_error),
        ),
        ("perplexity", estimate(result.perplexity, result.perplexity_standard_error)),
        (
            "perplexity ratio",
            estimate(result.perplexity_ratio, result.ratio_standard_error, digits=5),
        ),
        ("windows × tokens", f"{result.windows} × {result.seq_len}"),
        ("tokens/s through both", f"{result.tokens_per_second:,.0f}"),
    ]


def _mmlu_rows(result: MmluResult) -> Rows:
    groups = {**result.subjects, **result.categories, "overall": result.overall}
    rows = [
        (
            f"{name.replace('_', ' ')} ({accuracy.questions})",
            estimate(100 * accuracy.accuracy, _percent(accuracy.standard_error), "%"),
        )
        for name, accuracy in groups.items()
    ]
    return [*rows, ("questions/s", f"{result.questions_per_second:.1f}")]


def _harness_rows(result: HarnessResult) -> Rows:
    return [
        (f"{task} {metric}", f"{value:.4f}" if isinstance(value, float) else str(value))
        for task, metrics in result.tasks.items()
        for metric, value in metrics.items()
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


_ROWS: dict[str, Callable[[Any], Rows]] = {
    "perplexity": _perplexity_rows,
    "kl": _divergence_rows,
    "mmlu": _mmlu_rows,
    "lm-eval": _harness_rows,
}
