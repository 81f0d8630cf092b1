"""Tiny models of every family and scheme that the embedded engine computes, and what its decoders make of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import reference
import tiny
from octavo import Calibration, Scheme, quantize
from octavo.engines import open_engine
from octavo.engines.torch.batch import BLOCK, Batch, Model
from octavo.scheme import scheme_called

# Sizes that no two vectors, strips or groups are whole multiples of.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"vocab_size": 257}),
    "llama3": (
        "llama",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 136}),
    "mistral": (
        "mistral",
        {"sliding_window": 9, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "qwen2": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
}
SCHEMES = {
    "bf16": None,
    "fp8": Scheme(),
    "fp8-kept": Scheme(exclude=("*.k_proj", "model.layers.1.mlp.*"), kv_cache="none"),
    "fp8-mixed": Scheme(dynamic=("*.down_proj", "*.0.self_attn.[qkv]_proj"), kv_cache="none"),
    "fp8-dynamic": scheme_called("fp8-dynamic"),
    "fp8-block": scheme_called("fp8-block"),
    "fp8-channel-static": scheme_called("fp8-channel-static"),
}


def tokens(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.VOCAB_SIZE, (count,), generator=generator)


def checkpoints(root: Path) -> Callable[[str, str], Path]:
    """Gives a model in a scheme, made below ``root`` when it is first asked for."""
    ids = tiny.save_ids(root / "ids.npy", samples=8, seq_len=32)

    def get(model: str, scheme: str) -> Path:
        source = root / model
        if not source.exists():
            kind, options = MODELS[model]
            tiny.build(kind, source, **options)
        edition = root / f"{model}-{scheme}"
        if SCHEMES[scheme] is None:
            return source
        if not edition.exists():
            quantize(
                source,
                edition,
                scheme=SCHEMES[scheme],
                calibration=Calibration(source=str(ids)),
                format="modelopt" if scheme in ("fp8", "fp8-kept") else "compressed-tensors",
            )
        return edition

    return get


def one_sequence(ids: Tensor, begin: int, table: Tensor) -> Batch:
    """The tokens of a sequence from position ``begin`` on, all wanted."""
    count = len(ids)
    starts = torch.tensor([0, count])
    return Batch(ids, begin + torch.arange(count), starts, table[None], torch.arange(count))


@torch.inference_mode()
def log_probabilities(
    decoder: Model, ids: Tensor, chunk: int, *, table: Tensor | None = None
) -> Tensor:
    """Of every next token ``[tokens, vocab]``, computed ``chunk`` tokens at a time."""
    cache = decoder.new_cache(32)
    table = torch.arange(-(-len(ids) // BLOCK)) if table is None else table
    logits = []
    for begin in range(0, len(ids), chunk):
        batch = one_sequence(ids[begin : begin + chunk], begin, table)
        logits.append(decoder.logits(decoder.forward(batch, cache)))
    return torch.log_softmax(torch.cat(logits).float(), dim=-1)


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.inference_mode()
def exact(source: Path, edition: Path, ids: Tensor) -> Tensor:
    """Log-probabilities of the edition as its format means them, in float32 by ``transformers``."""
    tensors = {} if source == edition else load_file(edition / "model.safetensors")
    model = reference.fake_quantized(source, tensors)
    logits = model(ids[None]).logits[0]
    result: Tensor = torch.log_softmax(logits, dim=-1)
    return result


def by_transformers(path: Path, ids: Tensor) -> Tensor:
    """Log-probabilities by the engine on ``transformers``."""
    with closing(open_engine("transformers", path, "cpu")) as opened:
        engine: Any = opened
        with engine.computing(), torch.inference_mode():
            logits = torch.cat(list(engine.logits(engine.hidden(ids)))).float()
    return torch.log_softmax(logits, dim=-1)
