"""Small random checkpoints, tokenizers and token ids, made with the libraries that define them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

KINDS = ("llama", "mistral", "qwen2", "qwen3")
VOCAB_SIZE = 256
POSITIONS = 128


def build(
    kind: str,
    directory: Path,
    *,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    shards: int | None = None,
    **config_overrides: Any,
) -> Path:
    """Save a random model of architecture ``kind`` in ``directory``, without a tokenizer.

    Embeddings are untied and biases absent unless ``config_overrides`` say otherwise; norms and
    biases are random too, so that losing one shows. ``shards`` asks for at least that many files.
    """
    options = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        **config_overrides,
    }
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(mean=1.0, std=0.2)
            else:
                parameter.normal_(std=0.1)
    model.to(dtype)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=-(-nbytes // (shards or 1)))
    return directory


def save_ids(path: Path, *, samples: int = 4, seq_len: int = 16, seed: int = 0) -> Path:
    """Save random token ids ``[samples, seq_len]`` as ``path``, an .npy file."""
    rng = np.random.default_rng(seed)
    np.save(path, rng.integers(VOCAB_SIZE, size=(samples, seq_len)))
    return path


def save_tokenizer(directory: Path) -> Path:
    """Add a tokenizer to ``directory`` that makes one token of each byte of UTF-8."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: id for id, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes | None]:
    """Everything below ``directory``, hidden or not: bytes of files, None for directories."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }
