"""The ``octavo`` program: how commands are registered, how they fail, how they end."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.text import Text

from octavo.allocator import keep_freed_memory
from octavo.console import stderr
from octavo.errors import OctavoError
from octavo.version import __version__

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    name="octavo",
    help="FP8 editions of large language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Terminated(BaseException):
    """SIGTERM, as an exception, so that everything on the way out cleans up."""


def command(
    name: str | None = None, *, after_interrupt: str = "nothing is left behind"
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Register a command whose user errors exit with 2, failures with 1, signals with 128 + N.

    Args:
        name: what users type; the function's name, with dashes, by default.
        after_interrupt: what a user who pressed Ctrl-C should know, unless the exception has notes.
    """

    def register(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except OctavoError as error:
                say("red", "error", _paragraph(str(error), error))
                raise typer.Exit(2) from None
            except OSError as error:
                what = f"{error.strerror or error}: {error.filename or 'no file named'}"
                say("red", "error", _paragraph(what, error))
                raise typer.Exit(1) from None
            except (KeyboardInterrupt, Terminated) as error:
                left = " ".join(_notes(error)) or f"{after_interrupt}."
                say("red", "error", f"interrupted; {left}")
                number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
                raise typer.Exit(128 + number) from None

        app.command(name)(run)
        return run

    return register


def _paragraph(message: str, error: BaseException) -> str:
    """A message and the error's notes."""
    return " ".join([message, *_notes(error)])


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """The ``octavo`` program."""
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    # Everything is closed by now. Taking PyTorch's million objects apart one by one, as leaving the
    # ordinary way does, costs a good part of a second.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(color: str, kind: str, message: str) -> None:
    """Print a message on stderr: ``error: …`` in red."""
    # Text, not markup: a message may quote anything, brackets included.
    stderr.print(Text.assemble((f"{kind}:", color), " ", message), soft_wrap=True)


def _terminate(*_: object) -> None:
    raise Terminated
