"""How near to disk speed a conversion streams, and what memory it takes.

A random-weight edition is converted from ModelOpt's dialect to each of the others and to BF16; in the same
round its bytes are plainly read and the output's bytes plainly written (``pwrite`` and ``fsync``). Each
conversion is a process of its own, whose start (interpreter, PyTorch, transformers) is not counted.

Usage: python -m benchmarks.convert_speed [--gigabytes 3] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import CACHE, median, save
from benchmarks.disk_speed import layers_of, plain_read, plain_write
from octavo import Calibration, Scheme, quantize, synth
from octavo.checkpoint import Checkpoint

_TARGETS: dict[str, dict[str, Any]] = {
    "quark": {"to": "quark"},
    "compressed-tensors": {"to": "compressed-tensors"},
    "vllm-fp8": {"to": "vllm-fp8"},
    "tensorrt-llm, tp 1": {"to": "tensorrt-llm"},
    "tensorrt-llm, tp 2": {"to": "tensorrt-llm", "tp": 2},
    "BF16": {"dequantize": "bf16"},
}
_SCRIPT = """
import json, sys
from octavo.allocator import keep_freed_memory
keep_freed_memory()
from octavo import convert
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
result = convert(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps([result.seconds["total"], peak() - before, result.bytes_after]))
"""


def run(source: Path, output: Path, options: dict[str, Any]) -> tuple[float, int, int]:
    """Seconds, bytes of memory above the imports, bytes written."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", _SCRIPT, str(source), str(output), json.dumps(options)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory, written = json.loads(ran.stdout)
    return seconds, memory, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    found: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "plain": [], "memory": []} for name in _TARGETS
    }
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        model, source, output = (Path(scratch) / name for name in ("model", "edition", "out"))
        synth("llama-3.2-1b", model, layers=layers_of(options.gigabytes))
        ids = Path(scratch) / "ids.npy"
        np.save(ids, np.arange(2 * 16).reshape(2, 16))
        scheme = Scheme(kv_cache="none", merge_scales=True)
        quantize(model, source, scheme=scheme, calibration=Calibration(source=str(ids)))
        shutil.rmtree(model)
        checkpoint = Checkpoint(source)
        largest = max(checkpoint[name].nbytes for name in checkpoint)
        run(source, output, {"to": "tensorrt-llm"})  # compiles, and warms the page cache
        for number in range(options.rounds):
            for name, target in _TARGETS.items():
                seconds, memory, written = run(source, output, target)
                shutil.rmtree(output)
                plain = plain_read(source) + plain_write(Path(scratch) / "plain", written)
                for key, value in zip(found[name], (seconds, plain, memory), strict=True):
                    found[name][key].append(value)
                print(
                    f"round {number + 1}: {name}: {seconds:.2f} s, plain {plain:.2f} s", flush=True
                )
    results = {
        name: {
            "seconds": [round(value, 3) for value in one["seconds"]],
            "plain_seconds": [round(value, 3) for value in one["plain"]],
            "of_plain_rate": round(
                median([a / b for a, b in zip(one["plain"], one["seconds"], strict=True)]), 3
            ),
            "memory_mb": round(max(one["memory"]) / 1e6, 1),
        }
        for name, one in found.items()
    }
    for name, row in results.items():
        print(f"{name}: {row['of_plain_rate']:.0%} of the plain rate, {row['memory_mb']} MB")
    edition = {"bytes": checkpoint.nbytes, "largest_tensor": largest}
    print(f"saved {save('convert_speed', {'edition': edition, 'targets': results}).name}")


if __name__ == "__main__":
    main()
