"""What the reference tools wrote for the sample model, put together again from the golden files.

The files hold scales and hashes of FP8 codes. The tools' codes are recomputed from their scales with
their arithmetic, which is right if and only if the hash agrees.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E4M3 = torch.float8_e4m3fn


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def modelopt_codes(weight: Tensor, scale: float) -> Tensor:
    return (weight / torch.tensor(scale)).to(E4M3)


def bf16_scale_codes(weight: Tensor, scale: float) -> Tensor:
    return (weight / torch.tensor(scale).bfloat16()).clamp(-448, 448).to(E4M3)


TOOLS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "modelopt-0.47.0": modelopt_codes,
    "quark-0.13": bf16_scale_codes,
    "llmcompressor-0.14.0.1": bf16_scale_codes,
}


def rebuild(tool: str, source: Path, golden: Path, output: Path) -> Path:
    """The checkpoint that ``tool`` wrote, tensor by tensor, with its own config."""
    weights, entries = tensors_of(source), read(golden / tool / "tensors.json")
    found: dict[str, Tensor] = {}
    for name, entry in entries.items():
        dtype = getattr(torch, entry["dtype"])
        if "value" in entry:
            found[name] = torch.tensor(entry["value"]).to(dtype).reshape(entry["shape"])
        elif dtype == E4M3:
            found[name] = TOOLS[tool](weights[name], entries[f"{name}_scale"]["value"])
        else:
            found[name] = weights[name]
        if "sha256" in entry:
            assert sha256(found[name]) == entry["sha256"], name
    output.mkdir()
    save_file(found, output / "model.safetensors", metadata={"format": "pt"})
    for file in (golden / tool).glob("*config.json"):
        shutil.copy(file, output / file.name)
    shutil.copy(source / "tokenizer.json", output)
    shutil.copy(source / "tokenizer_config.json", output)
    return output
