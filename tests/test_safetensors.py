"""The safetensors header: agreement with the ``safetensors`` library, and hostile input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octavo.checkpoint.safetensors import DTYPES, build_header, read_header
from octavo.errors import OctavoError

VALID_RECORD = {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]}
ENORMOUS = 10**4000


def file_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def record(**changes: object) -> bytes:
    """A file with one tensor of 4 bytes, some of its record changed."""
    return file_bytes({"weight": {**VALID_RECORD, **changes}}, bytes(4))


def byte_pair(first: list[int], second: list[int], size: int) -> bytes:
    """A file with two byte vectors at the given offsets and ``size`` bytes of data."""
    places = {"first": first, "second": second}
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in places.items()
    }
    return file_bytes(header, bytes(size))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def random_tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


tensor_files = st.dictionaries(
    st.text().filter(lambda name: name != "__metadata__"), random_tensors(), max_size=5
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
# Numbers around those of a valid file, and numbers no file can hold.
sizes = st.lists(st.integers(-1, 5) | st.sampled_from([2**63, 2**64, ENORMOUS]), max_size=4)
headers = st.dictionaries(
    st.text(max_size=2) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(list(DTYPES)) | json_values,
            "shape": sizes | json_values,
            "data_offsets": sizes | json_values,
        },
    )
    | json_values,
    max_size=3,
)


@given(tensors=tensor_files)
def test_reads_what_the_library_writes(tensors: dict[str, Tensor]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory, "model.safetensors")
        safetensors.torch.save_file(tensors, path)
        entries, raw = read_header(path), path.read_bytes()
    found = {n: (e.dtype, e.shape, raw[e.start : e.end]) for n, e in entries.items()}
    assert found == {n: (t.dtype, tuple(t.shape), bytes_of(t)) for n, t in tensors.items()}
    assert list(entries.values()) == sorted(entries.values(), key=lambda entry: entry.start)


@given(tensors=tensor_files)
def test_the_library_reads_built_headers(tensors: dict[str, Tensor]) -> None:
    header, entries = build_header((n, t.dtype, tuple(t.shape)) for n, t in tensors.items())
    file = bytearray(header).ljust(max((e.end for e in entries.values()), default=len(header)))
    for name, tensor in tensors.items():
        file[entries[name].start : entries[name].end] = bytes_of(tensor)
    read = safetensors.torch.load(bytes(file))
    found = {n: (t.dtype, t.shape, bytes_of(t)) for n, t in read.items()}
    assert found == {n: (t.dtype, t.shape, bytes_of(t)) for n, t in tensors.items()}
    assert len(header) % 8 == 0


HOSTILE = {
    "empty file": b"",
    "length cut short": b"\x10\0\0",
    "header beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "header not JSON": file_bytes(b"{'weight': 1}"),
    "header not UTF-8": file_bytes(b'{"\xff": 1}'),
    "header empty": file_bytes(b""),
    "header a list": file_bytes([]),
    "header deeply nested": file_bytes(b"[" * 100_000 + b"]" * 100_000),
    "record not an object": file_bytes({"weight": [0, 4]}),
    "record empty": file_bytes({"weight": {}}),
    "dtype unknown": record(dtype="Q4"),
    "dtype missing": record(dtype=None),
    "dtype a list": record(dtype=["U8"]),
    "dtype an object": record(dtype={}),
    "shape negative": record(shape=[-2, -2]),
    "shape boolean": record(shape=[4, True]),
    "shape fractional": record(shape=[4.0]),
    "shape a number": record(shape=4),
    "shape missing": record(shape=None),
    "shape too small": record(shape=[3]),
    "shape too large": record(shape=[2, 3]),
    "shape overflowing 64 bits": record(shape=[2**62, 4, 2**62]),
    "shape with enormous numbers": record(shape=[ENORMOUS, ENORMOUS]),
    "offsets reversed": record(data_offsets=[4, 0]),
    "offsets negative": record(data_offsets=[-4, 0]),
    "offsets three": record(data_offsets=[0, 4, 4]),
    "offsets out of range": byte_pair([0, 2], [2, 1000], size=4),
    "offsets beyond the file": record(data_offsets=[100, 104]),
    "offsets overlapping": byte_pair([0, 3], [2, 4], size=4),
    "offsets the same": byte_pair([0, 4], [0, 4], size=4),
    "offsets leaving a hole": byte_pair([0, 2], [3, 4], size=4),
    "offsets leaving a hole at the start": byte_pair([1, 2], [2, 4], size=4),
    "bytes after the last tensor": record() + b"\0",
    "data truncated": record()[:-1],
    "data missing": record()[:-4],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_malformed_files_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(content)
    with pytest.raises(OctavoError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    # The format forbids it, though the library takes one of the two.
    first, second = (json.dumps({"weight": {**VALID_RECORD, "dtype": d}}) for d in ("U8", "I8"))
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(file_bytes(f"{first[:-1]},{second[1:]}".encode(), bytes(4)))
    with pytest.raises(OctavoError, match=r"hostile\.safetensors.*twice"):
        read_header(path)


def test_a_header_over_100_mb_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(OctavoError, match=r"sparse\.safetensors.*100,000,001"):
        read_header(path)


def read_or_refuse(content: bytes) -> None:
    """Read ``content`` as a file: a header or an OctavoError, and nothing else."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "fuzzed.safetensors")
        path.write_bytes(content)
        with suppress(OctavoError):
            read_header(path)


@given(content=st.binary())
def test_random_bytes_never_crash(content: bytes) -> None:
    read_or_refuse(content)
    read_or_refuse(file_bytes(content))


@given(header=headers, data=st.binary(max_size=8))
def test_random_headers_never_crash(header: dict[str, Any], data: bytes) -> None:
    read_or_refuse(file_bytes(header, data))


@pytest.mark.parametrize(
    "mutate",
    [
        lambda file, place, junk: file[:place] + junk + file[place + len(junk) :],
        lambda file, place, junk: file[:place] + junk + file[place:],
        lambda file, place, junk: file[:place] + file[place + len(junk) :],
        lambda file, place, junk: file[:place],
    ],
    ids=["overwritten", "inserted", "deleted", "truncated"],
)
@given(data=st.data(), junk=st.binary(max_size=4) | st.text('0123456789{}[]",:-.e').map(str.encode))
def test_mutated_files_never_crash(
    mutate: Callable[[bytes, int, bytes], bytes], data: st.DataObject, junk: bytes
) -> None:
    valid = byte_pair([0, 2], [2, 4], size=4)
    read_or_refuse(mutate(valid, data.draw(st.integers(0, len(valid))), junk))
