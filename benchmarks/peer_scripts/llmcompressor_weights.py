"""Quantize weights alone with llm-compressor, file to file: a scale for each row, inputs scaled when served.

Usage: llmcompressor_weights.py MODEL OUTPUT
"""

import sys

from llmcompressor import model_free_ptq

source, output = sys.argv[1:]
model_free_ptq(
    source, output, scheme="FP8_DYNAMIC", ignore=["lm_head", "model.embed_tokens"], device="cpu"
)
