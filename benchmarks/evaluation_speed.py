"""Tokens per second of perplexity on windows of 2,048 tokens: Octavo in FP8 and BF16, plain transformers.

Plain transformers is its model in BF16, one window at a time on all cores, and the cross entropy of
its logits. All take turns on the same windows in one process; perplexities are printed beside.

Usage: python -m benchmarks.evaluation_speed TEXT [--rounds 3] [--windows 4]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common import CACHE, median, sample_model, save
from octavo import Calibration, quantize
from octavo.allocator import keep_freed_memory
from octavo.engines.transformers import start
from octavo.evaluation import load_tokens, perplexity

_SEQ_LEN = 2048


def plain(model: Any, tokens: Tensor, windows: int) -> float:
    """Perplexity as Hugging Face's guide computes it."""
    losses = []
    with torch.inference_mode():
        for row in tokens[: windows * _SEQ_LEN].view(windows, 1, _SEQ_LEN):
            losses.append(model(row, labels=row).loss.float())
    return torch.stack(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    keep_freed_memory()
    model = sample_model()
    tokens = load_tokens(options.text, model)
    auto: Any = AutoModelForCausalLM
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        edition = Path(scratch) / "edition"
        quantize(model, edition, calibration=Calibration(samples=16))
        reference = auto.from_pretrained(model, dtype="auto").eval()
        bf16, fp8 = start(model, "cpu"), start(edition, "cpu")
        runs: dict[str, Callable[[int], float]] = {
            "transformers, BF16": lambda windows: plain(reference, tokens, windows),
            "octavo, BF16": lambda windows: perplexity(bf16, tokens, limit=windows).perplexity,
            "octavo, FP8": lambda windows: perplexity(fp8, tokens, limit=windows).perplexity,
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        perplexities = {name: run(2) for name, run in runs.items()}  # warm up
        for number in range(options.rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                perplexities[name] = run(options.windows)
                seconds = time.perf_counter() - begin
                rates[name].append(options.windows * (_SEQ_LEN - 1) / seconds)
                print(f"round {number + 1}: {name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    baseline = rates["transformers, BF16"]
    ratios = {
        name: round(median([a / b for a, b in zip(values, baseline, strict=True)]), 3)
        for name, values in rates.items()
    }
    for name, values in rates.items():
        print(
            f"{name:20} {median(values):8,.0f} tokens/s, {ratios[name]:.2f} x, "
            f"perplexity {perplexities[name]:.3f}"
        )
    path = save(
        "evaluation_speed",
        {
            "model": "SmolLM2-135M-Instruct",
            "windows": options.windows,
            "seq_len": _SEQ_LEN,
            "tokens_per_second": {name: [round(v, 1) for v in rates[name]] for name in rates},
            "over_transformers": ratios,
            "perplexity": {name: round(value, 4) for name, value in perplexities.items()},
        },
    )
    print(f"saved {path.name}")


if __name__ == "__main__":
    main()
