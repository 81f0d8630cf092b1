"""Whether an edition is all it should be, so that no tool wins by doing less.

Reads any tool's tensors by what they are: FP8 weights under the model's names, and scales beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# What the tools call the scales of keys and values, below a layer's self_attn.
_CACHE_SCALES = {
    "k": ("k_proj.k_scale", "k_proj.output_scale", "k_scale"),
    "v": ("v_proj.v_scale", "v_proj.output_scale", "v_scale"),
}
_LARGEST_CODE = 0x7E
"""448, the largest number of E4M3."""

# Scales are rounded to BF16 by some, and input maxima to what a processor's matrix products give.
_WEIGHT_TOLERANCE, _INPUT_TOLERANCE = 0.01, 0.05


class IncompleteError(Exception):
    """An edition lacks something; says what."""


@contextmanager
def _tensors(directory: Path) -> Iterator[dict[str, Any]]:
    """The open file of every tensor of a checkpoint, by the tensor's name."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, "pt")) for path in directory.glob("*.safetensors")
        ]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118


def check(edition: Path, model: Path, *, static: bool) -> dict[str, float]:
    """Every decoder layer's linears are FP8, use the whole range, and have their scales.

    Args:
        edition: what a tool wrote.
        model: what it was made of.
        static: also scales of inputs, keys and values; otherwise weights alone, a scale for each row.

    Returns:
        Every scale of one element by its name, those of keys and values called alike.

    Raises:
        IncompleteError: something is missing or cannot be right.
    """
    with _tensors(model) as source:
        linears = {
            name: shape
            for name, file in source.items()
            if ".layers." in name and len(shape := file.get_slice(name).get_shape()) == 2
        }
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    with _tensors(edition) as tensors:
        for name, shape in linears.items():
            _check_weight(tensors, name, shape)
        if not static:
            for name, shape in linears.items():
                _positive(tensors, f"{name}_scale", shape[0])
            return {}
        scales = {
            name: _positive(tensors, name, 1)
            for weight in linears
            for name in (f"{weight}_scale", f"{weight.removesuffix('weight')}input_scale")
        }
        for layer in range(layers):
            for kind, names in _CACHE_SCALES.items():
                place = f"model.layers.{layer}.self_attn."
                name = next((place + n for n in names if place + n in tensors), place + names[0])
                scales[f"{place}{kind}_scale"] = _positive(tensors, name, 1)
    return scales


def compare(scales: dict[str, float], reference: dict[str, float]) -> None:
    """Scales are those that Octavo found on the same tokens.

    Keys' and values' are left out: Quark gives both the larger one.

    Raises:
        IncompleteError: they are not.
    """
    for ending, tolerance in (
        ("weight_scale", _WEIGHT_TOLERANCE),
        ("input_scale", _INPUT_TOLERANCE),
    ):
        away = [abs(scales[n] / reference[n] - 1) for n in reference if n.endswith(ending)]
        # The median: single maxima differ by more, since matrix products are rounded differently.
        if (median := sorted(away)[len(away) // 2]) > tolerance:
            raise IncompleteError(f"{ending}s are {median:.0%} from Octavo's in the median")


def _check_weight(tensors: dict[str, Any], name: str, shape: list[int]) -> None:
    if name not in tensors:
        raise IncompleteError(f"{name} is missing")
    codes = tensors[name].get_tensor(name)
    if codes.dtype != torch.float8_e4m3fn or list(codes.shape) != shape:
        raise IncompleteError(f"{name} is {codes.dtype} {list(codes.shape)}, not FP8 {shape}")
    if (largest := int((codes.view(torch.uint8) & 0x7F).max())) != _LARGEST_CODE:
        raise IncompleteError(f"{name}'s largest code is {largest:#x}, not {_LARGEST_CODE:#x}")


def _positive(tensors: dict[str, Any], name: str, size: int) -> float:
    """A scale's largest element, once all are found to be positive numbers."""
    if name not in tensors:
        raise IncompleteError(f"{name} is missing")
    values: list[float] = tensors[name].get_tensor(name).float().flatten().tolist()
    if len(values) != size or not all(math.isfinite(value) and value > 0 for value in values):
        raise IncompleteError(f"{name} is not {size} positive numbers")
    return max(values)
