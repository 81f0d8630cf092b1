"""Text to token ids: one matrix ``[samples, seq_len]`` without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from octavo.calibration.text import BUILTIN, documents
from octavo.errors import OctavoError, one_line
from octavo.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Samples are drawn from the first windows of a source, up to this many times as many as asked for:
# enough to mix documents, and a bound on what is read from a source of any size.
_POOL = 16

# Characters tokenized at a time, at most: a tokenizer takes some two hundred times as much memory.
LONGEST = 1 << 17


class Calibration(BaseModel):
    """Which tokens the statistics are taken on.

    Attributes:
        source: ``builtin`` (the Python language reference inside CPython), a file (``.txt``,
            ``.jsonl``, ``.parquet``, or ``.npy`` with token ids ``[samples, seq_len]``), or a
            named hub set (``cnn_dailymail``, ``pile``, ``wikitext2``).
        text_field: the field or column that holds the text.
        samples: how many sequences; 128, or all rows of an ``.npy`` file.
        seq_len: tokens in each; 512, or the width of an ``.npy`` file.
        seed: of the draw among a source's windows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = BUILTIN
    text_field: str = "text"
    samples: PositiveInt | None = None
    seq_len: PositiveInt | None = None
    seed: int = 0

    def drawn(self, tokens: Tensor) -> dict[str, Any]:
        """For a record of what was made with it: nothing of the machine, and what was left open as it turned out.

        Args:
            tokens: the samples, ``[samples, seq_len]``.
        """
        samples, seq_len = tokens.shape
        own = {"source": Path(self.source).name, "samples": samples, "seq_len": seq_len}
        return {**self.model_dump(mode="json"), **own}


def load_tokens(
    calibration: Calibration, model: Path, *, vocab_size: int, max_positions: int
) -> Tensor:
    """The calibration tokens.

    Text is tokenized document by document with the model's own tokenizer (its special tokens
    included), joined, cut into windows of ``seq_len``, and ``samples`` of them are drawn without
    replacement, by seed. A source that holds fewer gives all it has.

    Args:
        calibration: what to read.
        model: the checkpoint directory, for its tokenizer.
        vocab_size: token ids must be below.
        max_positions: ``seq_len`` must not exceed it.

    Returns:
        int64 ``[samples, seq_len]``.

    Raises:
        OctavoError: too little text, ids out of vocabulary, ``seq_len`` too long, or no tokenizer.
    """
    if Path(calibration.source).suffix == ".npy":
        windows = _load_samples(Path(calibration.source), calibration.seq_len)
        samples = min(calibration.samples or len(windows), len(windows))
    else:
        samples = calibration.samples or 128
        seq_len = calibration.seq_len or min(512, max_positions)
        check_length(seq_len, max_positions)
        windows = _tokenize(calibration, load_tokenizer(model), seq_len, samples * _POOL)
    check_length(windows.shape[1], max_positions)
    check_vocabulary(windows, calibration.source, vocab_size)
    if samples < len(windows):
        rows = np.random.default_rng(calibration.seed).permutation(len(windows))[:samples]
        windows = windows[np.sort(rows)]
    return torch.from_numpy(windows.astype(np.int64))


def check_length(seq_len: int, max_positions: int) -> None:
    """Refuse a ``seq_len`` beyond the model's positions."""
    if seq_len > max_positions:
        raise OctavoError(
            f"--seq-len {seq_len} is longer than the model's {max_positions} positions "
            f"(max_position_embeddings in config.json). Choose at most {max_positions}."
        )


def check_vocabulary(ids: np.ndarray, source: str, vocab_size: int) -> None:
    """Refuse token ids, not none of them, that a vocabulary of ``vocab_size`` does not have."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise OctavoError(
            f"The token ids of {source} range from {ids.min()} to {ids.max()}, "
            f"expected 0 to {vocab_size - 1} (the model's vocabulary). "
            "Were they made with another model's tokenizer?"
        )


def load_ids(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, of whatever dtype and shape, mapped rather than read.

    Raises:
        OctavoError: the file is absent or holds something else.
    """
    try:
        # allow_pickle=False: an object array would run code.
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise OctavoError(f"The file {path} does not exist.") from None
    except (OSError, ValueError, EOFError) as error:
        raise OctavoError(f"{path} is not a NumPy array file: {one_line(error)}.") from error
    if not isinstance(ids, np.ndarray):
        raise OctavoError(f"{path} is an archive, expected one NumPy array of token ids.")
    return ids


def _load_samples(path: Path, seq_len: int | None) -> np.ndarray:
    ids = load_ids(path)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        raise OctavoError(
            f"{path} holds {ids.dtype} of shape {list(ids.shape)}, "
            "expected integer token ids of shape [samples, seq_len]."
        )
    if seq_len is not None and seq_len > ids.shape[1]:
        raise OctavoError(
            f"{path} holds sequences of {ids.shape[1]} tokens, --seq-len asks for {seq_len}. "
            f"Choose at most {ids.shape[1]}."
        )
    return np.asarray(ids[:, :seq_len])


def _tokenize(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int
) -> np.ndarray:
    """The first windows of the joined documents, ``[up to limit, seq_len]``."""
    texts = documents(calibration.source, calibration.text_field)
    pieces: list[np.ndarray] = []
    missing = limit * seq_len
    for piece in _encode(texts, tokenizer):
        pieces.append(piece[:missing])
        missing -= len(pieces[-1])
        if not missing:
            break
    stream = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    if len(stream) < seq_len:
        raise OctavoError(
            f"The calibration text {calibration.source} holds {len(stream)} tokens, "
            f"fewer than one sequence of {seq_len}. Pass more text, or a shorter --seq-len."
        )
    return stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)


def _encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterable[np.ndarray]:
    for piece in (piece for text in texts for piece in _pieces(text)):
        if piece.strip():
            # verbose=False: a document longer than the model's context is cut up later.
            yield np.asarray(tokenizer(piece, verbose=False)["input_ids"], dtype=np.int64)


def _pieces(text: str) -> Iterator[str]:
    """A document in pieces that are tokenized by themselves: at ends of paragraphs, or else between words."""
    begin = 0
    while len(text) - begin > LONGEST:
        end = begin + LONGEST
        found = (text.rfind(mark, begin + 1, end) for mark in ("\n\n", "\n", " "))
        cut = next((place for place in found if place > 0), end)
        yield text[begin:cut]
        begin = cut
    yield text[begin:]
