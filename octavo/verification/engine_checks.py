"""Checks of an edition in an engine."""

from __future__ import annotations

import math
from collections.abc import Iterator

from octavo.engines.vllm_loaded import LoadedLinear
from octavo.inspection import Check, Fault, Severity
from octavo.inspection.tables import Linear
from octavo.verification.running import Ran

# What vLLM makes of the checkpoint's linear layers that read the same input.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}

_UNQUANTIZED = ("bfloat16", "float16", "float32")

# vLLM holds the scales of keys and values in the model's dtype: within BF16's rounding they agree.
_BF16 = 2**-8

# Nats per token from the reference. FP8 costs 0.01 to 0.1 of them; a lost scale costs several.
_OFF, _WRONG = 0.15, 0.5


def _refused(ran: Ran) -> Iterator[Fault]:
    if ran.refusal is not None:
        yield Fault(ran.engine, ran.refusal)


def _not_finite(ran: Ran) -> Iterator[Fault]:
    if ran.scores is not None and ran.scores.nll is None:
        yield Fault(ran.scores.engine, "log-probabilities of a text that are NaN or infinite")


def _apart(ran: Ran, low: float, high: float) -> Iterator[Fault]:
    """A text whose tokens cost ``low`` to ``high`` nats more, or less, than they cost the reference."""
    scores = ran.scores
    if scores is None or scores.nll is None or scores.reference_nll is None:
        return
    if low < abs(scores.nll - scores.reference_nll) <= high:
        yield Fault(
            scores.engine,
            f"{scores.nll:.3f} nats per token on {scores.tokens} tokens, the reference {scores.reference_nll:.3f}",
        )


def _chance(ran: Ran) -> Iterator[Fault]:
    scores = ran.scores
    if scores is None or scores.nll is None or scores.reference_nll is not None:
        return
    if scores.text == "builtin" and scores.nll > scores.chance:
        yield Fault(
            scores.engine,
            f"{scores.nll:.2f} nats per token of English text, guessing costs {scores.chance:.2f}",
        )


def _pairs(ran: Ran) -> Iterator[tuple[Linear, LoadedLinear]]:
    """The checkpoint's linear layers, each with what it became in the engine."""
    layers = {layer.name: layer for layer in ran.loaded.linears} if ran.loaded else {}
    for linear in ran.inspection.linears:
        parent, _, last = linear.module.rpartition(".")
        name = f"{parent}.{_FUSED.get(last, last)}"
        if name in layers:
            yield linear, layers[name]


def _weights_not_taken(ran: Ran) -> Iterator[Fault]:
    for linear, layer in _pairs(ran):
        # Some kernels repack FP8 weights as integers.
        if (linear.dtype in _UNQUANTIZED) != (layer.weight_dtype in _UNQUANTIZED):
            dtypes = f"{linear.dtype} in the checkpoint, {layer.weight_dtype} in vLLM"
            yield Fault(linear.module, f"{dtypes} ({layer.method})")


def _inputs_not_rounded(ran: Ran) -> Iterator[Fault]:
    for layer in ran.loaded.linears if ran.loaded else ():
        if layer.weight_dtype == "float8_e4m3fn" and not layer.rounds_inputs:
            yield Fault(layer.name, f"inputs that are not rounded to FP8 ({layer.kernel})")


def _inputs_scaled_otherwise(ran: Ran) -> Iterator[Fault]:
    scheme = ran.inspection.scheme
    for linear, layer in _pairs(ran):
        if scheme is None or linear.dtype in _UNQUANTIZED or layer.weight_dtype in _UNQUANTIZED:
            continue
        promised = scheme.inputs_of(linear.module)
        found = "static" if layer.static_inputs else "dynamic"
        if promised != found:
            yield Fault(linear.module, f"{promised} inputs in the checkpoint, {found} in vLLM")


def _cache_not_taken(ran: Ran) -> Iterator[Fault]:
    scheme = ran.inspection.scheme
    if ran.loaded is None or scheme is None or scheme.kv_cache != "fp8":
        return
    for cache in ran.loaded.caches:
        if not cache.dtype.startswith("fp8"):
            yield Fault(cache.block, f"a KV cache of the kind {cache.dtype!r}, the model's dtype")


def _cache_scales_differ(ran: Ran) -> Iterator[Fault]:
    for cache in ran.loaded.caches if ran.loaded else ():
        if not cache.dtype.startswith("fp8"):
            continue
        for kind, value in (("k_scale", cache.k_scale), ("v_scale", cache.v_scale)):
            stored = ran.kv_scales.get(f"{cache.block}.{kind}", 1.0)
            if not math.isclose(value, stored, rel_tol=_BF16):
                yield Fault(f"{cache.block}.{kind}", f"{value:.4g} in vLLM, {stored:.4g} stored")


_SEE_OTHERS = "See the other findings; without any, compare perplexities with `octavo eval`."

CHECKS: tuple[Check[Ran], ...] = (
    Check(
        "engine-refuses",
        Severity.error,
        _refused,
        "An engine that loads the checkpoint and scores a text.",
        "See what it says, and the other findings.",
    ),
    Check(
        "scores-not-finite",
        Severity.error,
        _not_finite,
        "Finite log-probabilities.",
        "NaN or a scale of zero is in the weights, or activations overflow. " + _SEE_OTHERS,
    ),
    Check(
        "scores-wrong",
        Severity.error,
        lambda ran: _apart(ran, _WRONG, math.inf),
        f"At most {_OFF:g} nats per token from the reference; FP8 costs 0.01 to 0.1.",
        _SEE_OTHERS,
    ),
    Check(
        "scores-off",
        Severity.warning,
        lambda ran: _apart(ran, _OFF, _WRONG),
        f"At most {_OFF:g} nats per token from the reference; FP8 costs 0.01 to 0.1.",
        _SEE_OTHERS,
    ),
    Check(
        "scores-chance",
        Severity.warning,
        _chance,
        "A model that predicts text better than chance.",
        "The model is untrained, or its weights are not what they were: pass --reference.",
    ),
    Check(
        "engine-weights",
        Severity.warning,
        _weights_not_taken,
        "FP8 weights in the engine where the checkpoint has them, and nowhere else.",
        "The engine dequantized or quantized them as it loaded: memory and numbers are not the edition's.",
    ),
    Check(
        "engine-inputs",
        Severity.note,
        _inputs_not_rounded,
        "Products of FP8 weights and FP8 inputs.",
        "This device has no FP8 arithmetic that vLLM uses: memory is saved, time is not.",
    ),
    Check(
        "engine-input-scales",
        Severity.warning,
        _inputs_scaled_otherwise,
        "Static inputs where the checkpoint has scales for them, and dynamic ones elsewhere.",
        "vLLM reads the config of this dialect in another way: convert the edition to another one (`octavo convert`).",
    ),
    Check(
        "engine-kv-cache",
        Severity.warning,
        _cache_not_taken,
        "An FP8 KV cache, as the checkpoint promises.",
        "vLLM does not take it from this dialect's config, and says nothing. Pass it --kv-cache-dtype fp8, as "
        "`octavo serve` does.",
    ),
    Check(
        "engine-kv-scales",
        Severity.warning,
        _cache_scales_differ,
        "The stored scales of keys and values.",
        "vLLM did not find them under the names it looks for: convert the edition to another dialect "
        "(`octavo convert`).",
    ),
)
