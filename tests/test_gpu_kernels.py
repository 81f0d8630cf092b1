"""The GPU path's kernels: as Triton's interpreter runs them, against their references; and compiled for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

ROOT = Path(__file__).resolve().parents[1]

# Each kernel for cards of compute capability 9.0, as a model with heads of 128 channels has them.
COMPILING = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from octavo.engines.torch.gpu import kernels

BF16, CODES, FLOATS, INTS = "*bf16", "*fp8e4nv", "*fp32", "*i64"
POINTERS = {
    **dict.fromkeys("x hidden update weight gate up queries keys values cos sin".split(), BF16),
    **dict.fromkeys("tables sequences positions".split(), INTS),
    **dict.fromkeys("scale partial maxima sums".split(), FLOATS),
    **dict.fromkeys("eps factor key_scale value_scale".split(), "fp32"),
    **dict.fromkeys("stored_keys stored_values".split(), CODES),
}
CONSTANTS = {
    "adds": True, "quantizes": True, "limit": 448.0, "width": 128, "size": 128, "block": 16,
    "group": 4, "rows": 16, "tile": 64, "splits": 16, "operand": tl.bfloat16,
}
for name in "_quantize _add_rms_norm _silu_mul _rotate_and_store _attend _combine".split():
    kernel = getattr(kernels, name)
    out = BF16 if name in ("_rotate_and_store", "_combine") else CODES
    known = {**POINTERS, "out": out}
    arguments = [one.name for one in kernel.params]
    signature = {
        one: "constexpr" if one in CONSTANTS else known.get(one, "i32") for one in arguments
    }
    constants = {
        (place,): CONSTANTS[one] for place, one in enumerate(arguments) if one in CONSTANTS
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
    print(name)
"""

# Tiny models on a CPU, computed with the kernels as Triton's interpreter runs them, and without.
DECODING = """
import torch
from benchmarks import gpu_engine, random_models
from octavo.engines.torch.gpu import decoder, kernels
from octavo.shapes import shape_called

small = {**gpu_engine.SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
for shape, quantized in (("llama-3.1-8b", True), ("qwen3-0.6b", False)):
    config = {**shape_called(shape), **small, "head_dim": 16}
    network = random_models.random_network(config, torch.device("cpu"), quantized=quantized)
    model = decoder.GpuDecoder(network)
    expected = gpu_engine.log_probabilities(model, 5, 2)
    model._kernels = kernels
    difference = (gpu_engine.log_probabilities(model, 5, 2) - expected).abs().max()
    assert difference < 0.01, difference
    print(shape, quantized, difference.item())
"""


def run(*arguments: str, **environment: str) -> str:
    """What a Python program prints, in a process of its own: Triton is told at its import what to do."""
    ran = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_against_their_references() -> None:
    printed = run("-m", "benchmarks.gpu_kernels", "--device", "cpu", TRITON_INTERPRET="1")
    assert len(printed.splitlines()) == 5


def test_a_decoder_of_them() -> None:
    assert len(run("-c", DECODING, TRITON_INTERPRET="1").splitlines()) == 2


def test_compiled(tmp_path: Path) -> None:
    printed = run("-c", COMPILING, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(printed.splitlines()) == 6
