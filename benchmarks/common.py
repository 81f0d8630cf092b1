"""What the benchmark scripts share: running whole processes, describing the machine, results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
CACHE = ROOT / ".cache"


class Run(NamedTuple):
    """One finished process: wall-clock seconds and peak resident bytes."""

    seconds: float
    peak_memory: int


def run(command: Sequence[str | Path], log: Path) -> Run:
    """Run a process to its end, its output in ``log``.

    Raises:
        SystemExit: it failed; shows the end of the log.
    """
    begin = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{log.read_text()[-2000:]}")
    return Run(seconds, usage.ru_maxrss * 1024)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text()
    names = {
        line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")
    }
    flags = next(line for line in info.splitlines() if line.startswith("flags")).split()
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": ", ".join(sorted(names)),
        "cores": os.cpu_count(),
        "matrix_instructions": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gb": round(pages * page_size / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write a result with the machine it was measured on to ``docs/benchmarks/NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    return path


def sample_model() -> Path:
    """SmolLM2-135M-Instruct, prepared once."""
    directory = CACHE / "smollm2"
    if not directory.is_dir():
        from octavo.sample import sample_model as prepare

        prepare(directory)
    return directory
