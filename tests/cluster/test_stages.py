"""Workers are to write what a single process writes, reading each layer once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tiny
from cluster.conftest import Alone, Quantize
from cluster.machines import Machines
from cluster.watched import Fault, Watch
from octavo.checkpoint import Checkpoint
from octavo.units import parse_bytes
from tiny import contents

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("model", "scheme", "format", "workers"),
    [
        ("llama", "fp8", "modelopt", 3),
        ("qwen2", "fp8", "tensorrt-llm", 2),  # biases; merged scales, fused tensors
        ("llama", "fp8-dynamic", "compressed-tensors", 2),  # without calibration
    ],
)
def test_workers_write_what_one_process_writes(
    spread: Quantize,
    alone: Alone,
    tmp_path: Path,
    model: str,
    scheme: str,
    format: str,
    workers: int,
) -> None:
    expected = alone(model, scheme=scheme, format=format)
    spread(tmp_path / "output", model, scheme=scheme, format=format, workers=workers)
    assert contents(tmp_path / "output") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]


@pytest.mark.parametrize("rounding", ["gptq", "learned"])
def test_in_turn_on_workers(rounding: str, spread: Quantize, alone: Alone, tmp_path: Path) -> None:
    options = {"scheme": "fp8", "rounding": rounding, "format": "modelopt"}
    spread(tmp_path / "output", "llama", workers=3, **options)
    assert contents(tmp_path / "output") == alone("llama", **options)


def test_each_layer_is_read_once_and_stages_overlap(
    spread: Quantize, alone: Alone, models: Path, watch: Watch
) -> None:
    watch.arrange(
        # The first worker has done a few batches of its last pass, and waits until the second has done one.
        Fault(0, "pwritev", "hidden-1", 24 + 5, 1),
        Fault(1, "pwritev", "hidden-1", 1, "pass"),
    )
    spread(watch.target)
    assert contents(watch.target) == alone()
    assert watch.struck() == {0, 1}

    checkpoint = Checkpoint(models / "llama")
    reads = [call for call in watch.calls() if call.path.startswith(str(models / "llama"))]
    read: Counter[tuple[str, int]] = Counter()
    for call in reads:
        tensor = next(
            name
            for name in checkpoint
            if str(checkpoint.file_of(name)) == call.path
            and checkpoint[name].start <= call.start < checkpoint[name].end
        )
        assert call.end <= checkpoint[tensor].end
        read[tensor, call.stage] += call.end - call.start
    layers = {name: name.split(".")[2] for name in checkpoint if ".layers." in name}
    assert {name: read.pop((name, int(layer) // 3)) for name, layer in layers.items()} == {
        name: checkpoint[name].nbytes for name in layers
    }
    # Besides, only the first reads rows of the embedding.
    assert list(read) == [("model.embed_tokens.weight", 0)]


def test_workers_keep_a_limit(machines: Machines, models: Path, tmp_path: Path) -> None:
    tiny.build("llama", models / "wide", layers=4, hidden_size=1024, intermediate_size=4096)

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, "-m", "octavo.cli", "quantize", models / "wide"),
                *("-o", tmp_path / "output", "--calib", models / "ids.npy", "--json", "--quiet"),
                *("--workers", "2", "--cluster", machines.address, "--max-memory", str(limit)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    told = re.search(r"takes (\d+ MB) at least", run(600_000_000).stderr)
    assert told
    limit = parse_bytes(told[1])
    assert run(limit - 2_000_000).returncode == 2
    ran = run(limit)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["peak_memory"] <= limit
