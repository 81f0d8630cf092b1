"""The shapes of known models: their published ``config.json``, as data.

What every model of a family has stands once, in the family; a model adds what is its own. Left out is
only ``transformers_version``, which says what wrote the file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from octavo.errors import OctavoError


def _size(
    hidden: int, intermediate: int, *, layers: int, heads: int, kv_heads: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_ANY = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}

_LLAMA = _ANY | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}

_LLAMA_3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

_LLAMA_3_1 = _LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": _LLAMA_3_ROPE,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}

_LLAMA_3_2 = _LLAMA_3_1 | {
    "rope_scaling": _LLAMA_3_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}

_SMOLLM_2 = _LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}

_QWEN = _ANY | {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "use_sliding_window": False,
}

_QWEN_2_5 = _QWEN | {
    "architectures": ["Qwen2ForCausalLM"],
    "eos_token_id": 151643,
    "max_position_embeddings": 131072,
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}

_QWEN_3 = _QWEN | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}

SHAPES: Mapping[str, dict[str, Any]] = {
    "llama-2-70b": _LLAMA
    | _size(8192, 28672, layers=80, heads=64, kv_heads=8)
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
    "llama-3.1-8b": _LLAMA_3_1 | _size(4096, 14336, layers=32, heads=32, kv_heads=8),
    "llama-3.1-70b": _LLAMA_3_1 | _size(8192, 28672, layers=80, heads=64, kv_heads=8),
    "llama-3.1-405b": _LLAMA_3_1 | _size(16384, 53248, layers=126, heads=128, kv_heads=8),
    "llama-3.2-1b": _LLAMA_3_2
    | _size(2048, 8192, layers=16, heads=32, kv_heads=8)
    | {"head_dim": 64},
    "llama-3.2-3b": _LLAMA_3_2
    | _size(3072, 8192, layers=28, heads=24, kv_heads=8)
    | {"head_dim": 128},
    # Published as an instruction-tuned model only.
    "llama-3.3-70b": _LLAMA_3_1
    | _size(8192, 28672, layers=80, heads=64, kv_heads=8)
    | {"eos_token_id": [128001, 128008, 128009]},
    "mistral-7b-v0.3": _ANY
    | _size(4096, 14336, layers=32, heads=32, kv_heads=8)
    | {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "qwen2.5-0.5b": _QWEN_2_5
    | _size(896, 4864, layers=24, heads=14, kv_heads=2)
    | {
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "vocab_size": 151936,
    },
    "qwen2.5-7b": _QWEN_2_5
    | _size(3584, 18944, layers=28, heads=28, kv_heads=4)
    | {"max_window_layers": 28, "use_mrope": False},
    "qwen2.5-72b": _QWEN_2_5
    | _size(8192, 29568, layers=80, heads=64, kv_heads=8)
    | {"max_window_layers": 80, "rms_norm_eps": 1e-05},
    "qwen3-0.6b": _QWEN_3
    | _size(1024, 3072, layers=28, heads=16, kv_heads=8)
    | {"max_window_layers": 28, "tie_word_embeddings": True},
    "qwen3-8b": _QWEN_3
    | _size(4096, 12288, layers=36, heads=32, kv_heads=8)
    | {"max_window_layers": 36},
    "qwen3-32b": _QWEN_3
    | _size(5120, 25600, layers=64, heads=64, kv_heads=8)
    | {"max_window_layers": 64},
    "smollm2-135m": _SMOLLM_2
    | _size(576, 1536, layers=30, heads=9, kv_heads=3)
    | {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
    },
    # The instruction-tuned one; the base model differs in its token ids.
    "smollm2-1.7b": _SMOLLM_2
    | _size(2048, 8192, layers=24, heads=32, kv_heads=32)
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mlp_bias": False,
        "pad_token_id": 2,
        "rope_theta": 130000,
    },
    "tinyllama-1.1b": _LLAMA
    | _size(2048, 5632, layers=22, heads=32, kv_heads=4)
    | {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "vocab_size": 32000,
    },
}
"""For each name, in the order they are listed: the content of ``config.json``."""


def shape_called(name: str) -> dict[str, Any]:
    """The ``config.json`` of the known model ``name``, the caller's to change.

    Args:
        name: a name of :data:`SHAPES`, in any case.

    Raises:
        OctavoError: there is none of that name.
    """
    if name.lower() not in SHAPES:
        raise OctavoError(f"Unknown model {name!r}. Known shapes: {', '.join(SHAPES)}.")
    return copy.deepcopy(SHAPES[name.lower()])
