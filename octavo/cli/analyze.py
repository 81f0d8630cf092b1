"""``octavo analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from octavo.allocator import quick_imports
from octavo.cli.evaluate import Device, Quiet
from octavo.cli.program import command, say
from octavo.cli.quantize import KvCache, Scales
from octavo.console import CountProgress, results_table, stderr, stdout
from octavo.units import format_bytes

if TYPE_CHECKING:
    from octavo.analysis import Cost
    from octavo.reporting.analysis import Analysis


@command()
def analyze(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    scheme: Annotated[str, typer.Option(help="As for quantize.")] = "fp8",
    kv_cache: Annotated[KvCache | None, typer.Option(help="As for quantize.")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Leave matching modules as they are. Repeatable."),
    ] = None,
    dynamic_inputs: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="As for quantize. Repeatable.")
    ] = None,
    merge_scales: Annotated[
        bool, typer.Option("--merge-scales", help="One weight scale for q/k/v and for gate/up.")
    ] = False,
    scales: Annotated[Scales, typer.Option(help="As for quantize.")] = Scales.amax,
    calib: Annotated[str, typer.Option(help="Calibration data, as for quantize.")] = "builtin",
    text_field: Annotated[
        str, typer.Option(help="Its field or column with the text, in .jsonl and .parquet.")
    ] = "text",
    samples: Annotated[
        int | None, typer.Option(min=1, help="Calibration sequences; 128, or an .npy file's rows.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of samples.")] = 0,
    data: Annotated[
        str,
        typer.Option(
            help="Text to measure on, not calibration's: builtin, wikitext2, or a .txt, .raw, .jsonl, .parquet or "
            ".npy file."
        ),
    ] = "builtin",
    windows: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 4,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens in a calibration sequence and in a window; 512."),
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output if there is one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Say where a model would lose by FP8: layer by layer, part by part."""

    def told(cost: Cost) -> None:
        if not quiet:
            stderr.print(_told(cost), soft_wrap=True, highlight=False)

    with CountProgress("analyzing", quiet=quiet) as progress:
        with quick_imports():
            from octavo.analysis import analyze as run
            from octavo.calibration import Calibration
            from octavo.scheme import scheme_called
        found = run(
            model,
            output,
            scheme=scheme_called(
                scheme,
                kv_cache=None if kv_cache is None else kv_cache.value,
                exclude=tuple(exclude or ()),
                dynamic=tuple(dynamic_inputs or ()),
                merge_scales=merge_scales,
                scales=scales.value,
            ),
            calibration=Calibration(
                source=calib, text_field=text_field, samples=samples, seq_len=seq_len, seed=seed
            ),
            data=data,
            windows=windows,
            seq_len=seq_len,
            device=device,
            overwrite=overwrite,
            on_start=told,
            on_progress=lambda step: progress.update(*step),
        )
    for warning in found.warnings:
        say("yellow", "warning", warning)
    if as_json:
        print(found.model_dump_json())
    elif not quiet:
        stdout.print(_costliest(found))
        stdout.print(_summary(found, output))


def _told(cost: Cost) -> str:
    return (
        f"{cost.units} parts, each quantized alone: {cost.passes:,} passes of {cost.tokens:,} tokens through a layer in "
        f"float32, {cost.work:,.0f} with calibration and lm_head; {format_bytes(cost.disk)} of hidden states on disk"
    )


def _costliest(found: Analysis) -> Table:
    from octavo.reporting.analysis_page import TOP, rows

    table = Table(title=Text(f"{found.model.name}: what costs most"), title_justify="left")
    table.add_column("quantized alone", no_wrap=True)
    for name in ("KL, nats/token", "of everything", "bytes if kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(found, found.costliest[:TOP]):
        table.add_row(*map(Text, row))
    return table


def _summary(found: Analysis, output: Path) -> Table:
    from octavo.reporting.analysis_page import nats
    from octavo.reporting.numbers import number

    everything = found.everything
    layers = sum(layer.kl for layer in found.layers)
    return results_table(
        "KL divergence, nats/token",
        [
            ("everything quantized", nats(everything)),
            (f"sum of {len(found.units)} units", number(found.sum_of_units)),
            (f"sum of {len(found.layers)} whole layers", number(layers)),
            (
                "measured on",
                f"{found.text.data}, {found.text.windows} × {found.text.seq_len} tokens",
            ),
            ("page", str(output / "analysis.html")),
        ],
    )
