"""Block reconstruction: a decoder layer's codes learned so that what comes out of it is what the model gives
(Li et al., 2021, BRECQ, arXiv:2102.05426; Cheng et al., 2023, SignRound, arXiv:2309.05516).

The quantized layer gets the hidden states that the quantized layers before it give; what it should make of them is
what the original model makes of its own. So each layer also makes up for some of what was lost before it.

The loss is the squared error of each token's hidden state over its square: every linear layer behind it sees it
through RMSNorm, so what is small counts as much as what is large.

A step takes a few batches, each on a core of its own, and sums their gradients in order: no result depends on how
many cores there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo import fp8
from octavo.attention import KeyValueCache
from octavo.calibration import Examples
from octavo.linear import Fp8Linear
from octavo.rounding.learned import LearnedCodes

# Steps of each layer at most, and batches in each; none is seen twice, since what is seen again is learned by heart.
STEPS, BATCHES = 64, 2

# How far a number may move in all steps, in distances between codes: little more than the half it takes to another
# code, so that those change whose gradient keeps its sign. Where text is too little for so many steps to tell a sign
# from chance, they are as small as if there were as many.
TRAVEL, LEAST = 0.65, 24

# Batches that the loss is told on before and after, from all over the text.
CHECKED = 16

# A token's square counts as at least this share of the mean.
_LEAST_SIZE = 1e-4


class Learning(NamedTuple):
    """What learning the codes of a model takes.

    Attributes:
        layers: decoder layers.
        steps: of each.
        tokens: in each step, forward and backward.
        passes: as many forward passes of all samples through each layer would take as long, about: a step backward
            is two forward.
    """

    layers: int
    steps: int
    tokens: int
    passes: float

    @classmethod
    def of(cls, layers: int, batches: int, tokens: int) -> Learning:
        """Args: decoder layers; batches of the samples; tokens of all samples."""
        # The original model's, then steps, then what they won.
        steps = _steps(batches)
        passes = 1 + (3 * steps * BATCHES + 2 * min(CHECKED, batches)) / batches
        return cls(layers, steps, BATCHES * tokens // batches, passes)


class Reconstructed(NamedTuple):
    """What came of it.

    Attributes:
        codes: of each weight, by module; those it began with, if the loss did not become smaller.
        before: the loss on some of the batches.
        after: likewise, with these codes.
        changed: how many codes are other than before, by module.
    """

    codes: dict[str, Tensor]
    before: float
    after: float
    changed: dict[str, int]


def reconstruct(
    layer: nn.Module,
    linears: Mapping[str, tuple[str, nn.Linear]],
    folded: Mapping[str, Tensor],
    examples: Examples,
    over: fp8.Map = map,
) -> Reconstructed:
    """Learn the codes of a decoder layer.

    Args:
        layer: it computes with FP8 modules; as it was, afterwards.
        linears: the linear layers to learn, by full name: the name within the layer, and the original.
        folded: their canonical tensors: codes to begin with, and scales, which stay.
        examples: what it should give.
        over: applied to batches.

    Returns:
        The codes, and what they won.
    """
    # Each step is smaller than the one before, down to none.
    rate = 2 * TRAVEL / max(_steps(examples.batches), LEAST)
    learned = {
        name: _LearnedLinear(original, folded, name, rate)
        for name, (_, original) in linears.items()
    }
    replaced: dict[str, nn.Module] = {own: learned[name] for name, (own, _) in linears.items()}
    for name, module in layer.named_modules():
        if isinstance(module, KeyValueCache):
            replaced[name] = _StraightCache(module)
    original = {name: layer.get_submodule(name) for name in replaced}
    for name, module in replaced.items():
        layer.set_submodule(name, module)
    # They may have been made in inference mode, and are kept for the gradient.
    examples = examples._replace(arguments=_cloned(examples.arguments))
    layer.requires_grad_(False)
    try:
        before = _checked(layer, examples, over)
        drawn = _drawn(examples.batches)
        for number, batches in enumerate(drawn):
            left = 1 - number / len(drawn)
            _step(layer, list(learned.values()), examples, batches, left, over)
        after = _checked(layer, examples, over)
    finally:
        for name, module in original.items():
            layer.set_submodule(name, module)
    if after >= before:
        first = {name: folded[f"{name}.weight"] for name in linears}
        return Reconstructed(first, before, before, dict.fromkeys(linears, 0))
    return Reconstructed(
        {name: one.state.codes for name, one in learned.items()},
        before,
        after,
        {name: one.state.changed for name, one in learned.items()},
    )


class _LearnedLinear(nn.Module):
    """In the place of a linear layer, while its codes are learned.

    Attributes:
        state: its codes.
        weight: what they stand for, in the dtype it computes in; gradients are taken by it.
    """

    def __init__(
        self, original: nn.Linear, folded: Mapping[str, Tensor], name: str, rate: float
    ) -> None:
        super().__init__()
        self._original, self._device = [original], original.weight.device
        scale, self._input_scale = (
            None if scale is None else scale.to(self._device)
            for scale in (folded.get(f"{name}.{kind}_scale") for kind in ("weight", "input"))
        )
        assert scale is not None
        self._scale = scale
        self.state = LearnedCodes(folded[f"{name}.weight"].to(self._device), scale, rate)
        self._renew()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _product(x, self.weight, self._linear)
        return result

    def step(self, gradient: Tensor, left: float) -> None:
        """See :meth:`octavo.rounding.learned.LearnedCodes.step`."""
        self.state.step(gradient, left)
        self._renew()

    def _renew(self) -> None:
        (original,) = self._original
        self.weight = self.state.values(original.weight.dtype).requires_grad_()
        # In a list, since it is not a part of this module.
        made = Fp8Linear.of(original, self.state.codes, self._scale, self._input_scale)
        self._linear = [made]


class _StraightCache(nn.Module):
    """Keys and values rounded as a cache rounds them, their gradients left alone."""

    def __init__(self, cache: nn.Module) -> None:
        super().__init__()
        self._cache = [cache]

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        (cache,) = self._cache
        with torch.no_grad():
            rounded = cache(key, value)
        return _straight(key, rounded[0]), _straight(value, rounded[1])


class _Product(torch.autograd.Function):
    """A linear layer in FP8, exactly as it computes; its gradients are those of the numbers it computes with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: list[Fp8Linear]) -> Tensor:
        rounded = linear[0].rounded(x)
        ctx.save_for_backward(rounded.values, rounded.scale, weight)
        ctx.shape = x.shape
        result: Tensor = linear[0](x)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, scale, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        scaled = (gradient * scale).to(weight.dtype)
        return (gradient @ weight).view(ctx.shape), scaled.t() @ values.to(weight.dtype), None


class _Straight(torch.autograd.Function):
    """What a number was rounded to; the gradient is the number's own."""

    @staticmethod
    def forward(_: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


# Without types.
_product: Any = _Product.apply
_straight: Any = _Straight.apply


def _steps(batches: int) -> int:
    return min(STEPS, -(-batches // BATCHES))


def _drawn(count: int) -> list[tuple[int, ...]]:
    """Numbers of the batches of each step, in some order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=generator).tolist()
    firsts = range(0, BATCHES * _steps(count), BATCHES)
    return [tuple(order[first : first + BATCHES]) for first in firsts]


def _step(
    layer: nn.Module,
    learned: list[_LearnedLinear],
    examples: Examples,
    batches: Sequence[int],
    left: float,
    over: fp8.Map,
) -> None:
    weights = [one.weight for one in learned]

    def gradients(index: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(_loss(layer, examples, index), weights)

    sums: list[Tensor] | None = None
    for found in over(gradients, batches):
        if sums is None:
            sums = [one.float() for one in found]
        else:
            for total, one in zip(sums, found, strict=True):
                total += one
    assert sums is not None
    # Together, since each is the work of one core.
    list(over(lambda one, gradient: one.step(gradient, left), learned, sums))


def _checked(layer: nn.Module, examples: Examples, over: fp8.Map) -> float:
    """Mean loss on some batches."""
    count = min(CHECKED, examples.batches)
    chosen = [number * examples.batches // count for number in range(count)]

    def loss(index: int) -> float:
        with torch.no_grad():
            return _loss(layer, examples, index).item()

    return sum(over(loss, chosen)) / count


def _loss(layer: nn.Module, examples: Examples, index: int) -> Tensor:
    hidden, target = examples.read(index)
    found, target = layer(hidden, **examples.arguments).float(), target.float()
    size = target.square().mean(dim=-1)
    # Of a token that is next to nothing, nothing should depend.
    size = size.clamp_min(_LEAST_SIZE * size.mean().item() + torch.finfo(torch.float32).tiny)
    loss: Tensor = ((found - target).square().mean(dim=-1) / size).mean()
    return loss


def _cloned(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.clone()
    if isinstance(given, Mapping):
        return {name: _cloned(one) for name, one in given.items()}
    if isinstance(given, tuple):
        return tuple(map(_cloned, given))
    return given
