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
from octavo.cluster import crew, session
from octavo.pipeline import Progress
from tiny import contents

pytestmark = pytest.mark.cluster


@pytest.fixture
def private(machines: Machines) -> Iterator[Path]:
    """A directory that is another one on the other machine, if there is such a machine."""
    yield machines.private
    others = [] if machines.other is None else [machines.there(machines.private)]
    for directory in (machines.private, *others):
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def test_what_is_written_elsewhere_is_resumed_there_and_gathered(
    spread: Quantize,
    alone: Alone,
    machines: Machines,
    watch: Watch,
    private: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (crew, session):
        monkeypatch.setattr(module, "RESTARTS", 1)
    watch.arrange(
        Fault(0, "pwritev", "edition", 40, "kill"),
        # Layers are reported before the worker dies for good.
        Fault(1, "pwritev", "edition", 60, "seen"),
        Fault(1, "pwritev", "hidden-1", 5, "kill"),
        Fault(1, "pwritev", "edition", 61, "kill"),
    )

    def see(step: Progress) -> None:
        if step.done > 3:
            watch.release("seen")

    target = private / "of" / "its" / "own" / watch.target.name
    with pytest.raises(OctavoError, match="died more than 1 times") as error:
        spread(target, on_progress=see)
    assert "--resume" in error.value.__notes__[-1]
    assert watch.struck() == {0, 1, 2, 3}
    spread(target, resume=True)
    assert contents(target) == alone()
    assert list(target.parent.iterdir()) == [target]
    if machines.other is not None:
        # One of them wrote to a directory of its own. It is gone, and so are those around it.
        written = {Path(call.path).parent for call in watch.calls() if call.name == "pwritev"}
        home = target.parent / f".{target.name}.octavo"
        assert written & {home / "stage-0" / "edition", home / "stage-1" / "edition"}
        assert list(machines.there(private).iterdir()) == []


@pytest.mark.parametrize("present", [True, False])
def test_a_machine_without_the_same_checkpoint(
    machines: Machines, models: Path, private: Path, tmp_path: Path, present: bool
) -> None:
    if machines.other is None:
        pytest.skip(f"no machine with a file system of its own can be made here: {machines.why}")
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
