"""What a checkpoint says of how it is to be continued: ``generation_config.json``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.checkpoint import read_json
from octavo.errors import OctavoError

# What samples, and which values make sense. Others of the file's settings are for other ways of search.
_SAMPLING: dict[str, tuple[type | tuple[type, ...], Callable[[Any], bool], str]] = {
    "temperature": ((int, float), lambda value: 0 <= value < math.inf, "a number, 0 or above"),
    "top_k": (int, lambda value: value >= 0, "a whole number, 0 or above"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "min_p": ((int, float), lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": ((int, float), lambda value: 0 < value < math.inf, "a number above 0"),
}


def end_tokens(model: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a text, by the checkpoint's generation config and its tokenizer.

    Args:
        model: the checkpoint directory.
        tokenizer: the checkpoint's.
    """
    named = _config(model).get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return frozenset(one for one in [*ids, tokenizer.eos_token_id] if isinstance(one, int))


def default_sampling(model: Path) -> dict[str, Any]:
    """How the checkpoint wants its tokens chosen: fields of a request's sampling.

    Raises:
        OctavoError: the file is damaged.
    """
    config = _config(model)
    found = {}
    for name, (kinds, makes_sense, expected) in _SAMPLING.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, kinds) or not makes_sense(value):
            raise OctavoError(
                f"{model / 'generation_config.json'} has {name} {value!r}, expected {expected}. Restore "
                "the file from the original checkpoint."
            )
        found[name] = value
    return found


def _config(model: Path) -> dict[str, Any]:
    path = model / "generation_config.json"
    return read_json(path) if path.exists() else {}
