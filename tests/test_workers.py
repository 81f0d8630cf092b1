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
    settings = Settings(batch_tokens=64, read_ahead=True, workers=1, threshold=1 << 60)
    shape = layer_shape(job)
    cores = cluster.worker_threads(2)
    one = settings._replace(read_ahead=False)
    limit = peak_memory(shape, one, seq_len=16, cores=cores, layers=1) + (count - 1) * shape.nbytes
    for spare in (0, shape.nbytes - 1):
        held = cluster.layers_in_memory(job, "cpu", 2, limit + spare, settings, 16)
        assert held == count


def test_other_weights_of_the_same_shapes_are_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    same = shutil.copytree(tiny_llama, tmp_path / "same")
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    found = cluster.files_of(Checkpoint(tiny_llama))
    assert found == cluster.files_of(Checkpoint(same))
    differing = {
        name for name, told in cluster.files_of(Checkpoint(other)).items() if told != found[name]
    }
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
    found = cluster.fit(asked, [*nodes, dead], grow=grow)
    assert [order.threads for order in found] == [threads] * workers
    with pytest.raises(OctavoError, match=f"have room for {sum(cores)}"):
        cluster.fit(asked * (sum(cores) + 1), nodes, grow=grow)
    with pytest.raises(OctavoError, match="have room for 0"):
        cluster.fit(asked, [dead], grow=grow)


def test_each_worker_takes_a_gpu(orders: list[cluster.Order]) -> None:
    asked = [order._replace(device="cuda", threads=8) for order in orders]
    nodes = [{"Alive": True, "Resources": {"CPU": 64.0, "GPU": 2.0}}]
    assert [order.threads for order in cluster.fit(asked, nodes, grow=True)] == [8, 8]
    with pytest.raises(OctavoError, match=r"4 workers take 1 GPU each.*room for 2"):
        cluster.fit(asked * 2, nodes, grow=True)


@pytest.fixture
def orders(tiny_llama: Path, tmp_path: Path) -> Iterator[list[cluster.Order]]:
    """For two workers, without calibration."""
    job = open_job(
        tiny_llama, scheme_called("fp8-dynamic"), "compressed-tensors", pick_device("cpu")
    )
    settings = Settings(batch_tokens=64, read_ahead=True, workers=1, threshold=1 << 60)
    with Workspace(tmp_path / "output") as work:
        yield cluster.make_orders(job, None, settings, "cpu", 2, None, work, 10**9, {})
