"""The tokenizer that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """A conversation as the model was taught to read it, up to where its answer begins.

    Args:
        tokenizer: the checkpoint's, with its chat template.
        messages: each with a ``role`` and a ``content``.

    Raises:
        OctavoError: there is no chat template, or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise OctavoError(
            "The checkpoint has no chat template, so it was not made for conversations. Use one that was "
            "(most are called instruct or chat), or have it continue a plain text."
        )
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise OctavoError(
            f"The checkpoint's chat template does not take these messages: {one_line(error)}."
        ) from error
    return ids
