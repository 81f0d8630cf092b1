"""Whether an edition's tensors are what its config promises."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.canonical import SCALE_SHAPES
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.scheme import Scheme
from octavo.skeleton import check_tensors


def decoder_linears(model: PreTrainedModel) -> list[str]:
    """The linear layers of the decoder layers, by full module name, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{model.base_model_prefix}.")
    ]


def attention_blocks(model: PreTrainedModel) -> list[str]:
    """The attention blocks, by full module name, in the model's order."""
    return [name for name, module in model.named_modules() if hasattr(module, "k_proj")]


def check_promises(edition: Edition, scheme: Scheme, model: PreTrainedModel) -> None:
    """Raise unless an edition holds the tensors that its config promises, in their shapes.

    Args:
        edition: what is checked; headers are read, no tensor is.
        scheme: what its config promises.
        model: its model on the meta device.

    Raises:
        OctavoError: names the first tensor that differs.
    """
    check_tensors(edition, model, dict(_expected(edition, model)))
    linears = decoder_linears(model)
    for module in edition.quantized_modules():
        if module not in linears:
            raise _contradiction(
                edition, f"{module}.weight", "is FP8", "FP8 in decoder layers only"
            )
        if scheme.excludes(module):
            raise _contradiction(edition, f"{module}.weight", "is FP8", "it left unquantized")
        _check_scales(edition, scheme, module)
    for module in linears:
        if not edition.is_quantized(module) and not scheme.excludes(module):
            found = f"is {edition[f'{module}.weight'].dtype}"
            raise _contradiction(edition, f"{module}.weight", found, "an FP8 weight")
    if scheme.kv_cache == "fp8":
        for block in attention_blocks(model):
            for name in (f"{block}.k_scale", f"{block}.v_scale"):
                if name not in edition:
                    raise _contradiction(edition, name, "is missing", "scales for an FP8 KV cache")


def _expected(edition: Edition, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, in FP8 where the edition has them so."""
    for name, tensor in model.state_dict().items():
        quantized = name in edition and edition[name].dtype == torch.float8_e4m3fn
        yield name, tensor.to(torch.float8_e4m3fn) if quantized else tensor


def _check_scales(edition: Edition, scheme: Scheme, module: str) -> None:
    name = f"{module}.weight_scale"
    if name not in edition:
        raise _contradiction(
            edition, name, "is missing", f"weight scales, one per {scheme.weights}"
        )
    expected = SCALE_SHAPES[scheme.weights](*edition[f"{module}.weight"].shape)
    shape = edition.weight_scale_shape(module)
    if torch.Size(shape).numel() != torch.Size(expected).numel():
        found = f"has shape {list(edition[name].shape)}"
        raise _contradiction(edition, name, found, f"one scale per {scheme.weights}")
    present, inputs = f"{module}.input_scale" in edition, scheme.inputs_of(module)
    if present != (inputs == "static"):
        found = "is there" if present else "is missing"
        raise _contradiction(edition, f"{module}.input_scale", found, f"{inputs} inputs")


def _contradiction(edition: Edition, name: str, found: str, promised: str) -> OctavoError:
    return OctavoError(
        f"tensor {name!r} of {edition.directory} {found}, though its {edition.dialect} config promises "
        f"{promised}. Config and tensors do not belong together: restore the one that was changed, or "
        "quantize the original checkpoint again. `octavo inspect` lists all such contradictions."
    )
