"""``octavo plan``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from octavo.allocator import quick_imports
from octavo.cli.program import command
from octavo.cli.quantize import KvCache, Rounding
from octavo.console import results_table, stdout
from octavo.formats import FORMATS
from octavo.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from octavo.planning import Plan


@command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A directory with config.json, a name that `octavo synth --list` shows, or a hub id."
        ),
    ],
    device: Annotated[
        str,
        typer.Option(help="auto, cpu or cuda (this machine), or a100, h100, h200, b200, mi300x."),
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="As for quantize: stages on Ray.")
    ] = None,
    format: Annotated[str, typer.Option(help=f"Dialect: {', '.join(FORMATS)}.")] = "modelopt",
    scheme: Annotated[str, typer.Option(help="As for quantize.")] = "fp8",
    kv_cache: Annotated[KvCache | None, typer.Option(help="As for quantize.")] = None,
    rounding: Annotated[Rounding, typer.Option(help="As for quantize.")] = Rounding.nearest,
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration sequences; 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens in each; 512.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What each process may take.")
    ] = None,
    disk_read: Annotated[
        float | None, typer.Option(help="GB/s, instead of what is measured or assumed.")
    ] = None,
    disk_write: Annotated[float | None, typer.Option(help="GB/s, likewise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what quantizing a model will read, write, hold and take, from its config alone."""
    with quick_imports():
        from octavo.calibration import Calibration
        from octavo.planning import plan as run
        from octavo.scheme import scheme_called
    found = run(
        model,
        scheme=scheme_called(
            scheme,
            kv_cache=None if kv_cache is None else kv_cache.value,
            rounding=rounding.value,
        ),
        calibration=Calibration(samples=samples, seq_len=seq_len),
        format=format,
        device=device,
        workers=workers,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        disk_read=disk_read,
        disk_write=disk_write,
    )
    if as_json:
        print(json.dumps({**found._asdict(), "rates": found.rates._asdict()}))
        return
    stdout.print(_table(found))
    for assumption in found.assumptions:
        stdout.print(assumption, soft_wrap=True, highlight=False, markup=False)


def _table(found: Plan) -> Table:
    seconds = dict(found.seconds)
    total = seconds.pop("total")
    rates = {name: rate for name, rate in found.rates._asdict().items() if rate is not None}
    units = {"product": "TFLOP/s"}
    return results_table(
        f"{found.model} → {found.format}, {found.scheme}, {found.workers} × {found.device}",
        [
            ("parameters", f"{found.parameters:,}"),
            ("decoder layers", f"{found.layers}, {found.layers_at_a_time} at a time in a worker"),
            ("calibration tokens", f"{found.tokens:,}"),
            ("weights read, once", format_bytes(found.bytes_read)),
            ("edition", format_bytes(found.bytes_written)),
            ("hidden states written on the way", format_bytes(found.bytes_worked)),
            ("free disk needed", format_bytes(found.disk)),
            ("peak memory of each process", format_bytes(found.peak_memory)),
            *(
                [("memory of each GPU, estimated", format_bytes(found.device_memory))]
                if found.device_memory
                else []
            ),
            (
                "rates",
                ", ".join(f"{n} {r:.3g} {units.get(n, 'GB/s')}" for n, r in rates.items()),
            ),
            (
                "each worker, if nothing overlapped",
                ", ".join(f"{stage} {format_seconds(value)}" for stage, value in seconds.items()),
            ),
            ("time, overlapped", format_seconds(total)),
            ("bound by", found.bound_by),
        ],
    )
