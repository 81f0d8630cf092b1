"""Evaluation data to token ids: one stream of them, as perplexity is defined on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.text import BUILTIN, FILE_READERS, HubSet, hub_documents
from octavo.calibration.tokens import load_ids
from octavo.errors import OctavoError
from octavo.evaluation import builtin
from octavo.tokenizer import load_tokenizer

# Held-out splits: calibration takes others of the same sets.
HUB_SETS = {"wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text")}


def load_tokens(data: str | Path, model: Path) -> Tensor:
    """The token ids of an evaluation text.

    The whole text is tokenized once with the model's own tokenizer, its special tokens included;
    documents and rows are joined with blank lines first, as in Hugging Face's guide to perplexity
    (https://huggingface.co/docs/transformers/perplexity).

    Args:
        data: ``builtin`` (see :mod:`octavo.evaluation.builtin`), a ``.txt``, ``.raw``, ``.jsonl`` or ``.parquet`` file (its field or column ``text``),
            an ``.npy`` file of token ids of any shape, or ``wikitext2`` (the test split, from the
            hub).
        model: the checkpoint directory, for its tokenizer.

    Returns:
        int64 ``[tokens]``, at least one.

    Raises:
        OctavoError: the data is unknown, unreadable, out of reach or empty, or there is no
            tokenizer.
    """
    path = Path(data)
    ids = _file_ids(path) if path.suffix == ".npy" else _tokenize(_text(data), model)
    if not ids.size:
        raise OctavoError(f"{data} holds no tokens. Pass a file with text or token ids.")
    return torch.from_numpy(ids)


def _file_ids(path: Path) -> np.ndarray:
    ids = load_ids(path)
    if not np.issubdtype(ids.dtype, np.integer):
        raise OctavoError(
            f"{path} holds {ids.dtype} of shape {list(ids.shape)}, expected integer token ids."
        )
    return ids.reshape(-1).astype(np.int64)


def _text(data: str | Path) -> str:
    path = Path(data)
    documents: Iterable[str]
    if str(data) == BUILTIN:
        documents = builtin.documents()
    elif str(data) in HUB_SETS:
        documents = hub_documents(HUB_SETS[str(data)], "Pass a local file (--data FILE.txt).")
    elif path.suffix not in FILE_READERS:
        raise OctavoError(
            f"Unknown evaluation data {str(data)!r}. Expected {BUILTIN}, {', '.join(HUB_SETS)} or a file ending "
            f"in {', '.join(FILE_READERS)} or .npy."
        )
    elif not path.is_file():
        raise OctavoError(f"The file {path} does not exist.")
    else:
        documents = FILE_READERS[path.suffix](path, "text")
    return "\n\n".join(documents)


def _tokenize(text: str, model: Path) -> np.ndarray:
    # verbose=False: that the text is longer than the model's context is meant.
    ids = load_tokenizer(model)(text, verbose=False)["input_ids"]
    return np.asarray(ids if text.strip() else [], dtype=np.int64)
