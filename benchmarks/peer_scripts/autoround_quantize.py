"""Quantize a checkpoint with auto-round: its static FP8 scheme with one scale for each weight, tuned, and an FP8 KV cache.

The number of steps and samples in each are its defaults, and so is all else but the tokens.

Usage: autoround_quantize.py MODEL TOKENS.npy OUTPUT [STEPS]
"""

import sys

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

source, tokens_file, output, *steps = sys.argv[1:]
tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
tuned = {"iters": int(steps[0])} if steps else {}
AutoRound(
    model,
    AutoTokenizer.from_pretrained(source),
    scheme="FP8_STATIC",
    group_size=0,
    static_kv_dtype="fp8",
    dataset=list(tokens.split(1)),
    nsamples=len(tokens),
    seqlen=tokens.shape[1],
    device_map="cpu",
    **tuned,
).quantize_and_save(output, format="llm_compressor")
