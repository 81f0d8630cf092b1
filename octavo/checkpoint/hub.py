"""From what a user calls a model to a directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.errors import OctavoError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(model: str | Path) -> Path:
    """The checkpoint directory for a path or a hub id.

    Args:
        model: a directory, or a hub id such as ``meta-llama/Llama-3.1-8B-Instruct``.

    Raises:
        OctavoError: no such directory, and the hub does not have it or is out of reach.
    """
    path = Path(model)
    if path.exists() or not _HUB_ID.fullmatch(str(model)):
        if path.is_dir():
            return path
        raise OctavoError(
            f"{path} is not a directory. Pass a Hugging Face checkpoint directory "
            "(config.json and *.safetensors) or a hub id such as org/name."
        )
    return _download(str(model))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            hub_id,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"],
        )
    except Exception as error:  # every kind of network failure, and the hub's own refusals
        raise OctavoError(
            f"{hub_id!r} is no directory here, and the hub did not provide it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}. "
            "Download the checkpoint where the hub can be reached, and pass its directory."
        ) from error
    return Path(directory)
