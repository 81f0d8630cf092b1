"""``octavo report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.allocator import quick_imports
from octavo.cli.evaluate import RESUME, Device, Quiet
from octavo.cli.program import command
from octavo.console import CountProgress, estimate, results_table, size_change, stdout


@command(after_interrupt=RESUME)
def report(
    model: Annotated[str, typer.Argument(help="The FP8 edition's directory.")],
    reference: Annotated[str, typer.Option(help="The checkpoint it was made from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the report.")],
    data: Annotated[
        str, typer.Option(help="Held-out text: builtin, wikitext2, or a file.")
    ] = "builtin",
    mmlu: Annotated[
        Path | None, typer.Option(help="Directory with MMLU's dev/*.csv and test/*.csv.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Windows, and questions of each MMLU subject.")
    ] = None,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same report was stopped.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report in the output.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Measure an edition against its original and write model card, report.html and results.json."""
    with CountProgress(quiet=quiet) as progress:
        with quick_imports():
            from octavo.publishing import report as run
        results = run(
            model,
            reference,
            output,
            data=data,
            mmlu=mmlu,
            seq_len=seq_len,
            limit=limit,
            device=device,
            resume=resume,
            overwrite=overwrite,
            on_progress=lambda step: progress.update(*step),
        )
    if quiet:
        return
    edition, evaluation = results.edition, results.evaluation
    rows = [("size", size_change(edition.bytes_before, edition.bytes_after))]
    if evaluation.perplexity is not None:
        before, after = evaluation.perplexity.before, evaluation.perplexity.after
        rows.append(("perplexity", f"{before.value:.3f} → {after.value:.3f}"))
        ratio = evaluation.perplexity.ratio
        rows.append(("ratio", estimate(ratio.value, ratio.standard_error, digits=4)))
    if evaluation.divergence is not None:
        kl = evaluation.divergence.mean
        rows.append(("KL, nats/token", estimate(kl.value, kl.standard_error, digits=5)))
    if evaluation.mmlu is not None:
        before_mmlu, after_mmlu = evaluation.mmlu.before, evaluation.mmlu.after
        rows.append(("MMLU", f"{before_mmlu.value:.2%} → {after_mmlu.value:.2%}"))
    rows.append(("report", str(output / "report.html")))
    stdout.print(results_table(edition.name, rows))
