"""``octavo bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from octavo.allocator import quick_imports
from octavo.cli.evaluate import Quiet
from octavo.cli.program import command, say
from octavo.console import CountProgress, stderr, stdout

if TYPE_CHECKING:
    from octavo.throughput import BenchResults, Comparison, Spread


@command(after_interrupt="the servers it started have been stopped, and nothing is written")
def bench(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]CKPT",
            help="Checkpoint directories, or URLs of OpenAI-compatible servers that run. The first is "
            "what the others are compared with.",
        ),
    ],
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens generated after each.")] = 128,
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight, one load for each: N,N,N.")
    ] = "1,8,32",
    engine: Annotated[
        str | None,
        typer.Option(
            help="What serves a directory: vllm, tensorrt-llm or torch, Octavo's own. vllm if it is installed, "
            "or else torch."
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Measured under each load; 4 × its concurrency, at least 8."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each server bears each load, turn by turn.")
    ] = 3,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time",
            help="Start each server anew for every round, for models that do not fit side by side.",
        ),
    ] = False,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until a server has to be healthy.")
    ] = 1800,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the random prompts. New each time: servers remember prompts."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Directory for results.json and the figure."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results in the output.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast checkpoints are served, side by side."""
    with CountProgress("measuring", quiet=quiet) as progress:
        with quick_imports():
            from octavo.benchmarking import bench as run
            from octavo.throughput import parse_concurrency
        results = run(
            checkpoints,
            input_len=input_len,
            output_len=output_len,
            concurrency=parse_concurrency(concurrency),
            engine=engine,
            requests=requests,
            rounds=rounds,
            one_at_a_time=one_at_a_time,
            start_timeout=start_timeout,
            seed=seed,
            output=output,
            overwrite=overwrite,
            on_request=lambda done, total: progress.update(done, total, "requests"),
            on_line=lambda line: None if quiet else stderr.print(Text(line), soft_wrap=True),
        )
    for note in results.notes:
        say("yellow", "note", note)
    if as_json:
        print(results.model_dump_json())
    elif not quiet:
        stdout.print(_table(results))


def _table(results: BenchResults) -> Table:
    """The metrics under each load: a column for each server, and one for each ratio."""
    from octavo.throughput import METRICS

    first, *others = (contender.name for contender in results.contenders)
    work, machine = results.workload, results.machine
    engines = {f"{one.engine or 'engine'} {one.version or '?'}" for one in results.contenders}
    rounds = "one round" if work.rounds == 1 else f"median of {work.rounds} rounds (least–most)"
    table = Table(
        title=Text(
            f"{work.input_len} tokens in, {work.output_len} out, {rounds}\n"
            f"{', '.join(machine.gpus) or machine.cpu}; {', '.join(sorted(engines))}"
        ),
        title_justify="left",
    )
    table.add_column("")
    for name in (first, *others):
        table.add_column(Text(name), justify="right")
    for name in others:
        table.add_column(Text(f"{name} / {first}"), justify="right")
    for comparison in results.comparisons:
        table.add_section()
        table.add_row(Text(f"{comparison.concurrency} in flight", style="bold"))
        for key, metric in METRICS.items():
            if key in comparison.values[first]:
                table.add_row(f"  {metric.label}", *_cells(comparison, key, [first, *others]))
    return table


def _cells(comparison: Comparison, key: str, names: list[str]) -> list[str]:
    values = [_value(comparison.values[name][key]) for name in names]
    ratios = [comparison.ratios[name].get(key) for name in names[1:]]
    return [*values, *("–" if ratio is None else _ratio(ratio) for ratio in ratios)]


def _value(value: Spread) -> str:
    return f"{value.median:,.1f}" if value.median < 1000 else f"{value.median:,.0f}"


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
