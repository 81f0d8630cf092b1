"""Quantize a checkpoint with AMD Quark: its FP8 scheme and an FP8 KV cache.

With OFFLOAD, the decoder layers are on disk and loaded when it is their turn, in each pass of a batch.

Usage: quark_quantize.py MODEL TOKENS.npy OUTPUT BATCH [OFFLOAD]
"""

import sys

import numpy as np
import torch
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors
from transformers import AutoModelForCausalLM

source, tokens_file, output, batch, *rest = sys.argv[1:]
placement = {}
if rest:
    in_memory = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    placement = {
        "device_map": {"model.layers": "disk", **dict.fromkeys(in_memory, "cpu")},
        "offload_folder": rest[0],
    }
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **placement).eval()
tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
config = LLMTemplate.get(model.config.model_type).get_config(scheme="fp8", kv_cache_scheme="fp8")
# Otherwise it refuses a model that is not all on one device.
quantizer = ModelQuantizer(config, multi_device=bool(rest))
model = quantizer.quantize_model(model, torch.utils.data.DataLoader(tokens, int(batch)))
model = quantizer.freeze(model)
with torch.no_grad():
    export_safetensors(model, output)
