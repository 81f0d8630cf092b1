"""``octavo synth``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from octavo.allocator import quick_imports
from octavo.cli.options import AsJson, Overwrite, Quiet, ShardSize
from octavo.cli.program import command
from octavo.console import CountProgress, results_table, stdout
from octavo.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from octavo.synthesis import SynthResult


def _list_shapes(asked: bool) -> None:
    if not asked:
        return
    with quick_imports():
        from octavo.synthesis import parameter_counts
    table = Table("name", "parameters", "BF16")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in parameter_counts().items():
        table.add_row(name, f"{count:,}", format_bytes(2 * count))
    stdout.print(table)
    raise typer.Exit


@command()
def synth(
    like: Annotated[str, typer.Option(help="The model whose shape it has, such as llama-3.1-8b.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder layers; all of the model's by default.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    list_shapes: Annotated[
        bool,
        typer.Option(
            "--list", callback=_list_shapes, is_eager=True, help="List the known models and exit."
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint of random weights in the exact shape of a known model."""
    with CountProgress("generating", quiet=quiet) as progress:
        with quick_imports():
            from octavo.synthesis import synth as run
        result = run(
            like,
            output,
            layers=layers,
            seed=seed,
            shard_size=parse_bytes(shard_size),
            overwrite=overwrite,
            on_progress=lambda done, total: progress.update(done // 10**6, total // 10**6, "MB"),
        )
    if as_json:
        print(json.dumps(result._asdict()))
    elif not quiet:
        stdout.print(_table(result))


def _table(result: SynthResult) -> Table:
    seconds = result.seconds["total"]
    return results_table(
        f"{result.output} (random weights, the shape of {result.like})",
        [
            ("size", format_bytes(result.nbytes)),
            ("parameters", f"{result.parameters:,}"),
            ("decoder layers", f"{result.layers}"),
            ("tensors written", f"{result.tensors}"),
            ("seconds", f"{seconds:.1f} ({format_bytes(result.nbytes / seconds)}/s)"),
        ],
    )
