"""Quantize a checkpoint with auto-round: static per-tensor FP8 tuned by signed gradients, and an FP8 KV cache.

Usage: autoround_quantize.py MODEL TOKENS.npy OUTPUT ITERATIONS
"""

import sys

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

source, tokens_file, output, iterations = sys.argv[1:]
tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
tuned = AutoRound(
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
    AutoTokenizer.from_pretrained(source),
    scheme="FP8_STATIC",
    # One scale for a weight; by default each row has its own.
    group_size=0,
    static_kv_dtype="fp8",
    dataset=list(tokens.split(1)),
    nsamples=len(tokens),
    seqlen=tokens.shape[1],
    iters=int(iterations),
    device_map="cpu",
)
tuned.quantize_and_save(output, format="llm_compressor")
