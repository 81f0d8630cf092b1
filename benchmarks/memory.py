"""Large shapes in little memory: the process is given a hard limit, and ``--max-memory`` has to keep below it.

An 8B-shaped model of random weights (16 GB) is quantized with static calibration in 3 GiB, and one layer of the
405B shape (6.4 GB, with 8.4 GB of embeddings) in 16 GB. The limit is a memory control group's, or RLIMIT_DATA
where none can be made.

Usage: python -m benchmarks.memory [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import CACHE, save
from benchmarks.limits import limited
from octavo import synth


class Case(NamedTuple):
    """A model, and what it is quantized in.

    Attributes:
        like: the shape.
        layers: of it; None for all.
        limit: bytes the system allows.
        promise: what ``--max-memory`` is told.
        samples: of calibration.
        seq_len: tokens in each.
    """

    like: str
    layers: int | None
    limit: int
    promise: str
    samples: int
    seq_len: int


def run(case: Case, scratch: Path) -> dict[str, Any]:
    """Make the model and quantize it under the limit."""
    print(f"{case.like}: making {case.layers or 'all'} layers …", flush=True)
    made = synth(case.like, scratch / "model", layers=case.layers)
    print(f"  {made.nbytes / 1e9:.1f} GB in {made.seconds['total']:.0f} s", flush=True)
    tokens = np.random.default_rng(0).integers(256, size=(case.samples, case.seq_len))
    np.save(scratch / "ids.npy", tokens)
    command: list[str | Path] = [
        *(Path(sys.executable).with_name("octavo"), "quantize", scratch / "model"),
        *("-o", scratch / "out", "--calib", scratch / "ids.npy"),
        *("--max-memory", case.promise, "--json", "--quiet"),
    ]
    how, ran = limited(command, case.limit)
    if ran.returncode:
        sys.exit(f"octavo failed under {how} {case.limit}: {ran.stderr[-2000:]}")
    result = json.loads(ran.stdout)
    rate = (result["bytes_before"] + result["bytes_after"]) / result["seconds"]["total"] / 1e9
    print(
        f"  {how} of {case.limit / 1e9:.1f} GB, --max-memory {case.promise}: peak "
        f"{result['peak_memory'] / 1e9:.2f} GB, {result['seconds']['total']:.0f} s, {rate:.2f} GB/s read and written",
        flush=True,
    )
    return {
        **case._asdict(),
        "limit_kept_by": how,
        "bytes_before": result["bytes_before"],
        "bytes_after": result["bytes_after"],
        "peak_memory": result["peak_memory"],
        "seconds": result["seconds"],
        "gb_s_read_and_written": round(rate, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="of the 8B shape; all by default")
    options = parser.parse_args()
    cases = [
        Case("llama-3.1-8b", options.layers, 3 << 30, "3GiB", 8, 128),
        Case("llama-3.1-405b", 1, 16_000_000_000, "12GiB", 4, 16),
    ]
    CACHE.mkdir(exist_ok=True)
    runs = []
    for case in cases:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            runs.append(run(case, Path(scratch)))
        save("memory", {"runs": runs})
    print("saved memory.json")


if __name__ == "__main__":
    main()
