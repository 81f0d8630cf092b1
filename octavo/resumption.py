"""Whether an interrupted run and this one are the same: options, versions, input, calibration tokens."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor

from octavo.checkpoint import Checkpoint, Journal
from octavo.errors import OctavoError
from octavo.version import __version__


def check_same(
    journal: Journal, options: Mapping[str, Any], checkpoint: Checkpoint, tokens: Tensor | None
) -> None:
    """Begin a journal with what its results depend on, or check that it began with the same.

    Args:
        journal: of an interrupted run, or empty.
        options: JSON values.
        checkpoint: the input.
        tokens: the calibration samples.

    Raises:
        OctavoError: something differs; says what.
    """
    now = {
        "options": dict(options),
        "versions": _versions(),
        "input": _identity(checkpoint),
        "calibration tokens": None if tokens is None else _digest(tokens),
    }
    if not journal.records:
        journal.append({"begin": now})
        return
    before = journal.records[0]["begin"]
    for part, value in now.items():
        changes = _changes(before[part], value)
        if changes:
            raise OctavoError(
                f"The interrupted run cannot be resumed: its {part} differ. {'; '.join(changes)}. "
                f"{_ADVICE[part]} or pass --overwrite without --resume to start over."
            )


_ADVICE = {
    "options": "Pass the options it was started with,",
    "versions": "Resume with the versions it was started with,",
    "input": "Restore the input,",
    "calibration tokens": "Restore the calibration data and the tokenizer,",
}


def _changes(before: Any, now: Any) -> list[str]:
    """What differs, a clause each."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else ["They are not the same tokens"]
    changes = []
    for name in [*before, *(name for name in now if name not in before)]:
        then, new = before.get(name, "absent"), now.get(name, "absent")
        if isinstance(then, dict) and isinstance(new, dict):
            changes += [f"{name} {change}" for change in _changes(then, new)]
        elif then != new:
            changes.append(f"{name}: {then} then, {new} now")
    return changes


def _versions() -> dict[str, str]:
    return {
        "octavo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        # Arithmetic differs between processors' instructions.
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _identity(checkpoint: Checkpoint) -> dict[str, str]:
    """What stands for the content of each file: its size and when it was last modified."""
    paths = [checkpoint.directory / "config.json", *checkpoint.files]
    return {
        path.name: f"{(found := path.stat()).st_size} bytes, modified {found.st_mtime_ns}"
        for path in paths
    }


def _digest(tokens: Tensor) -> str:
    return f"{list(tokens.shape)} {xxhash.xxh3_128_hexdigest(tokens.contiguous().numpy().data)}"
