"""What is quantized and how: a frozen, validated description, without tensors.

Weights are always E4M3 and symmetric, their scales static. ``lm_head``, embeddings and norms keep
their dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from octavo.errors import OctavoError

Granularity: TypeAlias = Literal["tensor", "channel", "block"]
Inputs: TypeAlias = Literal["static", "dynamic"]
Rounding: TypeAlias = Literal["nearest", "gptq", "learned"]
Scales: TypeAlias = Literal["amax", "mse", "percentile"]

# Rows and columns of a weight block, and elements of an input's group.
BLOCK = 128

# Schemes by name: how fine the weight scales are, and how inputs are scaled.
KINDS: dict[str, tuple[Granularity, Inputs]] = {
    "fp8": ("tensor", "static"),
    "fp8-dynamic": ("channel", "dynamic"),
    "fp8-block": ("block", "dynamic"),
    "fp8-tensor-dynamic": ("tensor", "dynamic"),
    "fp8-channel-static": ("channel", "static"),
}


class Scheme(BaseModel):
    """The choices that decide which numbers an edition holds.

    Attributes:
        weights: what a weight scale is for: the whole ``tensor``, one output ``channel``, or a
            ``block`` of 128 x 128.
        inputs: scales of the linear layers' inputs: ``static`` (one per tensor, calibrated) or
            ``dynamic`` (computed by the engine as they come: for each token, and beside block scales
            for each 128 elements of it; nothing stored).
        kv_cache: ``fp8`` stores ``k_scale`` and ``v_scale`` for each attention block, ``none``
            leaves the cache in the model's dtype.
        exclude: shell-style patterns over module names (``model.layers.0.*``, ``*.o_proj``);
            a linear layer that matches any of them keeps its dtype.
        dynamic: likewise, beside static inputs: a linear layer that matches any of them has dynamic inputs all
            the same. What engines fuse (q/k/v, gate/up) goes together.
        merge_scales: give q/k/v and gate/up one shared weight scale, as engines that fuse them
            into one matrix product want it.
        rounding: how weights become E4M3 numbers: each to its ``nearest``; by :mod:`octavo.rounding.gptq`,
            which looks at the layer's inputs; or ``learned`` from there on what comes out of the decoder layer
            (:mod:`octavo.reconstruction`). It changes no format.
        scales: what the static scales of inputs, keys and values are taken from: the largest magnitude
            (``amax``), or as :mod:`octavo.calibration.ranges` has it. It changes no format either.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Granularity = "tensor"
    inputs: Inputs = "static"
    kv_cache: Literal["fp8", "none"] = "fp8"
    exclude: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    merge_scales: bool = False
    rounding: Rounding = "nearest"
    scales: Scales = "amax"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weights == "block" and self.inputs == "static":
            raise ValueError("block scales go with dynamic inputs, static inputs were asked for")
        if self.dynamic and self.inputs == "dynamic":
            raise ValueError("all inputs are dynamic, and some were asked to be")
        if self.scales != "amax" and self.inputs == "dynamic" and self.kv_cache == "none":
            raise ValueError(
                f"scales {self.scales} is for static scales of inputs or of a KV cache, and here are none"
            )
        if self.weights != "tensor" and self.merge_scales:
            raise ValueError(
                f"merge_scales is for weights with one scale each, these have one per {self.weights}"
            )
        return self

    @property
    def kind(self) -> str:
        """Its name, a key of :data:`KINDS`."""
        return next(name for name, kind in KINDS.items() if kind == (self.weights, self.inputs))

    @property
    def needs_calibration(self) -> bool:
        """Whether any scale or code depends on data."""
        return self.inputs == "static" or self.kv_cache == "fp8" or self.rounding != "nearest"

    def excludes(self, module: str) -> bool:
        """Whether the linear layer named ``module`` keeps its dtype."""
        return _matches(module, self.exclude)

    def inputs_of(self, module: str) -> Inputs:
        """How the inputs of the linear layer named ``module`` are scaled, if it is quantized."""
        return "dynamic" if _matches(module, self.dynamic) else self.inputs

    def differing(self, modules: Iterable[str]) -> list[str]:
        """Those of the linear layers whose inputs are not scaled as the scheme's name says."""
        return [module for module in modules if self.inputs_of(module) != self.inputs]


def _matches(module: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def scheme_called(kind: str, kv_cache: Literal["fp8", "none"] | None = None, **rest: Any) -> Scheme:
    """A scheme by its name.

    Args:
        kind: a key of :data:`KINDS`.
        kv_cache: as for :class:`Scheme`. None means ``fp8`` where inputs need calibration anyway,
            and ``none`` where the scheme's point is that it needs no data.
        rest: as for :class:`Scheme`.

    Raises:
        OctavoError: there is no such scheme, or the choices do not go together.
    """
    if kind not in KINDS:
        raise OctavoError(f"Unknown scheme {kind!r}. Expected one of {', '.join(KINDS)}.")
    weights, inputs = KINDS[kind]
    cache = kv_cache or ("fp8" if inputs == "static" else "none")
    try:
        return Scheme(weights=weights, inputs=inputs, kv_cache=cache, **rest)
    except ValidationError as error:
        fault = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise OctavoError(f"The scheme {kind} does not allow this: {fault}.") from error


# Linear layers that engines fuse into one matrix, by the last part of their names.
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
