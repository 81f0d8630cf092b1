"""The checkpoint writer: sharding, agreement with other readers, and all or nothing on disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from octavo.checkpoint import CheckpointWriter, Workspace
from octavo.checkpoint.safetensors import DTYPES
from octavo.checkpoint.writer import split_into_shards
from octavo.errors import OctavoError

TENSORS = {
    "model.embed_tokens.weight": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "model.norm.weight": torch.arange(5, dtype=torch.uint8),
    "model.layers.0.weight_scale": torch.tensor(0.5),
    "lm_head.weight": torch.arange(9).reshape(3, 3).bfloat16(),
}

layouts = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6),
    st.builds(
        lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(list(DTYPES.values())),
    ),
    max_size=12,
)


def layout_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


class Committing(CheckpointWriter):
    """Publishes what it has written."""

    work: Workspace

    def commit(self) -> None:
        self.seal()
        self.work.publish()


@contextmanager
def writing(
    target: Path, layout: dict[str, Tensor], *, shard_size: int, overwrite: bool = False
) -> Iterator[Committing]:
    """A writer of ``target``."""
    with (
        Workspace(target, overwrite=overwrite) as work,
        Committing(work.place, layout, shard_size=shard_size) as writer,
    ):
        writer.work = work
        yield writer


def write(
    target: Path,
    tensors: dict[str, Tensor] = TENSORS,
    *,
    shard_size: int = 10**9,
    overwrite: bool = False,
) -> Path:
    """Write and commit ``tensors``, last one first: any order must do."""
    layout = layout_of(tensors)
    with writing(target, layout, shard_size=shard_size, overwrite=overwrite) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        writer.commit()
    return target


def read(directory: Path) -> dict[str, Tensor]:
    """All tensors below ``directory``, as the safetensors library reads them."""
    shards = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


@given(layout=layouts, shard_size=st.integers(1, 300))
def test_shards_are_consecutive_within_the_limit_and_as_few_as_possible(
    layout: dict[str, Tensor], shard_size: int
) -> None:
    shards = split_into_shards(layout, shard_size)
    sizes = [[layout[name].nbytes for name in names] for names in shards]
    assert [name for names in shards for name in names] == list(layout)
    assert all(shards)
    assert all(sum(nbytes) <= shard_size or len(nbytes) == 1 for nbytes in sizes)
    for full, following in pairwise(sizes):
        assert sum(full) + following[0] > shard_size


@settings(max_examples=30)
@given(layout=layouts, shard_size=st.integers(1, 300))
def test_the_library_reads_every_shard(layout: dict[str, Tensor], shard_size: int) -> None:
    tensors = {name: torch.ones(t.shape).to(t.dtype) for name, t in layout.items()}
    with TemporaryDirectory() as directory:
        target = write(Path(directory, "out"), tensors, shard_size=shard_size)
        found = read(target)
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
            n: (t.dtype, t.shape) for n, t in tensors.items()
        }
        assert all(torch.equal(t.float(), tensors[n].float()) for n, t in found.items())
        for path in target.glob("*.safetensors"):
            assert_aligned(path)


def assert_aligned(path: Path) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for record in header.values():
        assert record["data_offsets"][0] % DTYPES[record["dtype"]].itemsize == 0


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    target = write(tmp_path / "out")
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]
    assert_same(read(target), TENSORS)


def test_the_index_names_the_shard_of_every_tensor(tmp_path: Path) -> None:
    target = write(tmp_path / "out", shard_size=100)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
    assert list(index["weight_map"]) == list(TENSORS)
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(target / shard, framework="pt") as file:
            assert torch.equal(file.get_tensor(name), TENSORS[name])


def test_transformers_loads_the_shards(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    target = write(tmp_path / "out", tensors, shard_size=40_000)
    (target / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    auto: Any = AutoModelForCausalLM
    assert len(list(target.glob("model-0000?-of-0000?.safetensors"))) > 2
    assert_same(auto.from_pretrained(target).state_dict(), tensors)


def test_a_tensor_may_be_written_in_pieces(tmp_path: Path) -> None:
    data = torch.arange(10, dtype=torch.uint8)
    layout = layout_of({"ids": data})
    with writing(tmp_path / "out", layout, shard_size=100) as writer:
        writer.write_bytes("ids", 6, data[6:])
        writer.write_bytes("ids", 0, data[:6])
        writer.finish("ids")
        writer.commit()
    assert_same(read(tmp_path / "out"), {"ids": data})


@pytest.mark.parametrize(
    "tensor", [torch.zeros(9, dtype=torch.uint8), torch.zeros(3, 3)], ids=["shape", "dtype"]
)
def test_a_tensor_unlike_its_layout_is_refused(tensor: Tensor, tmp_path: Path) -> None:
    layout = layout_of(TENSORS)
    with (
        writing(tmp_path / "out", layout, shard_size=100) as writer,
        pytest.raises(ValueError, match=r"lm_head\.weight"),
    ):
        writer.write("lm_head.weight", tensor)


def test_an_unfinished_checkpoint_is_never_committed(tmp_path: Path) -> None:
    with writing(tmp_path / "out", layout_of(TENSORS), shard_size=100) as writer:
        writer.write("lm_head.weight", TENSORS["lm_head.weight"])
        with pytest.raises(RuntimeError, match="never written"):
            writer.commit()
    assert not tiny.contents(tmp_path)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_context_is_left_by(
    kind: type[BaseException], tmp_path: Path
) -> None:
    def fail() -> None:
        with writing(tmp_path / "out", layout_of(TENSORS), shard_size=100) as writer:
            writer.write("lm_head.weight", TENSORS["lm_head.weight"])
            assert tiny.contents(tmp_path)
            raise kind

    with pytest.raises(kind):
        fail()
    assert not tiny.contents(tmp_path)


class TestExistingTarget:
    """What happens to a target that is there already."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        target = tmp_path / "out"
        target.mkdir()
        (target / "stale.safetensors").write_text("precious")
        return target

    def test_is_refused(self, target: Path) -> None:
        before = tiny.contents(target.parent)
        with pytest.raises(OctavoError, match=r"out already exists.*--overwrite"):
            write(target)
        assert tiny.contents(target.parent) == before

    def test_is_replaced_on_demand(self, target: Path) -> None:
        write(target, overwrite=True)
        assert tiny.contents(target.parent).keys() == {"out", "out/model.safetensors"}
        assert_same(read(target), TENSORS)

    def test_may_be_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        write(tmp_path / "out", overwrite=True)
        assert tiny.contents(tmp_path).keys() == {"out", "out/model.safetensors"}

    def test_may_be_a_link_whose_destination_stays(self, target: Path) -> None:
        link = target.with_name("link")
        link.symlink_to(target)
        before = tiny.contents(target)
        write(link, overwrite=True)
        assert_same(read(link), TENSORS)
        assert tiny.contents(target) == before
        assert {path.name for path in target.parent.iterdir()} == {"out", "link"}

    def test_survives_a_failed_swap(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rename: Callable[[Path, Path], None] = os.rename
        before = tiny.contents(target.parent)

        def rename_or_fail(path: Path, to: Path) -> None:
            if path.name == "edition":
                raise OSError(errno.EIO, "Input/output error")
            rename(path, to)

        monkeypatch.setattr(os, "rename", rename_or_fail)
        with pytest.raises(OctavoError, match="Input/output error"):
            write(target, overwrite=True)
        assert tiny.contents(target.parent) == before

    def test_survives_an_error_before_the_swap(self, target: Path) -> None:
        before = tiny.contents(target.parent)
        with writing(target, layout_of(TENSORS), shard_size=100, overwrite=True):
            pass
        assert tiny.contents(target.parent) == before

    def test_is_refused_even_if_it_appeared_meanwhile(self, tmp_path: Path) -> None:
        with writing(tmp_path / "out", {}, shard_size=100) as writer:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("precious")
            with pytest.raises(OctavoError, match="out"):
                writer.commit()
        assert tiny.contents(tmp_path) == {"out": None, "out/theirs": b"precious"}


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev"])
def test_a_full_disk_says_how_much_is_needed_and_leaves_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = write(tmp_path / "finished", shard_size=100)
    needed = sum(path.stat().st_size for path in finished.glob("*.safetensors"))
    before = tiny.contents(tmp_path)
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OctavoError, match=rf"out needs {needed:,} bytes"):
        write(tmp_path / "out", shard_size=100)
    assert tiny.contents(tmp_path) == before


def test_a_failed_run_leaves_no_new_parent_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OctavoError, match="full"):
        write(tmp_path / "new" / "newer" / "out")
    assert not tiny.contents(tmp_path)


@pytest.mark.parametrize("below", ["out", "deeper/out"])
def test_a_target_below_a_file_cannot_be_written(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    with pytest.raises(OctavoError, match=rf"Cannot write {file / below}: .*\({file}\b"):
        write(file / below)
    assert tiny.contents(tmp_path) == {"file": b"a file"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_too_small(small_disk: Path) -> None:
    tensors = {"a": torch.ones(500_000, dtype=torch.uint8), "b": torch.ones(600_000)}
    # Both shards are 2.9 MB; the first one fits, and its space is free again when the error says so.
    with pytest.raises(OctavoError, match=r"out needs 2,900,\d{3} bytes, 1,04\d,\d{3} are free"):
        write(small_disk / "out", tensors, shard_size=1_000_000)
    assert not tiny.contents(small_disk)
