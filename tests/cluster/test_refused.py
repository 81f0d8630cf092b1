"""What users are told that ask for what cannot be had."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster.conftest import Quantize, run
from cluster.machines import CPUS, Machines
from octavo import OctavoError, cli
from octavo.checkpoint import Checkpoint
from octavo.cluster import crew
from octavo.cluster.worker import Worker

pytestmark = pytest.mark.cluster


def test_more_workers_than_there_is_room_for(spread: Quantize, tmp_path: Path) -> None:
    with pytest.raises(OctavoError) as error:
        spread(tmp_path / "output", workers=2 * CPUS + 1)
    assert str(error.value).startswith(
        f"5 workers take 1 CPU each, and the machines of the Ray cluster ({CPUS}, {CPUS} CPU) have room for 4."
    )
    assert list(tmp_path.iterdir()) == []


def test_no_cluster_at_the_address(spread: Quantize, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            OctavoError, match=f"No Ray cluster can be used at {address}: .*refused"
        ):
            spread(tmp_path / "output", cluster=address)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_a_worker_finds(models: Path, machines: Machines, tmp_path: Path) -> None:
    ruined = tmp_path / "models"
    shutil.copytree(models, ruined)
    name = "model.layers.4.mlp.up_proj.weight"
    file = Checkpoint(ruined / "llama").file_of(name)
    tensors = load_file(file)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    output = machines.private / "output"
    with pytest.raises(OctavoError) as expected:
        run(ruined, output)
    with pytest.raises(OctavoError, match=f"{name}.*NaN") as error:
        run(ruined, output, workers=2, cluster=machines.address)
    assert str(error.value) == str(expected.value)
    assert list(machines.private.iterdir()) == []
    if machines.other is not None:
        assert list(machines.there(machines.private).iterdir()) == []


def test_exit_code(models: Path, machines: Machines, tmp_path: Path) -> None:
    arguments = [models / "llama", "-o", tmp_path / "output", "--calib", models / "ids.npy"]
    workers = ["--workers", 5, "--cluster", machines.address]
    result = CliRunner().invoke(cli.app, ["quantize", *map(str, [*arguments, *workers])])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: 5 workers take")


def test_a_machine_without_octavo(
    spread: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here_only = ModuleType("here_only")
    worker = type("Worker", (Worker,), {"__module__": "here_only"})
    vars(here_only)["Worker"] = worker
    monkeypatch.setitem(sys.modules, "here_only", here_only)
    monkeypatch.setattr(crew, "Worker", worker)
    with pytest.raises(OctavoError, match=r"could not be started: .*No module named 'here_only'"):
        spread(tmp_path / "output")
    assert list(tmp_path.iterdir()) == []
