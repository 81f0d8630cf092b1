"""What loss is acceptable, and which parts of a model to keep in its dtype for it: the cheapest in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypeVar

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

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class Part(Protocol):
    """Linear layers that are kept or quantized together, such as :class:`octavo.analysis.UnitLoss`.

    Attributes:
        kl: what quantizing them alone costs.
        bytes: what keeping them costs.
    """

    @property
    def kl(self) -> float: ...

    @property
    def bytes(self) -> int: ...


P = TypeVar("P", bound=Part)


def cheapest(parts: Sequence[P], allowed: float) -> list[P]:
    """Parts to keep, so that the ``kl`` of the others adds up to no more than ``allowed``.

    A knapsack problem, solved greedily: the most KL per byte first, then whatever of that turns out not to be needed
    is given back, the largest first. No further from the least bytes than one part's.

    Args:
        parts: whose losses add up.
        allowed: in the unit of ``kl``; below zero all are kept.
    """
    kept: list[P] = []
    left = sum(part.kl for part in parts)
    for part in sorted(parts, key=lambda part: -part.kl / max(part.bytes, 1)):
        if left <= allowed:
            break
        kept.append(part)
        left -= part.kl
    for part in sorted(kept, key=lambda part: -part.bytes):
        if left + part.kl <= allowed:
            kept.remove(part)
            left += part.kl
    return kept
