"""How near to disk speed weights stream through with ``--scheme fp8-tensor-dynamic``.

A random-weight checkpoint is quantized, and in the same run the same bytes are plainly read
(``preadv`` into one buffer) and the edition's bytes plainly written (``pwrite`` and ``fsync``).
Octavo's rate is the checkpoint's bytes over its seconds; it is compared with the slower of the plain
reading rate and the plain writing rate. Both come from and go to the page cache as the runs before left it
(warm), or, with ``--cold``, the page cache is dropped before each. Startup of the interpreter is not counted
on either side.

Usage: python -m benchmarks.disk_speed [--gigabytes 4] [--rounds 5] [--cold]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.common import CACHE, median, save
from octavo import Scheme, quantize, synth
from octavo.allocator import keep_freed_memory

_BLOCK = 16 << 20

# A decoder layer of llama-3.2-1b in BF16.
_LAYER_BYTES = 2 * (2048 * 2048 * 2 + 2 * 2048 * 512 + 3 * 2048 * 8192)


def layers_of(gigabytes: float) -> int:
    """How many layers of llama-3.2-1b make so many GB."""
    return max(1, round(gigabytes * 1e9 / _LAYER_BYTES))


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
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        layers = layers_of(options.gigabytes)
        synth("llama-3.2-1b", model, layers=layers, shard_size=2_000_000_000)
        result = quantize(model, out, scheme=scheme, format="quark")
        shutil.rmtree(out)
        for number in range(options.rounds):
            drop_caches(options.cold)
            read = result.bytes_before / plain_read(model) / 1e9
            drop_caches(options.cold)
            write = result.bytes_after / plain_write(out, result.bytes_after) / 1e9
            drop_caches(options.cold)
            begin = time.perf_counter()
            quantize(model, out, scheme=scheme, format="quark")
            ours = result.bytes_before / (time.perf_counter() - begin) / 1e9
            shutil.rmtree(out)
            rounds.append({"read": read, "write": write, "octavo": ours})
            print(
                f"round {number + 1}: plain read {read:.2f} GB/s, plain write {write:.2f} GB/s, "
                f"octavo {ours:.2f} GB/s: {ours / min(read, write):.0%} of the slower",
                flush=True,
            )
    share = median([one["octavo"] / min(one["read"], one["write"]) for one in rounds])
    rates = {name: median([one[name] for one in rounds]) for name in rounds[0]}
    print(f"median {share:.0%} of the slower of plain reading and writing")
    path = save(
        f"disk_speed_{'cold' if options.cold else 'warm'}",
        {
            "bytes_read": result.bytes_before,
            "bytes_written": result.bytes_after,
            "rounds_gb_s": rounds,
            "median_gb_s": rates,
            "fraction_of_the_slower": round(share, 3),
        },
    )
    print(f"saved {path.name}")


if __name__ == "__main__":
    main()
