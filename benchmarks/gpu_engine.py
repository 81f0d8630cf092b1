"""The embedded engine on a GPU: its kernels checked, then FP8 against BF16, and a model that fits as FP8 only.

Each part is a run of its own, of less than ten minutes on a large card:

- kernels: against their references on the card; a small random model against the same one on the CPU.
- 8b: random weights in the shape of Llama 3.1 8B, BF16 and FP8: output tokens/s by concurrency and lengths; decode
  beside the memory bandwidth, and prefill beside the rate of matrix products, both measured in the same run.
- 70b: the shape of Llama 3.1 70B in FP8.

Results go to docs/benchmarks/gpu_engine.json, part by part. Without a GPU it says so, and measures nothing.

Usage: python -m benchmarks.gpu_engine [--part kernels|8b|70b]
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import gpu_kernels
from benchmarks.common import RESULTS, ROOT, median, save
from benchmarks.gpu import seconds_of
from benchmarks.random_models import random_network
from octavo import fp8
from octavo.engines.torch.batch import BLOCK, Batch
from octavo.engines.torch.gpu.decoder import GpuDecoder
from octavo.engines.torch.gpu.network import Network
from octavo.engines.torch.request import Request, Sampling
from octavo.engines.torch.scheduler import Scheduler
from octavo.shapes import shape_called

_CONCURRENCY = (1, 32, 256)
_LENGTHS = ((128, 128), (2048, 128))
_BATCH_TOKENS = 8192
_ROUNDS = 3
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
}


class Load(NamedTuple):
    """So many requests at once.

    Attributes:
        concurrency: how many.
        prompt: tokens of each.
        output: tokens asked for.
    """

    concurrency: int
    prompt: int
    output: int


class Answered(NamedTuple):
    """How a load was answered.

    Attributes:
        seconds: from the first batch to the last.
        step: median seconds of a batch that had a token of every sequence and nothing else.
    """

    seconds: float
    step: float


def answer(scheduler: Scheduler, load: Load, prompts: Tensor) -> Answered:
    """Have a load of prompts ``[concurrency, prompt]`` answered."""
    for prompt in prompts.tolist():
        scheduler.add(Request(prompt, load.output, Sampling(temperature=0.0)))
    begin, steps = time.perf_counter(), []
    while scheduler.busy:
        decoding = len(scheduler.running) == load.concurrency and all(
            sequence.left == 1 for sequence in scheduler.running
        )
        before = time.perf_counter()
        # The tokens are on the CPU when it is done: the GPU has been waited for.
        for _, output in scheduler.step():
            if isinstance(output, Exception):
                raise output
        if decoding:
            steps.append(time.perf_counter() - before)
    return Answered(time.perf_counter() - begin, median(steps))


def measure(model: Any, load: Load, rounds: int) -> dict[str, Any]:
    """Output tokens/s: the median of some rounds, after one that compiles and captures."""
    needed = -(-(load.prompt + load.output) // BLOCK) + 1
    scheduler = Scheduler(
        model,
        blocks=load.concurrency * needed,
        max_running=load.concurrency,
        max_tokens=_BATCH_TOKENS,
    )
    # No two rounds begin alike: nothing is found in the cache.
    sizes = (rounds + 1, load.concurrency, load.prompt)
    prompts = torch.randint(
        model.vocab_size, sizes, generator=torch.Generator().manual_seed(load.concurrency)
    )
    _, *answers = [answer(scheduler, load, one) for one in prompts]
    count = load.concurrency * load.output
    return {
        **load._asdict(),
        "tokens_s": count / median([one.seconds for one in answers]),
        "all_tokens_s": [count / one.seconds for one in answers],
        "decode_step_seconds": median([one.step for one in answers]),
    }


def step_bytes(network: Network) -> int:
    """What a step of one token has to read of weights: all but the embedding, and the head."""
    layers = sum(
        tensor.nbytes
        for layer in network.layers
        for linears in (layer.qkv, layer.out, layer.gate_up, layer.down)
        for tensor in linears.weights
    )
    return layers + network.head.nbytes


def prefill(model: GpuDecoder, network: Network) -> dict[str, float]:
    """Seconds and TFLOP/s of linear layers in a batch of whole prompts of 2048 tokens."""
    count = _BATCH_TOKENS // 2048
    cache = model.new_cache(_BATCH_TOKENS // BLOCK)
    batch = Batch(
        tokens=torch.randint(model.vocab_size, (_BATCH_TOKENS,)),
        positions=torch.arange(2048).repeat(count),
        starts=torch.arange(count + 1) * 2048,
        tables=torch.arange(_BATCH_TOKENS // BLOCK).view(count, -1),
        wanted=torch.arange(1, count + 1) * 2048 - 1,
    )
    seconds = seconds_of(lambda: model.forward(batch, cache))
    weights = sum(
        tensor.numel()
        for layer in network.layers
        for linears in (layer.qkv, layer.out, layer.gate_up, layer.down)
        for tensor in linears.weights
    )
    return {
        "tokens_s": _BATCH_TOKENS / seconds,
        "tflop_s": 2 * weights * _BATCH_TOKENS / seconds / 1e12,
    }


def peaks() -> dict[str, float]:
    """What the card does at best: GB/s read, TFLOP/s of BF16 and FP8 products of random numbers."""
    numbers = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    read = numbers.nbytes / seconds_of(numbers.amax) / 1e9
    copy = 2 * numbers.nbytes / seconds_of(numbers.clone) / 1e9
    width = 8192
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    codes = a.to(fp8.E4M3), b.to(fp8.E4M3).t()
    one = torch.ones((), device="cuda")
    wide = seconds_of(lambda: a @ b)
    narrow = seconds_of(
        lambda: torch._scaled_mm(*codes, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    )
    flops = 2 * width**3 / 1e12
    return {
        "bandwidth_gb_s": max(read, copy),
        "bf16_tflop_s": flops / wide,
        "fp8_tflop_s": flops / narrow,
    }


def check() -> dict[str, Any]:
    """Kernels against references, and a small model against the same one on the CPU.

    Raises:
        AssertionError: they differ.
    """
    steps = gpu_kernels.check(torch.device("cuda"))
    print(", ".join(f"{name} {value:.2f}" for name, value in steps.items()), flush=True)
    divergences = {}
    for quantized in (False, True):
        config = {**shape_called("llama-3.1-8b"), **SMALL}
        network = random_network(config, torch.device("cpu"), quantized=quantized)
        expected = log_probabilities(GpuDecoder(network))
        found = log_probabilities(GpuDecoder(moved(network, torch.device("cuda")))).cpu()
        value = (expected.exp() * (expected - found)).sum(-1).mean().item()
        divergences["fp8" if quantized else "bf16"] = value
        assert value < 1e-2, f"the model on the card is {value:.4f} nats from that on the CPU"
    print(f"divergence of a small model: {divergences}", flush=True)
    return {"steps_from_reference": steps, "divergence": divergences}


def log_probabilities(model: GpuDecoder, prompt: int = 100, more: int = 20) -> Tensor:
    """Of the tokens behind prompts of three sequences, computed at once, and then of more, one by one."""
    length = prompt + more
    sizes = (3, length)
    tokens = torch.randint(model.vocab_size, sizes, generator=torch.Generator().manual_seed(0))
    blocks = -(-length // BLOCK)
    cache, tables = model.new_cache(3 * blocks), torch.randperm(3 * blocks).view(3, blocks)
    found = []
    for begin, end in ((0, prompt), *((at, at + 1) for at in range(prompt, length))):
        count = end - begin
        batch = Batch(
            tokens=tokens[:, begin:end].flatten(),
            positions=torch.arange(begin, end).repeat(3),
            starts=torch.arange(4) * count,
            tables=tables,
            wanted=torch.arange(3 * count),
        )
        found.append(model.logits(model.forward(batch, cache)).float())
    return torch.log_softmax(torch.cat(found), dim=-1)


def moved(value: Any, device: torch.device) -> Any:
    """A network, or part of one, on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(one, device) for one in value))
    if isinstance(value, tuple | list):
        return type(value)(moved(one, device) for one in value)
    return value


def compare() -> dict[str, Any]:
    """FP8 beside BF16 in the 8B shape."""
    limits = peaks()
    print(", ".join(f"{name} {value:,.0f}" for name, value in limits.items()), flush=True)
    runs: dict[str, Any] = {}
    for name in ("bf16", "fp8"):
        runs[name] = _whole("llama-3.1-8b", name, _CONCURRENCY, _ROUNDS, limits)
    pairs = list(zip(runs["bf16"]["points"], runs["fp8"]["points"], strict=True))
    ratios = [fast["tokens_s"] / slow["tokens_s"] for slow, fast in pairs]
    best = max(range(len(pairs)), key=lambda at: pairs[at][1]["tokens_s"])
    for (slow, fast), ratio in zip(pairs, ratios, strict=True):
        print(
            f"{fast['concurrency']} x {fast['prompt']}/{fast['output']}: BF16 {slow['tokens_s']:,.1f}, "
            f"FP8 {fast['tokens_s']:,.1f} tokens/s, {ratio:.2f} x",
            flush=True,
        )
    print(f"at the best point: {ratios[best]:.2f} x", flush=True)
    return {"peaks": limits, "runs": runs, "ratios": ratios, "ratio_at_best": ratios[best]}


def largest() -> dict[str, Any]:
    """The 70B shape, which fits as FP8."""
    limits = peaks()
    run = _whole("llama-3.1-70b", "fp8", (1, 32, 128), 1, limits)
    total = torch.cuda.get_device_properties(0).total_memory
    return {"peaks": limits, "run": run, "device_memory": total}


def _whole(
    shape: str, name: str, concurrency: tuple[int, ...], rounds: int, limits: dict[str, float]
) -> dict[str, Any]:
    """All that is measured of a model."""
    release()
    device = torch.device("cuda")
    network = random_network(shape_called(shape), device, quantized=name == "fp8")
    model, needed = GpuDecoder(network), step_bytes(network)
    print(f"{shape} {name}: {torch.cuda.memory_allocated() / 1e9:.1f} GB", flush=True)
    points = []
    for prompt, output in _LENGTHS:
        for count in concurrency:
            points.append(measure(model, Load(count, prompt, output), rounds))
            release()
            print(json.dumps(points[-1]), flush=True)
    share = needed / points[0]["decode_step_seconds"] / 1e9 / limits["bandwidth_gb_s"]
    through = prefill(model, network)
    of_peak = through["tflop_s"] / limits[f"{name}_tflop_s"]
    print(
        f"decode reads at {share:.0%} of the bandwidth, prefill computes at {of_peak:.0%} of the rate"
    )
    return {
        "points": points,
        "step_bytes": needed,
        "decode_share_of_bandwidth": share,
        "prefill": through,
        "prefill_share_of_rate": of_peak,
        "peak_device_memory": torch.cuda.max_memory_allocated(),
    }


def release() -> None:
    """Give memory of what is no longer used back to the card."""
    gc.collect()
    torch.cuda.empty_cache()


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"kernels": check, "8b": compare, "70b": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="by default all, one after the other")
    part = parser.parse_args().part
    if not torch.cuda.is_available():
        print("No GPU that PyTorch can use: nothing is measured.")
        return
    path = RESULTS / "gpu_engine.json"
    for name in (part,) if part else PARTS:
        known = json.loads(path.read_text()) if path.is_file() else {}
        known.pop("machine", None)
        path = save("gpu_engine", {**known, name: PARTS[name]()})
        print(f"saved {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
