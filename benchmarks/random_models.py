"""Models of random weights made where they compute: no file is as large as they may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo import fp8
from octavo.engines.torch.gpu.network import Network, network_of
from octavo.linear import Fp8Linear
from octavo.loading import Fp8KeyValueCache
from octavo.skeleton import build_skeleton

# Of weights; of inputs and of keys and values, as codes stand for them.
_DEVIATION = 0.02
_SCALE = 0.05


class _Described(NamedTuple):
    """A checkpoint that is its config only."""

    config: dict[str, Any]
    directory: Path = Path("random")

    def __contains__(self, name: object) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat("", 0)

    def __getitem__(self, name: Any) -> Any:
        raise KeyError(name)

    def file_of(self, name: str) -> Path:
        return self.directory / name


def random_network(config: dict[str, Any], device: torch.device, *, quantized: bool) -> Network:
    """A decoder of the shape that a ``config.json`` describes.

    Args:
        config: its content.
        device: where it is made.
        quantized: whether its linear layers but the head, and its cache, are FP8 with static scales; or else BF16.
    """
    torch.manual_seed(0)
    described: Any = _Described(config)
    _, built = build_skeleton(described)
    model: Any = built
    for name, module in list(model.named_modules()):
        if quantized and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _fp8_linear(module, device))
        elif quantized and hasattr(module, "k_proj"):
            module.kv_cache = cache = Fp8KeyValueCache()
            cache.k_scale = cache.v_scale = torch.tensor(_SCALE, device=device)
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(module, Fp8Linear):
                module._parameters[key] = _random(parameter, device)
    if config.get("tie_word_embeddings"):
        model.tie_weights()
    return network_of(model, described.directory / "config.json")


def _random(parameter: Tensor, device: torch.device) -> nn.Parameter:
    made = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
    if parameter.ndim > 1:
        made.normal_(std=_DEVIATION)
    return nn.Parameter(made, requires_grad=False)


def _fp8_linear(linear: nn.Linear, device: torch.device) -> Fp8Linear:
    """Codes that spread over E4M3's range as those of a normal distribution do."""
    scale = 5 * _DEVIATION / fp8.E4M3_MAX
    codes = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device)
    codes.normal_(std=_DEVIATION / scale).clamp_(-fp8.E4M3_MAX, fp8.E4M3_MAX)
    scales = (torch.tensor(one, device=device) for one in (scale, _SCALE))
    if linear.bias is not None:
        linear.bias = _random(linear.bias, device)
    made = Fp8Linear(linear, "static", ())
    made.weight = codes.to(fp8.E4M3)
    made.weight_scale, made.input_scale = scales
    return made
