"""What is decided of a run on workers before Ray is asked for any."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from octavo import OctavoError, cli, cluster
from octavo.checkpoint import Checkpoint, Workspace
from octavo.cluster import crew
from octavo.cluster.orders import files_of
from octavo.job import layer_shape, open_job
from octavo.memory import Settings, peak_memory
from octavo.preflight import pick_device
from octavo.scheme import Scheme, scheme_called


@given(layers=st.integers(1, 200), data=st.data())
def test_layers_are_split_into_contiguous_runs(layers: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, layers))
    size = data.draw(st.integers(1, layers))
    runs = cluster.split(layers, workers)
    assert list(chain(*runs)) == list(range(layers))
    assert len(runs) == workers
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    for run in runs:
        passes = cluster.passes_of(run, size)
        assert list(chain(*passes)) == run
        assert len(passes) == -(-len(run) // size)
        assert max(map(len, passes)) <= size


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_layers_are_held_as_memory_allows(tiny_llama: Path, count: int) -> None:
    job = open_job(tiny_llama, Scheme(), "modelopt", pick_device("cpu"))
    settings = Settings(batch_tokens=64, read_ahead=False, workers=1, threshold=1 << 60)
    shape, workers = layer_shape(job), 1
    program = cluster.worker_memory(job, 16, "cpu", workers)
    sizes = {"seq_len": 16, "samples": 4, "layers": len(job.plans), "program": program}
    limit = peak_memory(shape, settings, cores=1, **sizes) + (count - 1) * shape.nbytes
    for spare in (0, shape.nbytes - 1):
        found = cluster.hold_layers(job, settings, (4, 16), "cpu", workers, limit + spare)
        assert found.held == min(count, len(job.plans))
        assert peak_memory(shape, found, cores=1, **sizes) <= limit + spare


def test_other_weights_of_the_same_shapes_are_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    same = shutil.copytree(tiny_llama, tmp_path / "same")
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    found = files_of(Checkpoint(tiny_llama))
    assert found == files_of(Checkpoint(same))
    differing = {name for name, told in files_of(Checkpoint(other)).items() if told != found[name]}
    assert differing == {file.name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "needs Ray, which is not installed. Install it with `pip install"),
        (["--workers", "3"], "--workers 3 is more than the model has decoder layers (2)."),
        (["--cluster", "auto"], "--cluster needs --workers N"),
    ],
)
def test_refused(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    find = importlib.util.find_spec

    def find_no_ray(name: str, *rest: Any) -> Any:
        return None if name == "ray" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_no_ray)
    ids = tiny.save_ids(tmp_path / "ids.npy")
    arguments = [str(tiny_llama), "-o", str(tmp_path / "output"), "--calib", str(ids), *options]
    result = CliRunner().invoke(cli.app, ["quantize", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == [ids]


@pytest.mark.parametrize(
    ("cores", "workers", "planned", "grow", "limited", "threads"),
    [
        ([16], 2, 4, True, False, 8),
        ([16], 2, 4, False, False, 4),  # a cluster of this machine alone
        ([16], 2, 4, True, True, 4),  # more would take more memory
        ([8, 4], 3, 1, True, False, 4),
        ([8, 4], 4, 1, True, False, 2),
        ([4, 4], 2, 16, True, False, 4),  # a driver with more cores than they have
        ([4, 0], 4, 16, True, True, 1),
        ([1], 1, 4, True, False, 1),
    ],
)
def test_workers_get_the_threads_that_there_is_room_for(
    orders: list[cluster.Order],
    cores: list[int],
    workers: int,
    planned: int,
    grow: bool,
    limited: bool,
    threads: int,
) -> None:
    asked = [orders[0]._replace(threads=planned, limited=limited)] * workers
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cores]
    dead = {"Alive": False, "Resources": {"CPU": 64.0}}
    found = crew.fit(asked, [*nodes, dead], grow=grow)
    assert [order.threads for order in found] == [threads] * workers
    with pytest.raises(OctavoError, match=f"have room for {sum(cores)}"):
        crew.fit(asked * (sum(cores) + 1), nodes, grow=grow)
    with pytest.raises(OctavoError, match="have room for 0"):
        crew.fit(asked, [dead], grow=grow)


def test_each_worker_takes_a_gpu(orders: list[cluster.Order]) -> None:
    asked = [order._replace(device="cuda", threads=8) for order in orders]
    nodes = [{"Alive": True, "Resources": {"CPU": 64.0, "GPU": 2.0}}]
    assert [order.threads for order in crew.fit(asked, nodes, grow=True)] == [8, 8]
    with pytest.raises(OctavoError, match=r"4 workers take 1 GPU each.*room for 2"):
        crew.fit(asked * 2, nodes, grow=True)


@pytest.fixture
def orders(tiny_llama: Path, tmp_path: Path) -> Iterator[list[cluster.Order]]:
    """For two workers, without calibration."""
    job = open_job(
        tiny_llama, scheme_called("fp8-dynamic"), "compressed-tensors", pick_device("cpu")
    )
    settings = Settings(batch_tokens=64, read_ahead=True, workers=1, threshold=1 << 60)
    with Workspace(tmp_path / "output") as work:
        yield cluster.make_orders(job, None, settings, "cpu", 2, work, 10**9, {}, limited=False)
