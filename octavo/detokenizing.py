"""Token ids to text while they come: no half of a character, and nothing behind a stop string.

What is given out token by token adds up to the text of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What tokenizers give for bytes that are no character, or not yet one.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Tokens after which a character of UTF-8, four bytes at most, that is not complete will never be.
_INCOMPLETE_TOKENS = 3

# Tokens of the prompt that the first new ones are decoded behind.
_CONTEXT = 8

# Tokens that are decoded together, at most, whatever they are.
_MOST_TOKENS = 64


class Detokenizer:
    """The text of a sequence's new tokens.

    What a token means depends on those before it: bytes make up characters, and a space at the beginning is not
    one of the text's in some vocabularies. So each is decoded behind the last that gave text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        """
        Args:
            tokenizer: the checkpoint's.
            prompt: what the new tokens follow; its text is not given out.
        """
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        # Characters of these tokens that are given out, and tokens up to where the last text ended.
        self._given = len(self._decode())
        self._ended = len(self._tokens)
        self._incomplete = 0

    def add(self, token: int) -> str:
        """The text that a token adds, which may be empty."""
        self._tokens.append(token)
        text = self._decode()
        end = self._complete(text)
        added = text[self._given : end]
        self._given = max(self._given, end)
        if (added and end == len(text)) or len(self._tokens) > _MOST_TOKENS:
            added += text[self._given :]
            self._tokens = self._tokens[self._ended :]
            self._given, self._ended = len(self._decode()), len(self._tokens)
            self._incomplete = 0
        return added

    def end(self) -> str:
        """What was held back, when no token will come."""
        return self._decode()[self._given :]

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text

    def _complete(self, text: str) -> int:
        """How many of the characters will stay as they are."""
        end = len(text.rstrip(_REPLACEMENT))
        if end == len(text):
            self._incomplete = 0
            return end
        self._incomplete += 1
        if self._incomplete <= _INCOMPLETE_TOKENS:
            return end
        # Bytes that are no character; the last one may begin another.
        self._incomplete = 1
        return len(text) - 1


class StopStrings:
    """Text up to the first of some strings.

    Attributes:
        found: whether one was there. Nothing is given out from then on.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """
        Args:
            strings: none of them empty.
        """
        self.found = False
        self._strings = strings
        self._held = ""

    def add(self, text: str) -> str:
        """What may be given out once ``text`` has come: not what could be the beginning of a stop string."""
        if not self._strings or self.found:
            return "" if self.found else text
        text = self._held + text
        places = [place for one in self._strings if (place := text.find(one)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max(_overlap(text, one) for one in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, when no text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of ``text`` that ``string`` begins with."""
    longest = min(len(text), len(string) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(string[:count])), 0)
