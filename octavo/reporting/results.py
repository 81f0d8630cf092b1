"""Every number of a report, with what it takes to get them again: the content of results.json.

The other files of a report are drawn from this one alone.
"""

from __future__ import annotations

import datetime
import itertools
from typing import Annotated

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from octavo.reporting.base_card import BaseCard
from octavo.reporting.record import Record
from octavo.reporting.validation import Frozen
from octavo.scheme import Scheme

Share = Annotated[float, Field(ge=0, le=1)]


class Environment(Frozen):
    """Where and when the numbers were measured.

    Attributes:
        octavo: version of Octavo; likewise ``python``, ``torch``, ``transformers``.
        engine: what ran the models: ``torch`` or ``vllm``.
        device: the processor or GPU by its maker's name.
        os: operating system and version.
        date: day of the measurement.
    """

    octavo: str
    python: str
    torch: str
    transformers: str
    engine: str
    device: str
    os: str
    date: datetime.date


class Edition(Frozen):
    """The checkpoint that was measured.

    Attributes:
        name: its directory's name.
        base_model: the base model's directory name or hub id.
        format: dialect, such as ``modelopt``.
        scheme: what is quantized and how.
        bytes_before: bytes of the base model's tensors.
        bytes_after: bytes of the edition's tensors.
    """

    name: str
    base_model: str
    format: str
    scheme: Scheme
    bytes_before: PositiveInt
    bytes_after: PositiveInt


class Estimate(Frozen):
    """A number with its standard error, in the same unit; None where there is no telling, as from a
    single window."""

    value: float
    standard_error: NonNegativeFloat | None


class Perplexity(Estimate):
    """Perplexity over non-overlapping windows.

    Attributes:
        data: name of the text.
        tokens: predicted and scored.
        windows: how many.
        seq_len: tokens in each.
    """

    data: str
    tokens: PositiveInt
    windows: PositiveInt
    seq_len: PositiveInt


class Histogram(Frozen):
    """Counts between edges; ``len(edges) == len(counts) + 1``.

    Attributes:
        edges: increasing, in the quantity's unit; the first may be 0, to take in what lies below
            the second.
        counts: how many values lie between each edge and the next.
    """

    edges: tuple[NonNegativeFloat, ...]
    counts: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _fits(self) -> Histogram:
        if len(self.counts) < 2 or len(self.edges) != len(self.counts) + 1:
            raise ValueError("a histogram of N counts, at least 2, has N + 1 edges")
        if any(low >= high for low, high in itertools.pairwise(self.edges)):
            raise ValueError("the edges of a histogram increase")
        if not any(self.counts):
            raise ValueError("a histogram holds at least one value")
        return self


class Divergence(Frozen):
    """KL(base ‖ edition) of the next-token distributions, in nats per token.

    Attributes:
        mean: over all tokens.
        worst_1_percent: mean over the 1 % of tokens where it is largest.
        top1_agreement: share of tokens where both models' most likely token is the same.
        histogram: tokens by their divergence.
        data: name of the text.
        tokens: compared.
        windows: how many.
        seq_len: tokens in each.
    """

    mean: Estimate
    worst_1_percent: float
    top1_agreement: Estimate
    histogram: Histogram
    data: str
    tokens: PositiveInt
    windows: PositiveInt
    seq_len: PositiveInt


class Accuracy(Estimate):
    """Share of questions answered correctly, 0 to 1."""

    value: Share
    questions: PositiveInt


class Mmlu(Accuracy):
    """Accuracy on MMLU over all questions.

    Attributes:
        shots: answered examples before each question.
        categories: accuracy by category.
        subjects: accuracy by subject.
    """

    shots: NonNegativeInt
    categories: dict[str, Accuracy]
    subjects: dict[str, Accuracy]


class PerplexityComparison(Frozen):
    """Perplexity on the same windows.

    Attributes:
        before: the base model's.
        after: the edition's.
        ratio: after / before. Its standard error is that of the windows' differences, where the
            text's own difficulty cancels: much smaller than those of the two alone.
    """

    before: Perplexity
    after: Perplexity
    ratio: Estimate


class MmluComparison(Frozen):
    """MMLU on the same questions.

    Attributes:
        before: the base model's.
        after: the edition's.
        change: after - before, as a share. Its standard error is that of the paired answers; None
            where these were not compared.
    """

    before: Mmlu
    after: Mmlu
    change: Estimate


class Evaluation(Frozen):
    """What quantization cost; None for what was not measured."""

    perplexity: PerplexityComparison | None = None
    divergence: Divergence | None = None
    mmlu: MmluComparison | None = None


class Results(Frozen):
    """A report's content.

    Attributes:
        environment: where and when.
        edition: what.
        base_card: what the base model's card says that holds for the edition too.
        evaluation: what it cost.
        commands: the command lines that measure it again.
        record: how the edition was made; None where it carries no record.
    """

    environment: Environment
    edition: Edition
    base_card: BaseCard = BaseCard()
    evaluation: Evaluation = Evaluation()
    commands: tuple[str, ...] = ()
    record: Record | None = None
