"""How well ``octavo plan`` predicts the time of a run: in one process, on one Ray worker, and on two.

For each, in turns: what the plan says at that moment, and the wall-clock time of the run it is about. Workers share
the machine's cores, so two are not expected to be faster than one; the model has to say so. Run it with an
environment that has Ray.

Usage: python -m benchmarks.workers [MODEL] [--rounds 3] [--samples 128] [--seq-len 512]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import CACHE, machine, median, sample_model, save

# One process without Ray, then so many workers.
_WAYS = (None, 1, 2)


def octavo(arguments: Sequence[str | Path]) -> tuple[float, dict[str, Any]]:
    """Seconds that a command took, and what it printed as JSON."""
    begin = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "octavo.cli", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        sys.exit(f"octavo {arguments[0]} failed: {ran.stderr[-2000:]}")
    return time.perf_counter() - begin, json.loads(ran.stdout)


def compare(model: Path, workers: int | None, options: Sequence[str | Path]) -> dict[str, float]:
    """Seconds planned and taken."""
    chosen = [*options, *(["--workers", str(workers)] if workers else [])]
    _, plan = octavo(["plan", model, *chosen])
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        seconds, _ = octavo(["quantize", model, "-o", Path(scratch) / "out", "--quiet", *chosen])
    return {"planned": plan["seconds"]["total"], "taken": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="SmolLM2-135M-Instruct by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", default="128")
    parser.add_argument("--seq-len", default="512")
    arguments = parser.parse_args()
    model = arguments.model or sample_model()
    options = ["--samples", arguments.samples, "--seq-len", arguments.seq_len]
    rounds: dict[str, list[dict[str, float]]] = {str(workers or 0): [] for workers in _WAYS}
    for number in range(arguments.rounds):
        for workers in _WAYS:
            found = compare(model, workers, options)
            rounds[str(workers or 0)].append(found)
            print(f"round {number + 1}, {workers or 'no'} workers: {found}", flush=True)
    ratios = {
        workers: median([one["planned"] / one["taken"] for one in found])
        for workers, found in rounds.items()
    }
    for count, ratio in ratios.items():
        taken = median([one["taken"] for one in rounds[count]])
        print(f"{count} workers: {taken:.1f} s taken, planned {ratio:.2f} of that")
    path = save(
        "workers",
        {
            "model": model.name,
            "samples": arguments.samples,
            "seq_len": arguments.seq_len,
            "rounds": rounds,
            "planned_over_taken": ratios,
        },
    )
    print(f"saved {path.name}, of {machine()['cores']} cores")


if __name__ == "__main__":
    main()
