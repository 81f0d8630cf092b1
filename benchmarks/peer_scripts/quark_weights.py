"""Quantize weights alone with AMD Quark, file to file: a scale for each row, inputs scaled when served.

This mode has no calibration: asked for static inputs, it writes the weights and leaves the scales of inputs,
keys and values out.

Usage: quark_weights.py MODEL OUTPUT
"""

import sys

from quark.torch import LLMTemplate, ModelQuantizer
from transformers import AutoConfig

source, output = sys.argv[1:]
template = LLMTemplate.get(AutoConfig.from_pretrained(source).model_type)
quantizer = ModelQuantizer(template.get_config(scheme="ptpc_fp8"))
quantizer.direct_quantize_checkpoint(source, output, device="cpu")
