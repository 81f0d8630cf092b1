"""``octavo generate`` and ``octavo chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from octavo.allocator import quick_imports
from octavo.cli.evaluate import Device, Model
from octavo.cli.program import command, say
from octavo.console import stderr, stdout
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.conversation import Conversation

TopP = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Only the likeliest tokens that together have this probability."
    ),
]
TopK = Annotated[int | None, typer.Option(min=0, help="Only so many of the likeliest tokens.")]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Only tokens with this share of the likeliest one's probability."
    ),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(min=0.01, help="Above 1, tokens that were there become less likely.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="The same tokens every time.")]


@command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What runs the model: torch, Octavo's own; transformers; vllm. "
            "The other two know --temperature only."
        ),
    ] = "torch",
    device: Device = "auto",
) -> None:
    """Continue a text."""
    with quick_imports():
        from octavo.completion import complete
    # Shown once it is clear that something follows.
    before = [prompt]

    def show(text: str) -> None:
        print("".join(before) + text, end="", flush=True)
        before.clear()

    complete(
        model,
        prompt,
        max_tokens=max_tokens,
        engine=engine,
        device=device,
        on_text=show,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    print()


@command()
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token each time.")
    ] = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Talk with a checkpoint. Sampling that is not given is the checkpoint's own.

    Ctrl-C ends an answer, Ctrl-D the conversation. Without a terminal, each line of the input is a message.
    """
    with quick_imports():
        from octavo.conversation import Conversation
    conversation = Conversation(
        model,
        system=system,
        max_tokens=max_tokens,
        device=device,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with closing(conversation):
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            for line in sys.stdin:
                if line.strip():
                    _answer(conversation, line.strip())


def _talk(conversation: Conversation) -> None:
    for message in _typed():
        try:
            _answer(conversation, message)
        except KeyboardInterrupt:
            stdout.print(Text(" …", style="dim"))
        except OctavoError as error:
            # The conversation goes on without the message.
            say("red", "error", str(error))


def _typed() -> Iterator[str]:
    """What the user types, message by message, until Ctrl-D."""
    import readline  # noqa: F401  # input() edits lines and remembers them once it is imported

    stderr.print(Text("Ctrl-C ends an answer, Ctrl-D the conversation.", style="dim"))
    while True:
        try:
            message = input("\n› ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            stdout.print()
            return
        if message:
            yield message


def _answer(conversation: Conversation, message: str) -> None:
    with closing(conversation.answer(message)) as pieces:
        for piece in pieces:
            stdout.out(piece, end="", highlight=False)
    stdout.print()
