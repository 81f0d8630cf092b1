"""Ray, of the environment that `make test-cluster` builds, on two machines; and models for it to run on.

Without Ray these tests skip, saying so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

import tiny
from cluster import watched
from cluster.machines import Machines, two_machines
from octavo import Calibration, QuantizeResult, quantize
from octavo.scheme import scheme_called

TESTS = Path(__file__).resolve().parents[1]

Quantize: TypeAlias = Callable[..., QuantizeResult]
Alone: TypeAlias = Callable[..., dict[str, bytes | None]]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What all processes of these tests have in their environment."""
    pytest.importorskip("ray", reason="Ray is not installed here: `make test-cluster`")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            watched.VARIABLE: str(tmp_path_factory.mktemp("watched")),
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
            "RAY_AUTH_MODE": "disabled",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def two_cores(environment: None) -> Iterator[None]:
    """As many threads everywhere, so that it is known how many workers have room."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def machines(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A cluster of two machines."""
    with two_machines(tmp_path_factory.mktemp("machines")) as started:
        yield started


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of checkpoints of six layers and token ids."""
    directory = tmp_path_factory.mktemp("models")
    tiny.build("llama", directory / "llama", layers=6, shards=3)
    tiny.build("qwen2", directory / "qwen2", layers=6)
    # 24 batches.
    tiny.save_ids(directory / "ids.npy", samples=192, seq_len=128)
    return directory


@pytest.fixture(scope="session")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What a single process writes, with options of :func:`run`."""
    directory = tmp_path_factory.mktemp("alone")

    @cache
    def build(model: str = "llama", **options: Any) -> dict[str, bytes | None]:
        output = directory / "output"
        run(models, output, model, **options)
        contents = tiny.contents(output)
        shutil.rmtree(output)
        return contents

    return build


def run(
    models: Path,
    output: Path,
    model: str = "llama",
    scheme: str = "fp8",
    rounding: str = "nearest",
    **options: Any,
) -> QuantizeResult:
    """Quantize one of the models, as a single process or with the options of one that has workers."""
    return quantize(
        models / model,
        output,
        scheme=scheme_called(scheme, rounding=rounding),
        calibration=Calibration(source=str(models / "ids.npy")),
        shard_size=100_000,
        **options,
    )


@pytest.fixture
def spread(models: Path, machines: Machines) -> Quantize:
    """:func:`run` on the cluster, with two workers unless told otherwise."""

    def on_cluster(output: Path, model: str = "llama", **options: Any) -> QuantizeResult:
        return run(models, output, model, **{"workers": 2, "cluster": machines.address, **options})

    return on_cluster


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> watched.Watch:
    """Workers are watched, and take one layer and one batch at a time."""
    for module, name, value in watched.SLOW:
        monkeypatch.setattr(module, name, value)
    return watched.Watch(tmp_path / tmp_path.name)
