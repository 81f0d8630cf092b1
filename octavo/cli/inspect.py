"""``octavo inspect`` and ``octavo verify``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo.allocator import quick_imports
from octavo.cli.program import command
from octavo.console import CountProgress, results_table, stdout
from octavo.units import format_bytes

if TYPE_CHECKING:
    from octavo.inspection import Comparison, Finding, Inspection, TensorReport
    from octavo.inspection.tables import Layer, Range
    from octavo.verification import Scores, Verification

Rows = list[tuple[str, str]]

Model = Annotated[str, typer.Argument(help="Checkpoint directory, FP8 or not, or a hub id.")]
Config = Annotated[
    Path | None,
    typer.Option(help="The original model's config.json, where the checkpoint has none."),
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
_SHORT = {
    "float8_e4m3fn": "e4m3",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}
_BAR = 40


@command()
def inspect(
    model: Model,
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this tensor, in detail.")
    ] = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a checkpoint: dialect, scheme, sizes, layers, scales, and anything odd."""
    with CountProgress("inspecting", quiet=quiet) as progress:
        with quick_imports():
            from octavo.inspection import as_json as plain
            from octavo.inspection import inspect as run
            from octavo.inspection import inspect_tensor
        found: Any
        if tensor is None:
            found = run(model, config=config, on_progress=lambda step: progress.update(*step))
        else:
            found = inspect_tensor(model, tensor, config=config)
    if as_json:
        print(json.dumps(plain(found)))
    else:
        stdout.print(_inspection(found) if tensor is None else _tensor(found))


@command()
def verify(
    model: Model,
    reference: Annotated[
        str | None,
        typer.Option(help="The checkpoint it was made from: measures every weight's SQNR."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="transformers or vllm: loads the checkpoint there and scores a text."),
    ] = None,
    config: Config = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint for what silently ruins quality.

    Exits with 0 if no finding is an error, 1 if one is, 2 if it cannot be checked.
    """
    with CountProgress("verifying", quiet=quiet) as progress:
        with quick_imports():
            from octavo.inspection import as_json as plain
            from octavo.verification import verify as run
        result = run(
            model,
            reference=reference,
            engine=engine,
            config=config,
            on_progress=lambda step: progress.update(*step),
        )
    if as_json:
        print(json.dumps({"ok": result.ok, **plain(result)}))
    else:
        stdout.print(_verification(result))
    if not result.ok:
        raise typer.Exit(1)


def _inspection(found: Inspection) -> RenderableType:
    sizes = found.sizes
    rows = [
        ("dialect", found.dialect or "none: not quantized"),
        *_scheme_rows(found),
        ("architecture", found.architecture),
        ("files", f"{len(found.files)}"),
        ("size", f"{format_bytes(sizes.bytes)}, {sizes.bytes_per_parameter:.3g} bytes/parameter"),
        *((f"  {dtype}", format_bytes(count)) for dtype, count in sizes.bytes_by_dtype.items()),
        ("parameters", f"{sizes.parameters:,}"),
    ]
    parts = [results_table(found.model, rows), _layers(found.layers)]
    return Group(*parts, *_findings(found.findings), Text(_count(found.findings)))


def _scheme_rows(found: Inspection) -> Rows:
    from octavo.inspection.names import fold

    scheme = found.scheme
    if scheme is None:
        return []
    rows = [
        ("scheme", scheme.kind),
        ("weight scales", f"one per {scheme.weights}"),
        ("inputs", scheme.inputs),
        ("KV cache", scheme.kv_cache),
    ]
    exceptions = {"dynamic inputs in": scheme.dynamic, "left unquantized": scheme.exclude}
    told = [(title, "\n".join(fold(names))) for title, names in exceptions.items() if names]
    return [*rows, *told]


def _layers(layers: Iterable[Layer]) -> Table:
    """Decoder layers; columns without a value are left out."""
    layers = list(layers)
    columns = {
        "layer": ["other" if one.number is None else f"{one.number}" for one in layers],
        "weights": [_dtypes(one.dtypes) for one in layers],
        "weight\nscales": [_range(one.weight_scale) for one in layers],
        "input\nscales": [_range(one.input_scale) for one in layers],
        "k\nscale": [_range(one.k_scale) for one in layers],
        "v\nscale": [_range(one.v_scale) for one in layers],
        "range\nused": ["" if one.used is None else f"{one.used:.0%}" for one in layers],
        "amax": ["" if one.amax is None else f"{one.amax:.3g}" for one in layers],
    }
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in shown:
        table.add_column(title, justify="left" if title == "weights" else "right", no_wrap=True)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _dtypes(counts: dict[str, int]) -> str:
    """``6 e4m3, 1 bf16``."""
    return ", ".join(f"{count} {_SHORT.get(name, name)}" for name, count in counts.items())


def _range(values: Range | None, digits: int = 2) -> str:
    if values is None:
        return ""
    low, high = f"{values.low:.{digits}g}", f"{values.high:.{digits}g}"
    return low if low == high else f"{low}–{high}"


def _findings(findings: Iterable[Finding]) -> list[RenderableType]:
    from octavo.inspection.names import tell

    blocks: list[RenderableType] = []
    for finding in findings:
        block = Table.grid(padding=(0, 1))
        block.add_column(width=9)
        block.add_column(overflow="fold")
        severity = finding.severity.value
        title = f"{finding.code}, {_number(len(finding.faults), 'place')}"
        block.add_row(Text(severity, style=_COLORS[severity]), Text(title, style="bold"))
        for label, lines in (
            ("found", tell(finding.faults)),
            ("expected", [finding.expected]),
            ("advice", [finding.advice]),
        ):
            block.add_row(Text(label, style="dim"), Text("\n".join(lines)))
        blocks += [block, Text()]
    return blocks


def _count(findings: Iterable[Finding]) -> str:
    """``2 errors, 1 note``."""
    counts = Counter(finding.severity.value for finding in findings)
    parts = [_number(counts[kind], kind) for kind in _COLORS if counts[kind]]
    return ", ".join(parts) or "Nothing odd."


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _tensor(found: TensorReport) -> RenderableType:
    rows = [
        ("stored as", "\n".join(found.stored)),
        ("file", "\n".join(found.files)),
        ("dtype", found.dtype),
        ("shape", " × ".join(map(str, found.shape)) or "scalar"),
        ("size", format_bytes(found.bytes)),
    ]
    rows += [
        (
            scaling.name.rpartition(".")[2],
            f"{_range(scaling.range, 6) or 'none valid'}"
            + (f", {scaling.values} values" if scaling.values > 1 else "")
            + (f", {scaling.invalid} invalid" if scaling.invalid else ""),
        )
        for scaling in found.scales
    ]
    rows.append(("amax", "unknown" if found.amax is None else f"{found.amax:.6g}"))
    rows += _quantization_rows(found)
    table = results_table(found.name, rows)
    return Group(table, _histogram(found)) if math.prod(found.shape) > 1 else table


def _quantization_rows(found: TensorReport) -> Rows:
    quantization = found.quantization
    if quantization is None:
        return []
    count = sum(quantization.counts)
    sqnr = quantization.expected_sqnr_db
    return [
        ("range used by codes", f"{quantization.used:.0%} of 448"),
        (
            "scales for less than half of it",
            f"{quantization.narrow} of {quantization.tiles}",
        ),
        ("zeros", _share(found.zeros, count)),
        ("subnormal codes", _share(quantization.subnormal, count)),
        ("codes of ±448", _share(quantization.saturated, count)),
        ("NaN codes", f"{quantization.nan}"),
        ("SQNR expected of rounding", "unknown" if sqnr is None else f"{sqnr:.2f} dB"),
    ]


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.2%})"


def _histogram(found: TensorReport) -> Table:
    what = "magnitudes of codes" if found.quantization else "magnitudes"
    table = Table(title=Text(f"{what}, from 2^n to 2^(n+1)"), title_justify="left", box=None)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max((one.count for one in found.histogram), default=0)
    for one in found.histogram:
        bar = "█" * round(_BAR * one.count / max(most, 1))
        table.add_row(Text(one.label), Text(f"{one.count:,}"), Text(bar))
    return table


def _verification(result: Verification) -> RenderableType:
    inspection = result.inspection
    scheme = f", {inspection.scheme.kind}" if inspection.scheme else ""
    title = f"{inspection.model} ({inspection.dialect or 'not quantized'}{scheme})"
    parts: list[RenderableType] = [Text(title, style="bold"), Text()]
    if result.comparison is not None:
        parts += [_comparison(result.comparison), Text()]
    if result.scores is not None:
        parts += [_scores(result.scores), Text()]
    return Group(*parts, *_findings(result.findings), Text(_count(result.findings)))


def _comparison(comparison: Comparison) -> Table:
    table = Table(
        title=Text(f"weights against {comparison.reference}, SQNR in dB"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=Text(
            f"{_number(comparison.equal, 'unquantized tensor')} with the reference's bytes"
        ),
        caption_justify="left",
    )
    for title in ("projection", "weights", "median", "lowest", "in", "outliers"):
        table.add_column(title, justify="left" if title in ("projection", "in") else "right")
    for one in comparison.projections:
        levels = (_level(one.median_db), _level(one.lowest_db))
        worst = (one.worst or "").removesuffix(f".{one.name}")
        table.add_row(one.name, f"{one.count}", *levels, worst, f"{len(one.outliers)}")
    return table


def _level(level: float | None) -> str:
    return "exact" if level is None else f"{level:.2f}"


def _scores(scores: Scores) -> Text:
    nll = "not finite" if scores.nll is None else f"{scores.nll:.4f} nats per token"
    compared = "" if scores.reference_nll is None else f", the reference {scores.reference_nll:.4f}"
    return Text(f"engine {scores.engine}: {nll} on {scores.tokens} tokens{compared}")
