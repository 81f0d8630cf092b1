"""Workers on a machine that does not see the output: they write there, and what they wrote is gathered."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny
from cluster.conftest import Alone, Quantize, run
from cluster.machines import OTHER, Machines
from cluster.watched import Fault, Watch
from octavo import OctavoError
from tiny import contents

pytestmark = pytest.mark.cluster


@pytest.fixture
def private(machines: Machines) -> Iterator[Path]:
    """A directory that is another one on the other machine."""
    if machines.other is None:
        pytest.skip(f"no machine with a file system of its own can be made here: {machines.why}")
    yield machines.private
    for directory in (machines.private, machines.there(machines.private)):
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def test_what_is_written_elsewhere_is_gathered(
    spread: Quantize, alone: Alone, machines: Machines, watch: Watch, private: Path
) -> None:
    watch.arrange(
        Fault(0, "pwritev", "edition", 40, "kill"),
        Fault(1, "pwritev", "edition", 40, "kill"),
    )
    target = private / "of" / "its" / "own" / watch.target.name
    spread(target)
    assert contents(target) == alone()
    assert watch.struck() == {0, 1}
    # One of them wrote to a directory of its own, and it and those around it are gone.
    written = {Path(call.path).parent for call in watch.calls() if call.name == "pwritev"}
    edition = target.parent / f".{target.name}.octavo" / "edition"
    assert {path.parent.name for path in written - {edition} if path.name == "edition"} & {
        *("stage-0", "stage-1")
    }
    assert list(machines.there(private).iterdir()) == []
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("present", [True, False])
def test_a_machine_without_the_same_checkpoint(
    machines: Machines, models: Path, private: Path, tmp_path: Path, present: bool
) -> None:
    shutil.copytree(models / "llama", private / "llama")
    tiny.save_ids(private / "ids.npy")
    if present:
        there = shutil.copytree(models / "llama", machines.there(private) / "llama")
        for file in there.glob("*.safetensors"):
            save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(OctavoError) as error:
        run(private, tmp_path / "output", workers=2, cluster=machines.address)
    message = " ".join([str(error.value), *getattr(error.value, "__notes__", ())])
    assert str(private / "llama") in message
    assert OTHER in message
    assert list(tmp_path.iterdir()) == []
