"""A long text in pieces that a model can read."""

from __future__ import annotations

from typing import NamedTuple

from octavo.calibration.tokens import check_length
from octavo.errors import OctavoError


class Window(NamedTuple):
    """A piece of the text: tokens ``begin`` to ``end``, of which those from ``start`` on are scored.

    Attributes:
        begin: the first token's position in the text.
        end: the position after the last token.
        start: counted from ``begin``, at least 1: a window's first token has nothing before it.
    """

    begin: int
    end: int
    start: int

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return self.end - self.begin - self.start


def cut(
    tokens: int, seq_len: int, stride: int | None, *, limit: int | None, max_positions: int
) -> list[Window]:
    """Windows of ``seq_len`` tokens over a text; an incomplete last one is dropped.

    Args:
        tokens: in the text.
        seq_len: in a window.
        stride: from one window to the next. Without one, windows do not overlap, and all their
            tokens but the first are scored. With one, the first window is scored so, and each
            further one only where it goes beyond the one before: its last ``stride`` tokens.
        limit: windows, at most.
        max_positions: ``seq_len`` must not exceed it.

    Raises:
        OctavoError: fewer tokens than one window, or an impossible option.
    """
    check_length(seq_len, max_positions)
    if seq_len < 2:
        raise OctavoError(f"--seq-len {seq_len} leaves no token to predict. Choose at least 2.")
    if stride is not None and not 1 <= stride <= seq_len:
        raise OctavoError(f"--stride {stride} is not between 1 and --seq-len {seq_len}.")
    if limit is not None and limit < 1:
        raise OctavoError(f"--limit {limit} leaves nothing to evaluate. Choose at least 1.")
    if tokens < seq_len:
        raise OctavoError(
            f"The evaluation text holds {tokens} tokens, fewer than one window of {seq_len}. "
            f"Pass more text, or a shorter window (--seq-len {max(tokens, 2)} at most)."
        )
    step = stride or seq_len
    begins = range(0, tokens - seq_len + 1, step)[:limit]
    return [
        Window(begin, begin + seq_len, max(1, seq_len - step) if begin else 1) for begin in begins
    ]
