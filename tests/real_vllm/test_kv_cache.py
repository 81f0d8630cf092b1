"""What vLLM's kernels for CPUs do to keys and values in an FP8 cache, one kernel at a time."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cutting_off import cut_off
from octavo import fp8

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

# vLLM's block, and a shape like SmolLM2's: tokens, query heads, key/value heads, head size.
BLOCK, TOKENS, QUERIES, HEADS, SIZE = 128, 1024, 3, 1, 64

AMX, PLAIN = "amx", "vec"
ON_AMX = pytest.param(
    AMX,
    marks=pytest.mark.skipif(
        not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX, whose kernel this is"
    ),
)


@pytest.fixture(scope="module")
def ops() -> Any:
    """vLLM's operators, in this process."""
    # A process has to ask for AMX.
    torch.cpu._init_amx()
    import_module("vllm.platforms").current_platform.import_kernels()
    return import_module("vllm._custom_ops")


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value, ``[tokens, heads, size]``, the largest key and value 21 and 4.5 or so."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, 1.0), (HEADS, 5.0), (HEADS, 1.0))
    query, key, value = (
        (torch.randn(TOKENS, heads, SIZE, generator=generator) * size).bfloat16()
        for heads, size in shapes
    )
    return query, key, value


def stored(ops: Any, key: Tensor, value: Tensor, isa: str, **scales: float) -> Tensor:
    """The cache, uint8 ``[blocks, heads, 2 · block, size]``: keys, then values, laid out as the kernel likes."""
    cache = torch.zeros(TOKENS // BLOCK, HEADS, 2 * BLOCK, SIZE, dtype=torch.uint8)
    keys, values = cache.chunk(2, dim=2)
    slots = torch.arange(TOKENS)
    ops.cpu_attn_reshape_and_cache(
        key, value, keys, values, slots, isa, **scales, kv_cache_dtype="fp8"
    )
    return cache


def attention(ops: Any, query: Tensor, cache: Tensor, isa: str, **scales: float) -> Tensor:
    """Of all tokens over the cache, causal."""
    begins, lengths = torch.tensor([0, TOKENS]).int(), torch.tensor([TOKENS]).int()
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=QUERIES,
        num_kv_heads=HEADS,
        head_dim=SIZE,
        seq_lens=lengths,
        dtype=query.dtype,
        query_start_loc=begins,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=False,
        kv_cache_dtype="fp8",
    )
    keys, values = cache.chunk(2, dim=2)
    output = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=keys,
        value_cache=values,
        output=output,
        query_start_loc=begins,
        seq_lens=lengths,
        scale=SIZE**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.arange(len(cache)).int()[None],
        softcap=0,
        scheduler_metadata=schedule,
        s_aux=None,
        **scales,
        kv_cache_dtype="fp8",
    )
    return output


def error(ops: Any, inputs: tuple[Tensor, Tensor, Tensor], isa: str, factor: float) -> float:
    """How far vLLM's attention is from attention on the very numbers the cache holds, relative, with scales
    that are calibrated but for ``factor``."""
    query, key, value = inputs
    scales = [fp8.scale_from_amax(fp8.amax(one)) * factor for one in (key, value)]
    names = {"k_scale": scales[0].item(), "v_scale": scales[1].item()}
    found = attention(ops, query, stored(ops, key, value, isa, **names), isa, **names)
    held = (query, cut_off(key, scales[0]), cut_off(value, scales[1]))
    q, k, v = (one.double().transpose(0, 1) for one in held)
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", [ON_AMX, PLAIN])
def test_keys_and_values_are_cut_off(
    ops: Any, inputs: tuple[Tensor, Tensor, Tensor], isa: str
) -> None:
    """Towards zero, not to the nearest: the docs say so, and what it costs."""
    _, key, value = inputs
    cache = stored(ops, key, value, isa, k_scale=0.04, v_scale=0.01)
    for held, values, scale in zip(cache.chunk(2, dim=2), (key, value), (0.04, 0.01), strict=True):
        expected = cut_off(values, torch.tensor(scale)) / scale
        codes = expected.to(torch.float8_e4m3fn).view(torch.uint8)
        # Block by block: each kernel has an order of its own within one.
        pairs = (one.reshape(TOKENS // BLOCK, -1).sort().values for one in (held, codes))
        assert torch.equal(*pairs)


@pytest.mark.parametrize("isa", [ON_AMX, PLAIN])
def test_nothing_else_is_rounded(ops: Any, inputs: tuple[Tensor, Tensor, Tensor], isa: str) -> None:
    """Neither queries nor probabilities: what is left is the rounding of BF16."""
    assert error(ops, inputs, isa, 1.0) < 0.003


@pytest.mark.parametrize("isa", [ON_AMX])
def test_small_codes_are_lost_on_amx(
    ops: Any, inputs: tuple[Tensor, Tensor, Tensor], isa: str
) -> None:
    """It computes with codes times 2⁻¹²⁰, and takes what is below 2⁻¹²⁶ for zero."""
    factor = 100.0  # as a scale of 1 has, for the largest value 4.5
    assert error(ops, inputs, isa, factor) > 5 * error(ops, inputs, PLAIN, factor)
    assert error(ops, inputs, PLAIN, factor) < 0.003
