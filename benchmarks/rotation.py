"""How much less noise FP8 brings in other axes, by how many channels are rotated among each other; and that at random
it is more.

Usage: python -m benchmarks.rotation WIKI.valid.tokens
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import CACHE, sample_model, save
from octavo import Calibration, rotate
from octavo.allocator import keep_freed_memory
from octavo.rotation import Learned, basis, learn_rotation, mean_noise

WIDTHS = (576, 192, 96, 32)


def measure(model: Path, calibration: Calibration, widest: int) -> dict[str, Any]:
    """Noise of the rotation that is found in blocks of so many channels, and of a random one in such blocks."""
    random: list[float] = []

    def learn(moments: Any, order: Tensor) -> Learned:
        first, _ = moments[0]
        generator = torch.Generator().manual_seed(0)
        blocks = torch.linalg.qr(torch.randn(first.shape, generator=generator)).Q
        random.append(mean_noise(blocks, moments))
        return learn_rotation(moments, order)

    with (
        tempfile.TemporaryDirectory(dir=CACHE) as scratch,
        patch.object(basis, "_WIDEST", widest),
        patch("octavo.rotating.learn_rotation", learn),
    ):
        begin = time.perf_counter()
        found = rotate(model, Path(scratch) / "out", calibration=calibration)
        seconds = time.perf_counter() - begin
    return {"noise": found.noise, "random": random[0], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("valid", type=Path, help="WikiText-2's validation text")
    options = parser.parse_args()
    keep_freed_memory()
    CACHE.mkdir(exist_ok=True)
    text = CACHE / "wikitext-2-valid.txt"
    text.write_text(options.valid.read_text())
    model, found = sample_model(), {}
    for widest in WIDTHS:
        found[widest] = measure(model, Calibration(source=str(text), samples=32), widest)
        print(widest, found[widest], flush=True)
    save("rotation", {"channels": found})


if __name__ == "__main__":
    main()
