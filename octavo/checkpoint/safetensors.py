"""The safetensors header, read as the hostile input it may be.

A file is an 8-byte little-endian header length, a JSON header and the tensors' bytes
(https://github.com/huggingface/safetensors#format). Every name, dtype, shape and offset is checked
before a byte of data is used; what the format forbids (holes, overlaps, repeated names, bytes
after the last tensor) is refused.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from octavo.errors import OctavoError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The limit of the reference implementation.
_MAX_HEADER_BYTES = 100_000_000
# No file is longer, so no count in a header can be.
_MAX_BYTES = 1 << 63


class Entry(NamedTuple):
    """One tensor of a file: dtype, shape and the bytes ``[start, end)`` counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of the safetensors file ``path``, in the order of their bytes.

    Raises:
        OctavoError: the file is not a well-formed safetensors file, or is cut short.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        limit = min(size - 8, _MAX_HEADER_BYTES)
        if len(prefix) < 8 or length > limit:
            raise _malformed(
                path, f"its header claims {length:,} bytes, expected at most {limit:,}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    return _check_layout(path, entries, data_start, size)


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, Entry]]:
    """Lay tensors out one after the other.

    Args:
        tensors: name, dtype and shape of each tensor, in the order their bytes will have.

    Returns:
        The bytes that open the file (length, header, padding to 8 bytes), and each tensor's place.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        places.append((name, dtype, shape, offset, end))
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    entries = {
        name: Entry(dtype, shape, base + start, base + end)
        for name, dtype, shape, start, end in places
    }
    return len(raw).to_bytes(8, "little") + raw, entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _entry(path: Path, name: str, value: object, data_start: int) -> Entry:
    """Check one header record on its own."""
    if not isinstance(value, dict):
        raise _malformed(path, f"the record of tensor {_short(name)} is not an object")
    dtype = DTYPES.get(str(value.get("dtype")))
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if dtype is None:
        raise _malformed(
            path, f"tensor {_short(name)} has the unknown dtype {_short(value.get('dtype'))}"
        )
    if not _naturals(shape):
        raise _malformed(path, f"tensor {_short(name)} has the invalid shape {_short(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(path, f"tensor {_short(name)} has the invalid offsets {_short(offsets)}")
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _malformed(
            path,
            f"tensor {_short(name)} has {offsets[1] - offsets[0]:,} bytes, "
            f"{value['dtype']} of shape {_short(shape)} takes "
            + (f"{needed:,} bytes" if needed < _MAX_BYTES else "more than any file has"),
        )
    return Entry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(
    path: Path, entries: dict[str, Entry], data_start: int, size: int
) -> dict[str, Entry]:
    """Check that the tensors tile the data section without overlap, hole or rest."""
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = data_start
    for name, entry in ordered.items():
        if entry.start != position:
            fault = "overlaps" if entry.start < position else "leaves a hole before"
            raise _malformed(
                path,
                f"tensor {_short(name)} {fault} byte {position:,} (it starts at {entry.start:,})",
            )
        position = entry.end
    if position > size:
        raise OctavoError(
            f"{path} is truncated: its header describes {position:,} bytes, the file holds {size:,}. "
            "Copy or download this file again."
        )
    if position < size:
        raise _malformed(path, f"it holds {size - position:,} bytes after its last tensor")
    return ordered


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _MAX_BYTES for item in value
    )


# Text from a file is shown shortened.
_short = reprlib.repr


def _malformed(path: Path, fault: str) -> OctavoError:
    return OctavoError(
        f"{path} is not a valid safetensors file: {fault}. Copy or download this file again."
    )
