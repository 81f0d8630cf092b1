"""Quantizing on a GPU: seconds per layer, GB/s and TFLOP/s against what the card can do, device memory.

An 8B-shaped and a two-layer 405B-shaped checkpoint of random weights are quantized with static calibration,
128 samples of 512 tokens. The card's own peaks are measured in the same run: a large copy, a large BF16
matrix product. What all 126 layers of a 405B model would take is extrapolated from its last layer, and said
to be. Without a GPU it says so, and measures nothing.

Usage: python -m benchmarks.gpu [--samples 128] [--seq-len 512] [--layers-8b 32]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CACHE, ROOT, median, save
from octavo import Calibration, quantize, synth
from octavo.allocator import keep_freed_memory
from octavo.shapes import shape_called

_LAYERS_405B = 126
_ROUNDS = 10


def seconds_of(work: Any, rounds: int = _ROUNDS) -> float:
    """Median seconds of ``work`` on the GPU, after one warm-up."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[1:])


def peaks() -> dict[str, float]:
    """What the card does at best: GB/s of a copy on the device and from pinned memory, BF16 TFLOP/s."""
    size, width = 4 << 30, 16384
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    copy = 2 * size / seconds_of(source.clone) / 1e9
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    upload = host.nbytes / seconds_of(lambda: host.to("cuda")) / 1e9
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = 2 * width**3 / seconds_of(lambda: a @ b) / 1e12
    return {"copy_gb_s": copy, "upload_gb_s": upload, "matmul_tflop_s": product}


def layer_flops(config: dict[str, Any], samples: int, seq_len: int) -> float:
    """Floating point operations of one decoder layer: its linear layers, and causal attention."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, config["num_key_value_heads"] * size
    weights = hidden * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    return float(samples * seq_len * 2 * (weights + seq_len * queries))


def measure(
    like: str, layers: int | None, samples: int, seq_len: int, scratch: Path
) -> dict[str, Any]:
    """Quantize one model; what it took."""
    config = shape_called(like)
    print(f"{like}: making {layers or 'all'} layers of random weights …", flush=True)
    model = Path(synth(like, scratch / like, layers=layers).output)
    torch.cuda.reset_peak_memory_stats()
    finished = [time.perf_counter()]
    result = quantize(
        model,
        scratch / f"{like}-fp8",
        calibration=Calibration(samples=samples, seq_len=seq_len),
        device="cuda",
        on_progress=lambda _: finished.append(time.perf_counter()),
    )
    each = [after - before for before, after in pairwise(finished)]
    # The first layer waits for its weights, and compiles.
    per_layer = median(each[1:]) if len(each) > 1 else each[0]
    flops = layer_flops(config, samples, seq_len)
    moved = result.bytes_before + result.bytes_after
    return {
        "model": like,
        "layers": result.layers,
        "samples": samples,
        "seq_len": seq_len,
        "seconds": result.seconds,
        "seconds_per_layer": per_layer,
        "all_seconds_per_layer": each,
        "gb_s_read_and_written": moved / result.seconds["total"] / 1e9,
        "tflop_s_while_calibrating": flops * result.layers / result.seconds["calibrate"] / 1e12,
        "peak_device_memory": torch.cuda.max_memory_allocated(),
        "peak_host_memory": result.peak_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--layers-8b", type=int, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU that PyTorch can use: nothing is measured.")
        return
    keep_freed_memory()
    CACHE.mkdir(exist_ok=True)
    best = peaks()
    print(", ".join(f"{name} {value:,.0f}" for name, value in best.items()), flush=True)
    runs = []
    for like, layers in (("llama-3.1-8b", options.layers_8b), ("llama-3.1-405b", 2)):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            run = measure(like, layers, options.samples, options.seq_len, Path(scratch))
        runs.append(run)
        share = run["tflop_s_while_calibrating"] / best["matmul_tflop_s"]
        print(
            f"{like}: {run['seconds_per_layer']:.2f} s a layer, {run['gb_s_read_and_written']:.2f} GB/s, "
            f"{run['tflop_s_while_calibrating']:.0f} TFLOP/s ({share:.0%} of the peak), "
            f"device memory {run['peak_device_memory'] / 1e9:.1f} GB",
            flush=True,
        )
    whole = runs[-1]["seconds_per_layer"] * _LAYERS_405B
    print(f"extrapolated, not measured: {_LAYERS_405B} layers take {whole / 60:.0f} min")
    path = save("gpu", {"peaks": best, "runs": runs, "extrapolated_seconds_405b": whole})
    print(f"saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
