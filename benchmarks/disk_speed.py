"""How near to disk speed a checkpoint streams through with ``--scheme fp8-tensor-dynamic``.

A random-weight checkpoint is quantized, and in the same run the same bytes are plainly read
(``preadv`` into one buffer) and the edition's bytes plainly written (``pwrite`` and ``fsync``).
Both come from and go to the page cache as the runs before left it (warm), or, with ``--cold``, the
page cache is dropped before each. Startup of the interpreter is not counted on either side.

Usage: python -m benchmarks.disk_speed [--gigabytes 4] [--rounds 5] [--cold]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import CACHE, median, save
from octavo import Scheme, quantize
from octavo.allocator import keep_freed_memory

_BLOCK = 16 << 20


def make_model(directory: Path, gigabytes: float) -> None:
    """A Llama-shaped checkpoint with layers like those of an 1B model."""
    shape: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    layer_bytes = 2 * (2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    layers = max(1, round((gigabytes * 1e9 - 2 * 2 * 32000 * 2048) / layer_bytes))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    build: Any = LlamaForCausalLM
    model = build(LlamaConfig(**shape, num_hidden_layers=layers))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory, max_shard_size="2GB")


def plain_read(directory: Path) -> float:
    """Seconds to read every shard once, in order."""
    buffer = memoryview(bytearray(_BLOCK))
    begin = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        position = 0
        while count := os.preadv(descriptor, [buffer], position):
            position += count
        os.close(descriptor)
    return time.perf_counter() - begin


def plain_write(path: Path, nbytes: int) -> float:
    """Seconds to write and sync ``nbytes`` to a new file."""
    block = memoryview(os.urandom(_BLOCK))
    begin = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for position in range(0, nbytes, _BLOCK):
        os.pwrite(descriptor, block[: min(_BLOCK, nbytes - position)], position)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def drop_caches(cold: bool) -> None:
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    scheme = Scheme(inputs="dynamic", kv_cache="none")
    CACHE.mkdir(exist_ok=True)
    ours, plain = [], []
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        make_model(model, options.gigabytes)
        result = quantize(model, out, scheme=scheme, format="quark")
        shutil.rmtree(out)
        for number in range(options.rounds):
            drop_caches(options.cold)
            read = plain_read(model)
            drop_caches(options.cold)
            write = plain_write(Path(scratch) / "plain", result.bytes_after)
            drop_caches(options.cold)
            begin = time.perf_counter()
            quantize(model, out, scheme=scheme, format="quark")
            ours.append(time.perf_counter() - begin)
            plain.append(read + write)
            shutil.rmtree(out)
            print(
                f"round {number + 1}: plain read {read:.2f} s + write {write:.2f} s, "
                f"octavo {ours[-1]:.2f} s: {plain[-1] / ours[-1]:.0%}",
                flush=True,
            )
    rate = median([a / b for a, b in zip(plain, ours, strict=True)])
    moved = result.bytes_before + result.bytes_after
    print(
        f"median {rate:.0%} of the plain rate, {moved / median(ours) / 1e9:.2f} GB/s read and written"
    )
    path = save(
        f"disk_speed_{'cold' if options.cold else 'warm'}",
        {
            "bytes_read": result.bytes_before,
            "bytes_written": result.bytes_after,
            "octavo_seconds": [round(value, 3) for value in ours],
            "plain_seconds": [round(value, 3) for value in plain],
            "fraction_of_plain_rate": round(rate, 3),
        },
    )
    print(f"saved {path.name}")


if __name__ == "__main__":
    main()
