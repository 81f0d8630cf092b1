"""Quantize a checkpoint with NVIDIA ModelOpt, as its examples do: FP8 and an FP8 KV cache.

With OFFLOAD: calibration layer by layer, with the decoder layers offloaded to disk and a checkpoint
of each layer's statistics. The export then streams layers too.

Usage: modelopt_quantize.py MODEL TOKENS.npy OUTPUT BATCH [OFFLOAD]
"""

import copy
import sys

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, tokens_file, output, batch, *rest = sys.argv[1:]
offload = rest[0] if rest else None
config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
extend = (
    config["quant_cfg"].update
    if isinstance(config["quant_cfg"], dict)
    else config["quant_cfg"].extend
)
extend(mtq.FP8_KV_CFG["quant_cfg"])
placement, sharding = {}, {}
if offload:
    # Tied embeddings that are offloaded it cannot export.
    in_memory = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    config["algorithm"] = {
        "method": "max",
        "layerwise": {
            "enable": True,
            "checkpoint_dir": f"{offload}/checkpoints",
            # Maxima leave weights alone: no copies of them in the checkpoints.
            "calib_mutates_weights": False,
        },
    }
    placement = {
        "device_map": {"model.layers": "disk", **dict.fromkeys(in_memory, "cpu")},
        "offload_folder": f"{offload}/weights",
    }
    sharding = {"max_shard_size": "100MB"}  # the export holds a shard in memory
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **placement).eval()
tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))


def calibrate(model):
    with torch.inference_mode():
        for part in tokens.split(int(batch)):
            model(part)


model = mtq.quantize(model, config, calibrate)
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=output, **sharding)
