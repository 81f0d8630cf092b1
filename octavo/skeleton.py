"""A checkpoint's model as ``transformers`` builds it: on the meta device, without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from octavo.attention import ATTENTION
from octavo.errors import OctavoError, one_line

# Architectures whose streamed statistics are tested against the whole model.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class TensorOnDisk(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """Where a model comes from: a checkpoint under its own names, or an edition under canonical ones."""

    @property
    def directory(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def __contains__(self, name: str, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str) -> TensorOnDisk: ...

    def file_of(self, name: str) -> Path: ...


def build_skeleton(source: Source) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The model that ``config.json`` describes, on the meta device, in inference mode.

    Its attention is :func:`octavo.attention.attention`.

    Args:
        source: whose config it is; a quantization section is left out.

    Raises:
        OctavoError: the architecture is not supported, or the config contradicts itself or the
            weights.
    """
    path = source.directory / "config.json"
    kind = source.config.get("model_type")
    if kind not in SUPPORTED:
        raise OctavoError(
            f"{path} has model_type {kind!r}, which is not supported. "
            f"Supported: {', '.join(SUPPORTED)}. Octavo never runs code from a checkpoint: "
            "--trust-remote-code does not exist."
        )
    try:
        # A copy: from_dict writes into what it is given.
        content = copy.deepcopy(source.config)
        content.pop("quantization_config", None)
        config = CONFIG_MAPPING[kind].from_dict(content, attn_implementation=ATTENTION)
        build: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            model: PreTrainedModel = build(config)
    except Exception as error:  # transformers raises many kinds for many faults of a config
        raise OctavoError(
            f"{path} is not a valid {kind} configuration: {one_line(error)}. "
            "Restore the file from the original checkpoint."
        ) from error
    if config.num_hidden_layers < 1:
        raise OctavoError(
            f"{path} has num_hidden_layers {config.num_hidden_layers}, expected at least 1. "
            "Restore the file from the original checkpoint."
        )
    beyond = f"model.layers.{config.num_hidden_layers}."
    if any(name.startswith(beyond) for name in source):
        raise OctavoError(
            f"{path} has num_hidden_layers {config.num_hidden_layers}, but the weights have tensors of "
            f"a further layer ({beyond}*). Check that config.json and the weights belong together."
        )
    model.train(False).requires_grad_(False)
    return config, model


def check_tensors(source: Source, model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Raise unless ``source`` has the tensors of ``model`` in their shapes and a fitting dtype.

    Args:
        source: what is checked.
        model: tensors it ties to others need not be there.
        expected: those of its tensors to look for, on any device.

    Raises:
        OctavoError: names the tensor.
    """
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    for name, tensor in expected.items():
        if name in source:
            _check_tensor(source, name, tensor)
        elif name not in tied:
            raise OctavoError(
                f"{source.directory} has no tensor {name!r}, which config.json calls for. "
                "Check that config.json and the weights belong together."
            )


def _check_tensor(source: Source, name: str, expected: Tensor) -> None:
    entry = source[name]
    if entry.shape != tuple(expected.shape):
        raise OctavoError(
            f"tensor {name!r} in {source.file_of(name)} has shape {list(entry.shape)}, "
            f"config.json calls for {list(expected.shape)}. "
            "Check that config.json and the weights belong together."
        )
    quantized = expected.dtype == torch.float8_e4m3fn
    if entry.dtype not in ((torch.float8_e4m3fn,) if quantized else FLOATS):
        raise OctavoError(
            f"tensor {name!r} in {source.file_of(name)} is {entry.dtype}, expected "
            "bfloat16, float16 or float32. Start from the original, unquantized checkpoint."
        )
