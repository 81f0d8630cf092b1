"""``octavo serve``."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.allocator import quick_imports
from octavo.cli.evaluate import Model
from octavo.cli.program import command, say

if TYPE_CHECKING:
    from octavo.servers import ServerCommand


@command()
def serve(
    model: Model,
    extra: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="Flags of the engine's own. They win over ours."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What serves: vllm, tensorrt-llm or torch, Octavo's own. vllm if it is installed, or else torch."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    start_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds until the engine has to be healthy.")
    ] = 1800,
) -> None:
    """Serve a checkpoint behind an OpenAI-compatible API."""
    with quick_imports():
        from octavo.serving import serve as run
    name = "the engine"

    def announce(command: ServerCommand) -> None:
        nonlocal name
        name = command.name
        _announce(command)

    code = run(
        model,
        engine=engine,
        host=host,
        port=port,
        extra=extra or (),
        start_timeout=start_timeout,
        on_note=lambda note: say("yellow", "note", note),
        on_ready=announce,
    )
    if code:
        say("yellow", "note", f"{name} ended with exit code {code}.")
    raise typer.Exit(code)


def _announce(command: ServerCommand) -> None:
    """Where the engine answers, and a request to try; at once, though standard output is a pipe."""
    request = {"model": command.model, "prompt": "The capital of France is", "max_tokens": 16}
    curl = [
        "curl",
        f"{command.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps(request),
    ]
    print(f"{command.model} is served at {command.url} · try: {shlex.join(curl)}", flush=True)
