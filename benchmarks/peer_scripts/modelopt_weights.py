"""Quantize weights alone with NVIDIA ModelOpt, a scale for each row, inputs scaled when served.

The decoder layers are offloaded to disk.

Usage: modelopt_weights.py MODEL OUTPUT OFFLOAD
"""

import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, output, offload = sys.argv[1:]
# ModelOpt cannot export tied embeddings that are offloaded.
in_memory = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
model = AutoModelForCausalLM.from_pretrained(
    source,
    dtype=torch.bfloat16,
    device_map={"model.layers": "disk", **dict.fromkeys(in_memory, "cpu")},
    offload_folder=offload,
)
model = mtq.quantize(model.eval(), mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=output, max_shard_size="100MB")
