"""``octavo convert``."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from octavo.allocator import quick_imports
from octavo.cli.options import AsJson, Overwrite, Quiet, ShardSize
from octavo.cli.program import command, say
from octavo.console import CountProgress, results_table, size_change, stdout
from octavo.formats import FORMATS
from octavo.units import parse_bytes

if TYPE_CHECKING:
    from octavo.conversion import ConvertResult


class Dtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@command(after_interrupt="the partial output has been removed")
def convert(
    source: Annotated[str, typer.Argument(help="An FP8 edition in any dialect.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    to: Annotated[str | None, typer.Option(help=f"Dialect to write: {', '.join(FORMATS)}.")] = None,
    dequantize: Annotated[
        Dtype | None, typer.Option(help="Write a plain checkpoint of this dtype instead.")
    ] = None,
    tp: Annotated[
        int, typer.Option(min=1, help="Tensor parallel ranks (tensorrt-llm: a file for each).")
    ] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline parallel ranks, likewise.")] = 1,
    config: Annotated[
        Path | None,
        typer.Option(help="The original model's config.json, where the source has none."),
    ] = None,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write an FP8 edition in another dialect, codes untouched, or back as a plain checkpoint."""
    with CountProgress("converting", quiet=quiet) as progress:
        with quick_imports():
            from octavo.conversion import convert as run
        result = run(
            source,
            output,
            to=to,
            dequantize=None if dequantize is None else dequantize.value,
            tp=tp,
            pp=pp,
            config=config,
            shard_size=parse_bytes(shard_size),
            overwrite=overwrite,
            on_progress=lambda done, total: progress.update(done // 10**6, total // 10**6, "MB"),
        )
    for warning in result.warnings:
        say("yellow", "warning", warning)
    if as_json:
        errors = {name: error._asdict() for name, error in result.requantized.items()}
        print(json.dumps({**result._asdict(), "requantized": errors}))
    elif not quiet:
        stdout.print(_table(result))


def _table(result: ConvertResult) -> Table:
    return results_table(
        f"{result.output} ({result.before} → {result.after or 'unquantized'})",
        [
            ("size", size_change(result.bytes_before, result.bytes_after)),
            ("tensors written", f"{result.tensors}"),
            ("weights rounded again", f"{len(result.requantized)}"),
            ("seconds", f"{result.seconds['total']:.1f}"),
        ],
    )
