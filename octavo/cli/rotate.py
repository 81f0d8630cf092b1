"""``octavo rotate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from octavo.allocator import quick_imports
from octavo.cli.options import AsJson, Overwrite, Quiet, Seed, SeqLen, ShardSize, TextField
from octavo.cli.program import command, say
from octavo.console import CountProgress, results_table, size_change, stdout
from octavo.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from octavo.rotating import RotateResult


@command()
def rotate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    calib: Annotated[
        str, typer.Option(help="Calibration data, as for octavo quantize.")
    ] = "builtin",
    text_field: TextField = "text",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Calibration sequences; 32 unless the .npy file has its own."),
    ] = None,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write the same model in axes in which FP8 loses less: an ordinary checkpoint, to be quantized."""
    with CountProgress("surveying", quiet=quiet) as progress:
        with quick_imports():
            from octavo.calibration import Calibration
            from octavo.rotating import SAMPLES
            from octavo.rotating import rotate as run
        if samples is None and not calib.endswith(".npy"):
            samples = SAMPLES

        def show(doing: str, done: int, total: int) -> None:
            if doing == "surveying":
                progress.update(done, total, "layers")
            else:
                progress.update(done // 10**6, total // 10**6, "MB")

        result = run(
            model,
            output,
            calibration=Calibration(
                source=calib, text_field=text_field, samples=samples, seq_len=seq_len, seed=seed
            ),
            device=device,
            shard_size=parse_bytes(shard_size),
            overwrite=overwrite,
            on_progress=show,
        )
    if result.untied:
        grown = format_bytes(result.bytes_after - result.bytes_before)
        say(
            "yellow",
            "warning",
            f"lm_head and the embedding were one tensor and are two now, {grown} more: only what lm_head reads is weighted "
            "by the final norm.",
        )
    if as_json:
        print(json.dumps(result._asdict()))
    elif not quiet:
        stdout.print(_table(result))


def _table(result: RotateResult) -> Table:
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
    return results_table(
        result.output,
        [
            ("size", size_change(result.bytes_before, result.bytes_after)),
            ("decoder layers", f"{result.layers}"),
            ("tensors written", f"{result.tensors}"),
            ("calibration tokens", f"{result.tokens:,}"),
            ("noise of FP8 where hidden states are read", f"{result.noise:.2f} × as much"),
            ("seconds", seconds),
        ],
    )
