"""An edition as `transformers` loads it with its owner's help, beside the one that Octavo loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from octavo import Calibration, fp8, load, quantize
from octavo.linear import Fp8Linear
from octavo.scheme import scheme_called

# That blocks of 128 divide.
SIZES: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 384}
IDS = torch.randint(tiny.VOCAB_SIZE, (1, 32), generator=torch.Generator().manual_seed(1))


def make(
    model: Path, format: str, kind: str, kv_cache: Any, directory: Path, **options: Any
) -> Path:
    """An edition of ``model``, calibrated with a few random tokens."""
    quantize(
        model,
        directory / "edition",
        scheme=scheme_called(kind, kv_cache=kv_cache, **options),
        calibration=Calibration(source=str(tiny.save_ids(directory / "ids.npy"))),
        format=format,
    )
    return directory / "edition"


def from_pretrained(edition: Path, unexpected: Iterable[str] = ()) -> Any:
    """The edition as `transformers` loads it; asserts that every tensor found its place.

    Args:
        edition: the directory.
        unexpected: tensors it has no place for.
    """
    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(edition, output_loading_info=True)
    assert set(report.pop("unexpected_keys")) == set(unexpected)
    assert not any(report.values()), report
    return model


def logits(model: Any) -> Tensor:
    """float32 ``[tokens, vocabulary]``."""
    with torch.inference_mode():
        found: Tensor = model(IDS).logits[0].float()
    return found


def fp8_linears(model: Any) -> dict[str, Fp8Linear]:
    """The FP8 layers of a model that Octavo loaded."""
    return {name: one for name, one in model.named_modules() if isinstance(one, Fp8Linear)}


def weight_of(peer: Any, name: str) -> Tensor:
    """A layer's weight, as a model that `transformers` loaded uses it.

    Args:
        peer: the model, after its first call: compressed-tensors dequantizes then.
        name: of the layer.
    """
    linear = peer.get_submodule(name)
    found: Tensor = linear.weight.data
    if hasattr(linear, "weight_quantizer"):
        found = linear.weight_quantizer(found)  # amd-quark dequantizes at every call
    return found.to(peer.dtype)


def check_weights(peer: Any, ours: Any, scale_dtype: torch.dtype = torch.float32) -> None:
    """Assert that the peer's weights are codes times scales, to the last bit.

    Args:
        peer: the edition as `transformers` loads it.
        ours: the edition as Octavo loads it.
        scale_dtype: which the peer holds scales in.
    """
    logits(peer)
    linears = fp8_linears(ours)
    assert linears
    for name, linear in linears.items():
        scale = linear.weight_scale.to(scale_dtype).float()
        expected = fp8.dequantize(linear.weight, scale).to(peer.dtype)
        assert torch.equal(weight_of(peer, name), expected), name


def check_products(
    peer: Any, ours: Any, after: Callable[[str, Tensor], Tensor] = lambda name, product: product
) -> None:
    """Assert that both models' projections, FP8 or left out, give the same on the same inputs, up to
    float32's rounding.

    Args:
        peer: the edition as `transformers` loads it.
        ours: the edition as Octavo loads it.
        after: what the peer does to a layer's product, by the layer's name.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in ours.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, args, product, name=name: seen.update({name: (args[0], product)})
            )
    logits(ours)
    assert seen
    for name, (x, product) in seen.items():
        with torch.inference_mode():
            found, expected = peer.get_submodule(name)(x), after(name, product)
        near = torch.isclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        # What lies between two codes may fall to either.
        assert near.float().mean() > 0.999, name


def check_logits(peer: Any, ours: Any, model: Path) -> None:
    """Assert that both agree far better than either does with the unquantized model: rounding where
    the other does not, or not rounding where it does, moves logits by much of what quantizing does."""
    found, expected, plain = logits(peer), logits(ours), logits(load(model)[0])
    assert (found - expected).norm() < 0.3 * (expected - plain).norm()
