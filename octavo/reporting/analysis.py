"""Where FP8 costs something in a model: the content of analysis.json, from which its page is drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from octavo.reporting.record import CalibrationRecord, WeightError
from octavo.reporting.validation import Frozen
from octavo.scheme import Scheme

Share = Annotated[float, Field(ge=0, le=1)]


class Model(Frozen):
    """The checkpoint that was analyzed.

    Attributes:
        name: its directory's name.
        architecture: ``model_type`` of its config.
        layers: decoder layers.
        bytes: of its tensors.
    """

    name: str
    architecture: str
    layers: PositiveInt
    bytes: PositiveInt


class Text(Frozen):
    """What the divergence was measured on.

    Attributes:
        data: name of the text.
        windows: taken from all over it.
        seq_len: tokens in each; all but the last of a window are compared.
    """

    data: str
    windows: PositiveInt
    seq_len: PositiveInt


class Loss(Frozen):
    """How far the model's predictions move.

    Attributes:
        kl: mean KL(model ‖ model with this quantized) over tokens, in nats.
        kl_standard_error: its standard error, over windows; None with a single one.
    """

    kl: NonNegativeFloat
    kl_standard_error: NonNegativeFloat | None


class UnitLoss(Loss):
    """What quantizing one part of a decoder layer costs, all else being as in the model, and what it saves.

    Attributes:
        layer: its number.
        unit: linear layers that share an input (``q/k/v``, ``o``, ``gate/up``, ``down``), which engines fuse;
            ``KV cache``; ``layer`` for all of them.
        modules: names of the linear layers.
        bytes: that an edition is larger by if these keep the model's dtype.
        cache_bytes_per_token: that a token takes more in the KV cache if that keeps the model's dtype.
    """

    layer: NonNegativeInt
    unit: str
    modules: tuple[str, ...]
    bytes: NonNegativeInt
    cache_bytes_per_token: NonNegativeInt


class InputError(Frozen):
    """What quantization does to a linear layer's inputs.

    Attributes:
        sqnr_db: signal to quantization noise ratio, ``10 log10(Σx² / Σ(x - x̂)²)``, in dB; None without noise.
        underflow: share of values that became zero without being zero.
        clipped: share of values beyond the amax of calibration; 0 where scales are dynamic.
    """

    sqnr_db: Annotated[float, Field(ge=-1000, le=1000)] | None
    underflow: Share
    clipped: Share


class LinearError(Frozen):
    """What quantization does to one linear layer."""

    weight: WeightError
    input: InputError


class Analysis(Frozen):
    """What :func:`octavo.analyze` found.

    Attributes:
        version: of this layout.
        octavo: version of Octavo; likewise ``torch``, ``transformers``.
        model: what was analyzed.
        scheme: what would be quantized, and how; weights are rounded to nearest.
        device: where it was computed, ``cpu`` or ``cuda``.
        calibration: the tokens the scales were taken on; None without calibration.
        text: what the divergence was measured on.
        units: each measured on its own, by layer, in the order they are computed in.
        layers: whole layers, each measured on its own.
        everything: all of them quantized at once.
        linears: errors of weights and inputs by module name.
        warnings: what to know, a sentence each.
    """

    version: Literal[1] = 1
    octavo: str
    torch: str
    transformers: str
    model: Model
    scheme: Scheme
    device: str
    calibration: CalibrationRecord | None
    text: Text
    units: tuple[UnitLoss, ...]
    layers: tuple[UnitLoss, ...]
    everything: Loss
    linears: dict[str, LinearError]
    warnings: tuple[str, ...] = ()

    @property
    def costliest(self) -> list[UnitLoss]:
        """The units, the largest KL first."""
        return sorted(self.units, key=lambda unit: -unit.kl)

    @property
    def sum_of_units(self) -> float:
        """Sum of the units' KL: what everything would cost if losses added up."""
        return sum(unit.kl for unit in self.units)
