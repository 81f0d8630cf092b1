"""A conversation with a checkpoint on the embedded engine: ``octavo chat``."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from octavo.completion import Writer, with_fields
from octavo.tokenizer import chat_prompt


class Conversation:
    """Messages back and forth, each with all before it in mind."""

    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        max_tokens: int = 1024,
        device: str = "auto",
        **sampling: Any,
    ) -> None:
        """
        Args:
            model: a checkpoint, BF16 or FP8: a directory, or a hub id.
            system: what the model is told before the conversation; by default what its chat template says.
            max_tokens: of an answer, at most.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            sampling: fields of :class:`octavo.engines.torch.request.Sampling`, in the place of the checkpoint's
                own; None leaves those.

        Raises:
            OctavoError: the checkpoint cannot be opened.
        """
        self._writer = Writer(model, device)
        self._max_tokens = max_tokens
        self._sampling = with_fields(self._writer.sampling, sampling)
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, message: str) -> Generator[str]:
        """The answer to a message, piece by piece. Whoever stops listening ends it, and it stays as it is then.

        Raises:
            OctavoError: the checkpoint has no chat template, or it does not take the message; or the
                conversation is too long. The message is forgotten.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        prompt = chat_prompt(self._writer.tokenizer, messages)
        pieces = []
        try:
            for piece in self._writer.write(prompt, self._max_tokens, self._sampling):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                said = "".join(pieces)
                self._messages = [*messages, {"role": "assistant", "content": said}]

    def close(self) -> None:
        """Free what the engine holds."""
        self._writer.close()
