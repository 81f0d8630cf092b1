"""Results on disk as they come, so that a long evaluation can be stopped and resumed.

A journal is a file of JSON lines ``{"key": …, "value": …}``, one for each window or subject. Its name is a
hash of everything that the results depend on: no two different evaluations ever share one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from octavo.errors import OctavoError


class Journal:
    """Results by key, in memory and, where there is a file, on disk."""

    def __init__(
        self, file: IO[str] | None = None, results: Mapping[str, Any] | None = None
    ) -> None:
        """
        Args:
            file: open for appending; None keeps results in memory only.
            results: what is known already.
        """
        self._file = file
        self._results = dict(results or {})

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def run(
        self, keys: Sequence[str], compute: Callable[[list[int]], Iterator[Any]]
    ) -> Iterator[Any]:
        """Every key's result, in order; those not known yet are computed and kept.

        Args:
            keys: one for each piece of work; equal keys stand for equal results.
            compute: given the indices of the keys whose results are missing, yields these results
                (JSON values), in order.
        """
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        computed = compute([index for key, index in first.items() if key not in self._results])
        for key in keys:
            if key not in self._results:
                self._results[key] = next(computed)
                self._append(key)
            yield self._results[key]

    def _append(self, key: str) -> None:
        if self._file is not None:
            # At once: a process that is killed loses the piece it was at, no more.
            print(
                json.dumps({"key": key, "value": self._results[key]}), file=self._file, flush=True
            )


@contextmanager
def open_journal(path: Path, *, resume: bool) -> Iterator[Journal]:
    """The journal in the file ``path``, which goes when the block ends well and stays when it fails.

    Args:
        path: its directory is made if need be.
        resume: take over what is there; otherwise start anew.

    Raises:
        OctavoError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = _read(path) if resume and path.exists() else {}
        # Written anew in any case: a line cut short by a kill must not run into the next one.
        with path.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"key": key, "value": value}) + "\n" for key, value in known.items()
            )
            file.flush()
            yield Journal(file, known)
    except OSError as error:
        if error.filename != str(path) and error.filename != str(path.parent):
            raise
        raise OctavoError(
            f"{path}, which keeps results for --resume, cannot be written: {error.strerror}. "
            "Set XDG_CACHE_HOME to a directory that can."
        ) from error
    path.unlink(missing_ok=True)


def state_directory() -> Path:
    """Where journals are: ``octavo/eval`` in the user's cache directory (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "eval"


def fingerprint(
    options: Mapping[str, Any], data: bytes | memoryview, models: Sequence[Path]
) -> str:
    """A name for an evaluation: SHA-256 of its options, its data and the models' identity.

    Args:
        options: JSON values.
        data: token ids or questions, as bytes.
        models: checkpoint directories. Their place, their config and their weight files' names, sizes
            and times stand for them.
    """
    identity = [
        [
            str(model.resolve()),
            (model / "config.json").read_text(encoding="utf-8", errors="replace"),
            *(
                [file.name, file.stat().st_size, file.stat().st_mtime_ns]
                for file in _weights(model)
            ),
        ]
        for model in models
    ]
    described = json.dumps([dict(options), identity], sort_keys=True).encode()
    return hashlib.sha256(
        hashlib.sha256(described).digest() + hashlib.sha256(data).digest()
    ).hexdigest()


def _weights(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def _read(path: Path) -> dict[str, Any]:
    """The whole lines of a journal."""
    results = {}
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            continue
        if isinstance(record, dict) and record.keys() == {"key", "value"}:
            results[record["key"]] = record["value"]
    return results
