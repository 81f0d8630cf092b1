"""What loss is acceptable, and what to do for it: which parts of a model to keep in its dtype, which to give dynamic inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from octavo.calibration.text import BUILTIN
from octavo.errors import OctavoError


class Budget(BaseModel):
    """A limit on what quantization may cost, and the text it is measured on.

    Attributes:
        max_kl: mean KL(model ‖ edition) over tokens, in nats.
        max_perplexity_increase: of the edition over the model's, as a share: 0.01 for 1 %. One of both.
        data: the text, as for :func:`octavo.evaluate`. What to keep is chosen on its first half and verified on its second;
            neither may be what scales are calibrated on.
        windows: of the second half, at most.
        seq_len: tokens in each; 2048, or as many as the model has positions for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_kl: PositiveFloat | None = None
    max_perplexity_increase: PositiveFloat | None = None
    data: str = BUILTIN
    windows: PositiveInt = 16
    seq_len: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.max_kl is None) == (self.max_perplexity_increase is None):
            raise ValueError("one of max_kl and max_perplexity_increase is needed, and not both")
        return self

    @property
    def limit(self) -> float:
        """Whichever is limited, at most this."""
        return self.max_kl or self.max_perplexity_increase or 0.0

    @property
    def measure(self) -> str:
        """What is limited, for people."""
        return "KL divergence" if self.max_kl else "perplexity increase"

    def told(self, value: float) -> str:
        """A value of what is limited, for people."""
        return f"{value:.4g} nats/token" if self.max_kl else f"{100 * value:.3g} %"


def budget_of(max_kl: float | None, max_perplexity_increase: str | None, data: str) -> Budget:
    """A budget as it is typed.

    Args:
        max_kl: in nats.
        max_perplexity_increase: such as ``1%``.
        data: the text.

    Raises:
        OctavoError: neither limit is given, or both; or one is not a positive number.
    """
    share = None
    try:
        if max_perplexity_increase is not None:
            if not max_perplexity_increase.endswith("%"):
                raise ValueError("a perplexity increase is given in per cent, such as 1%")
            share = float(max_perplexity_increase.removesuffix("%")) / 100
        return Budget(max_kl=max_kl, max_perplexity_increase=share, data=data)
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{first['msg'].removeprefix('Value error, ')}, found {first['input']}"
    except ValueError as error:
        fault = str(error)
    raise OctavoError(
        f"--max-kl {max_kl} and --max-perplexity-increase {max_perplexity_increase} are no budget: {fault}. Pass one of them, "
        "such as --max-kl 0.02 or --max-perplexity-increase 1%."
    )


class Part(NamedTuple):
    """Linear layers that engines fuse, and that therefore have one precision.

    Attributes:
        modules: their names.
        bytes: what keeping them in the model's dtype costs.
        kl: what quantizing them alone costs.
        dynamic_kl: likewise with dynamic inputs; None where these are no choice.
    """

    modules: tuple[str, ...]
    bytes: int
    kl: float
    dynamic_kl: float | None = None

    @property
    def gain(self) -> float:
        """What moving them to dynamic inputs wins."""
        return max(0.0, self.kl - self.dynamic_kl) if self.dynamic_kl is not None else 0.0


class Choice(NamedTuple):
    """What becomes of the parts that are not quantized like all others.

    Attributes:
        kept: those in the model's dtype.
        moved: those with dynamic inputs, in FP8 all the same.
    """

    kept: tuple[Part, ...] = ()
    moved: tuple[Part, ...] = ()

    @property
    def bytes(self) -> int:
        """By which an edition is larger."""
        return sum(part.bytes for part in self.kept)

    @property
    def cost(self) -> tuple[int, int]:
        """What choices are compared by: bytes, then how many parts are moved."""
        return self.bytes, len(self.moved)

    def left(self, parts: Iterable[Part]) -> float:
        """What the losses of all parts that are quantized add up to."""
        return sum(
            part.kl - (part.gain if part in self.moved else 0.0)
            for part in parts
            if part not in self.kept
        )


def cheapest(parts: Sequence[Part], allowed: float) -> Choice:
    """What to keep and what to move, so that the losses of what is quantized add up to no more than ``allowed``: for the
    fewest bytes, then with the fewest parts moved.

    A knapsack problem with a choice for each part. Moving costs no bytes, so parts are kept as if all others that gain by it
    were moved: greedily, the most KL per byte first, then whatever of that turns out not to be needed is given back, the
    largest first. That is no further from the least bytes than one part's. Of the others the fewest are moved that suffice
    beside what is kept: those that gain most.

    Args:
        parts: whose losses add up.
        allowed: in the unit of ``kl``; below zero all are kept.

    Returns:
        Parts in their order.
    """
    kept: list[Part] = []
    left = sum(part.kl - part.gain for part in parts)
    for part in sorted(parts, key=lambda part: (part.gain - part.kl) / max(part.bytes, 1)):
        if left <= allowed:
            break
        kept.append(part)
        left -= part.kl - part.gain
    for part in sorted(kept, key=lambda part: -part.bytes):
        if left + part.kl - part.gain <= allowed:
            kept.remove(part)
            left += part.kl - part.gain
    moved = [part for part in parts if part.gain and part not in kept]
    for part in sorted(moved, key=lambda part: part.gain):
        if left + part.gain > allowed:
            break
        moved.remove(part)
        left += part.gain
    return Choice(*(tuple(part for part in parts if part in chosen) for chosen in (kept, moved)))
