"""SmolLM2-135M-Instruct in every dialect that vLLM reads: what vLLM takes of it, and what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.engines.vllm import start
from octavo.engines.vllm_loaded import LoadedModel
from real_vllm.conftest import MIXED, SEQ_LEN, WINDOWS, Editions, Expected, Sharing, cost

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# Without compiling the model, with room for a window, and with one process less (see conftest.py): a third
# of the time to start.
QUICK = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 1024,
    "distributed_executor_backend": "mp",
}

# vLLM's kernel for static scales on a CPU with AMX leaves inputs in BF16. Without it, it computes as on
# any other CPU.
WITHOUT_AMX = {"VLLM_DISABLED_KERNELS": "CPUFp8PerTensorScaledMMLinearKernel"}

# As vLLM is without a word from the user.
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

LAYERS = 30


class Case(NamedTuple):
    """An edition, how vLLM is started, and what it takes.

    Attributes:
        dialect: a key of ``octavo.formats.FORMATS``.
        kind: a key of ``octavo.scheme.KINDS``, and perhaps ``MIXED`` behind it.
        method: the class of vLLM's that loads linear layers.
        merged: whether layers that vLLM fuses share a weight scale; without, it rounds them again.
        promised: the kind of KV cache the edition has scales for.
        taken: the kind vLLM keeps.
        sharing: which tokens share a scale where vLLM scales inputs as they come.
        options: of ``vllm.LLM``.
        environment: of its processes.
        tolerance: of the perplexity; wider where the arithmetic is the engine's own.
    """

    dialect: str
    kind: str
    method: str
    merged: bool = False
    promised: str = "none"
    taken: str = "none"
    sharing: Sharing = "token"
    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = WITHOUT_AMX
    tolerance: float = 0.01


FP8_CACHE: Mapping[str, Any] = {"promised": "fp8", "taken": "fp8"}
# Neither Quark's config nor vLLM's own makes vLLM keep the cache in FP8: it has to be told.
TOLD: Mapping[str, Any] = {**FP8_CACHE, "options": {"kv_cache_dtype": "fp8"}}

ONE_WINDOW = {"max_num_seqs": 1}

MODELOPT, QUARK = "ModelOptLinearMethod", "QuarkLinearMethod"
COMPRESSED, FP8 = "CompressedTensorsLinearMethod", "Fp8LinearMethod"
CASES = {
    # As `octavo quantize` writes it, and with the kernel that vLLM chooses.
    "modelopt": Case("modelopt", "fp8", MODELOPT, environment={}, tolerance=0.04, **FP8_CACHE),
    "modelopt-dynamic": Case("modelopt", "fp8-dynamic", MODELOPT),
    "quark": Case("quark", "fp8", QUARK, merged=True, promised="fp8", taken="none"),
    "quark-told": Case("quark", "fp8", QUARK, merged=True, **TOLD),
    "quark-dynamic": Case("quark", "fp8-dynamic", QUARK),
    "compressed-tensors": Case("compressed-tensors", "fp8", COMPRESSED, merged=True, **FP8_CACHE),
    "quark-mixed-told": Case("quark", f"fp8{MIXED}", QUARK, merged=True, **TOLD),
    "compressed-tensors-mixed": Case(
        "compressed-tensors", f"fp8{MIXED}", COMPRESSED, merged=True, **FP8_CACHE
    ),
    "compressed-tensors-dynamic": Case("compressed-tensors", "fp8-dynamic", COMPRESSED),
    "vllm-fp8-told": Case("vllm-fp8", "fp8", FP8, merged=True, **TOLD),
    # The same codes twice. In its own dialect vLLM takes one input scale for all tokens of a step where it
    # has no CUTLASS (`Fp8LinearMethod`); here a step is a window.
    "compressed-tensors-tensor-dynamic": Case(
        "compressed-tensors", "fp8-tensor-dynamic", COMPRESSED, merged=True
    ),
    "vllm-fp8-dynamic": Case(
        "vllm-fp8", "fp8-tensor-dynamic", FP8, merged=True, sharing="step", options=ONE_WINDOW
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_vllm_takes_it(
    case: Case,
    editions: Editions,
    expected: Expected,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    edition = editions(case.dialect, case.kind, case.promised, case.merged)
    with closing(start(edition, "auto", **QUICK, **case.options)) as engine:
        check_linears(engine.loaded(), case)
        check_inputs(engine.loaded(), edition)
        check_caches(engine.loaded(), case, edition)
        found = cost(engine, tokens)
    ours = expected(case.kind, case.taken, case.merged, case.sharing)
    assert found == pytest.approx(ours, rel=case.tolerance)


def test_one_scale_for_a_step_costs_little(expected: Expected) -> None:
    """How far vLLM's arithmetic for its own dialect is from what Octavo does with the same edition."""
    of_token = expected("fp8-tensor-dynamic", "none", True, "token")
    of_step = expected("fp8-tensor-dynamic", "none", True, "step")
    assert of_step == pytest.approx(of_token, rel=0.02)


def check_linears(loaded: LoadedModel, case: Case) -> None:
    """FP8 weights throughout, and inputs rounded to FP8, but by the one kernel."""
    rounded = case.environment == WITHOUT_AMX or not torch.cpu._is_amx_tile_supported()
    # q, k and v are one layer in vLLM, gate and up another.
    assert len(loaded.linears) == 4 * LAYERS
    for layer in loaded.linears:
        assert layer.weight_dtype == "float8_e4m3fn", layer
        assert layer.method == case.method, layer
        assert layer.rounds_inputs is rounded, layer


def check_inputs(loaded: LoadedModel, edition: Path) -> None:
    """Static where the checkpoint has a scale for them, and dynamic elsewhere."""
    stored = Edition(Checkpoint(edition))
    first = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
    for layer in loaded.linears:
        parent, _, last = layer.name.rpartition(".")
        scale = f"{parent}.{first.get(last, last)}.input_scale"
        assert layer.static_inputs is (scale in stored), layer


def check_caches(loaded: LoadedModel, case: Case, edition: Path) -> None:
    """The checkpoint's scales, or none at all."""
    assert len(loaded.caches) == LAYERS
    stored = Edition(Checkpoint(edition))
    for cache in loaded.caches:
        assert cache.dtype.startswith("fp8") is (case.taken == "fp8"), cache
        for name, value in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            if case.taken == "none":
                assert value == 1, cache
            else:
                # vLLM keeps most dialects' in the model's dtype.
                scale = stored.read(f"{cache.block}.{name}")
                assert value in (scale.item(), scale.bfloat16().item()), cache


def test_the_command_line(
    editions: Editions, expected: Expected, tokens: Tensor, tmp_path: Path
) -> None:
    """As a user starts it: in processes of its own, and compiled, the plugin's operators too."""
    text = tmp_path / "tokens.npy"
    np.save(text, tokens.numpy())
    options = f"--engine vllm --task perplexity --seq-len {SEQ_LEN} --limit {WINDOWS} --json"
    paths = (str(editions("modelopt", "fp8", "fp8", False)), "--data", str(text))
    ran = subprocess.run(
        [sys.executable, "-m", "octavo.cli", "eval", *paths, *options.split()],
        env={**os.environ, **WITHOUT_AMX, **PROCESSES, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)["perplexity"]
    assert found == pytest.approx(expected("fp8", "fp8", False, "token"), rel=0.04)
