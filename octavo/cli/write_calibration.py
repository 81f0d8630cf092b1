"""``octavo write-calibration``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from octavo.allocator import quick_imports
from octavo.cli.evaluate import Device, Model
from octavo.cli.options import AsJson, Overwrite, Quiet
from octavo.cli.program import command
from octavo.console import CountProgress, results_table, stdout

if TYPE_CHECKING:
    from octavo.self_calibration import WriteCalibrationResult


@command()
def write_calibration(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The .npy file of token ids to create.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens in each.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Have a model write the text that it is calibrated on, where there is no text like that it will read."""
    with CountProgress("writing", quiet=quiet) as progress:
        with quick_imports():
            from octavo.self_calibration import write_calibration as run
        result = run(
            model,
            output,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            overwrite=overwrite,
            on_progress=lambda done, total: progress.update(done, total, "tokens"),
        )
    if as_json:
        print(json.dumps(result._asdict()))
    elif not quiet:
        _show(result)


def _show(result: WriteCalibrationResult) -> None:
    tokens, total = result.samples * result.seq_len, result.seconds["total"]
    stdout.print(
        results_table(
            result.output,
            [
                ("calibration tokens", f"{result.samples} × {result.seq_len} = {tokens:,}"),
                ("seconds", f"{total:.1f} ({tokens / total:,.0f} tokens/s)"),
            ],
        )
    )
    stdout.print(
        Text("The first one begins: ", style="bold") + Text(" ".join(result.excerpt.split()))
    )
