"""Where text comes from: files, named hub sets, and a text every CPython carries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from octavo.errors import OctavoError, one_line

BUILTIN = "builtin"


class HubSet(NamedTuple):
    """A data set on the hub, read as a stream."""

    path: str
    config: str | None
    split: str
    field: str


HUB_SETS = {
    "cnn_dailymail": HubSet("abisee/cnn_dailymail", "3.0.0", "train", "article"),
    "pile": HubSet("mit-han-lab/pile-val-backup", None, "validation", "text"),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
}


def documents(source: str, text_field: str = "text") -> Iterator[str]:
    """The documents of ``source``, one string each.

    Args:
        source: ``builtin``, a name of :data:`HUB_SETS`, or a ``.txt``, ``.jsonl`` or ``.parquet``
            file.
        text_field: the field or column that holds the text, in ``.jsonl`` and ``.parquet``.

    Raises:
        OctavoError: the source is unknown, unreadable, or lacks the field.
    """
    if source == BUILTIN:
        return _builtin()
    if source in HUB_SETS:
        instead = (
            f"Pass a local file (--calib FILE.jsonl) or the built-in text (--calib {BUILTIN})."
        )
        return hub_documents(HUB_SETS[source], instead)
    path = Path(source)
    if path.suffix not in FILE_READERS:
        raise OctavoError(
            f"Unknown calibration source {source!r}. Expected {BUILTIN}, none, one of "
            f"{', '.join(HUB_SETS)}, or a file ending in {', '.join(FILE_READERS)} or .npy."
        )
    if not path.is_file():
        raise OctavoError(f"The calibration file {path} does not exist.")
    return FILE_READERS[path.suffix](path, text_field)


def _builtin() -> Iterator[str]:
    """The Python language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _text(path: Path, _: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OctavoError(f"{path} is not UTF-8 text: {one_line(error)}.") from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                text = record.get(field) if isinstance(record, dict) else None
                # JSON can spell half a surrogate pair, which is no text.
                _ = text.encode() if isinstance(text, str) else None
            except (ValueError, RecursionError) as error:
                raise OctavoError(
                    f"{path}, line {number} is not JSON: {one_line(error)}."
                ) from error
            if not isinstance(text, str):
                raise OctavoError(
                    f"{path}, line {number} has no text in its field {field!r}. "
                    "Name the field that holds the text with --text-field."
                )
            yield text


def _parquet(path: Path, field: str) -> Iterator[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        if field not in (rows.column_names or [field]):
            raise OctavoError(
                f"{path} has no column {field!r}, it has {', '.join(rows.column_names)}. "
                "Name the column that holds the text with --text-field."
            )
        for number, row in enumerate(rows, start=1):
            if not isinstance(row[field], str):
                raise OctavoError(
                    f"{path}, row {number} has {type(row[field]).__name__} in column {field!r}, expected text."
                )
            yield row[field]
    except OctavoError:
        raise
    except Exception as error:  # the reader's own exceptions share no base class
        raise OctavoError(f"{path} cannot be read as parquet: {one_line(error)}.") from error


# By a file's ending: what yields its documents, given the field or column that holds the text.
FILE_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _text,
    ".raw": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def hub_documents(hub_set: HubSet, instead: str) -> Iterator[str]:
    """The rows of a hub set, as they arrive.

    Args:
        hub_set: which one.
        instead: what to do where the hub is out of reach, for the error.

    Raises:
        OctavoError: it is out of reach.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_set.path, hub_set.config, split=hub_set.split, streaming=True)
        for row in rows:
            yield row[hub_set.field]
    except Exception as error:  # every kind of network failure
        raise OctavoError(
            f"The data set {hub_set.path} cannot be reached on the hub: {type(error).__name__}. "
            f"{instead}"
        ) from error
