"""FP8 as engines store it that cut off instead of rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def cut_off(tensor: Tensor, scale: Tensor) -> Tensor:
    """``tensor`` after vLLM's FP8 storage on a CPU, float32: rounded towards zero."""
    values = (tensor.float() / scale).clamp(-448, 448)
    nearest = values.to(torch.float8_e4m3fn)
    # One code less is the next number towards zero.
    codes = nearest.view(torch.uint8) - (nearest.float().abs() > values.abs()).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).float() * scale
