"""Quantize a checkpoint with llm-compressor: its FP8 preset and an FP8 KV cache.

Calibration is sequential, the default: samples pass through one decoder layer after the other. With
OFFLOAD, decoder layers are on disk and loaded when it is their turn, and each sample passes through each
layer once (by default twice, the second time through the layer as quantized).

Usage: llmcompressor_quantize.py MODEL TOKENS.npy OUTPUT BATCH [OFFLOAD]
"""

import sys

import numpy as np
import torch
from compressed_tensors.offload import load_offloaded_model
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

source, tokens_file, output, batch, *rest = sys.argv[1:]
placement, pipeline, sharding = {}, {}, {}
if rest:
    on_disk = ("model.layers", "model.embed_tokens", "lm_head")
    in_memory = ("model.norm", "model.rotary_emb")
    placement = {
        "device_map": {**dict.fromkeys(on_disk, "disk"), **dict.fromkeys(in_memory, "cpu")},
        "offload_folder": rest[0],
    }
    pipeline = {"pipeline": "sequential", "propagate_error": False}
    sharding = {"max_shard_size": "100MB"}  # saving holds a shard in memory
with load_offloaded_model():
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **placement)
tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
samples = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens]
recipe = QuantizationModifier(
    targets="Linear",
    scheme="FP8",
    ignore=["lm_head"],
    # The largest value seen, as its FP8 preset has it for inputs; otherwise a moving average.
    kv_cache_scheme=QuantizationArgs(num_bits=8, type="float", observer="static_minmax"),
)
oneshot(
    model=model,
    dataset=DataLoader(samples, batch_size=int(batch)),
    recipe=recipe,
    **pipeline,
)
model.save_pretrained(output, save_compressed=True, **sharding)
