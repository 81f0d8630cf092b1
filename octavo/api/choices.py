"""One of the continuations that a client asked for: tokens in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from octavo.detokenizing import Detokenizer, StopStrings
from octavo.engines.torch.request import Finish, Output


class Piece(NamedTuple):
    """What a token adds to a continuation.

    Attributes:
        choice: the continuation's index.
        number: the token's, from 0.
        offset: characters before.
        text: what it adds, which may be nothing.
        finish: why the continuation ends with it; None if it goes on.
        output: the token itself.
    """

    choice: int
    number: int
    offset: int
    text: str
    finish: Finish | None
    output: Output


class Choice:
    """A continuation as it comes.

    Attributes:
        index: its place among those of the request.
        tokens: new ones so far.
        finish: why it ended; None while it goes on.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Any,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        before: str = "",
    ) -> None:
        """
        Args:
            index: see above.
            tokenizer: the checkpoint's.
            prompt: the token ids that are continued.
            stops: strings that end the text, and are no part of it.
            before: what the text begins with.
        """
        self.index, self.tokens = index, 0
        self.finish: Finish | None = None
        self._before, self._length = before, 0
        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt), StopStrings(stops)

    def has_ended(self) -> bool:
        """Whether it is complete."""
        return self.finish is not None

    def add(self, output: Output) -> Piece:
        """Take a token."""
        # What ends a text is no part of it.
        text = "" if output.finish == "stop" else self._detokenizer.add(output.token)
        if output.finish is not None:
            text += self._detokenizer.end()
        text = self._stops.add(text)
        if self._stops.found:
            self.finish = "stop"
        elif output.finish is not None:
            text += self._stops.end()
            self.finish = output.finish
        if self.tokens == 0:
            text = self._before + text
        piece = Piece(self.index, self.tokens, self._length, text, self.finish, output)
        self.tokens += 1
        self._length += len(text)
        return piece
