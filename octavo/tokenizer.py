"""The tokenizer that a checkpoint carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import OctavoError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint directory ``model``.

    Raises:
        OctavoError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here
        raise OctavoError(
            f"{model} has no usable tokenizer: {one_line(error)}. Copy the model's tokenizer files there, "
            "or pass token ids in an .npy file (--calib FILE.npy, --data FILE.npy)."
        ) from error


def find_tokenizer(model: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in ``model``, or None where the directory holds no file of one."""
    return load_tokenizer(model) if any((model / file).exists() for file in _FILES) else None
