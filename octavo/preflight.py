"""What is refused before a run begins."""

from __future__ import annotations

from pathlib import Path

import torch

from octavo.checkpoint import Checkpoint
from octavo.errors import OctavoError


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise if ``checkpoint`` is an edition already."""
    directory = checkpoint.directory
    for key in ("quantization_config", "compression_config"):
        if checkpoint.config.get(key) is not None:
            method = checkpoint.config[key]
            kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
            raise OctavoError(
                f"{directory / 'config.json'} has a {key} ({kind}): the checkpoint is already quantized. "
                "Start from the original BF16, FP16 or FP32 checkpoint."
            )
    if (directory / "hf_quant_config.json").exists():
        raise OctavoError(
            f"{directory} has an hf_quant_config.json: the checkpoint is already quantized. "
            "Start from the original BF16, FP16 or FP32 checkpoint."
        )


def check_target(source: Path, target: Path) -> None:
    """Raise if writing ``target`` could touch ``source``."""
    inner, outer = target.resolve(), source.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise OctavoError(
            f"The output {target} and the input {source} lie inside one another. "
            "Choose an output directory outside the input."
        )


def pick_device(name: str) -> torch.device:
    """The device called ``name``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OctavoError(f"Unknown device {name!r}. Expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OctavoError(
            f"Device {name} was asked for, this machine has {torch.cuda.device_count()} CUDA devices "
            "that PyTorch can use. Choose --device cpu."
        )
    return device
