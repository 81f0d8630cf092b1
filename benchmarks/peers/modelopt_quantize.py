"""Quantize a checkpoint with NVIDIA ModelOpt, as its examples do: FP8 and an FP8 KV cache.

Usage: modelopt_quantize.py MODEL TOKENS.npy OUTPUT BATCH
"""

import copy
import sys

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, tokens_file, output, batch = *sys.argv[1:4], int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
extend = (
    config["quant_cfg"].update
    if isinstance(config["quant_cfg"], dict)
    else config["quant_cfg"].extend
)
extend(mtq.FP8_KV_CFG["quant_cfg"])
tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))


def calibrate(model):
    with torch.inference_mode():
        for part in tokens.split(batch):
            model(part)


model = mtq.quantize(model, config, calibrate)
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=output)
