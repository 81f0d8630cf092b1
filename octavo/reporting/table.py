"""The evaluation as a table, before and after: the same in the card and in the HTML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from octavo.reporting.numbers import number, percent_change, plus_minus
from octavo.reporting.results import (
    Accuracy,
    Divergence,
    Estimate,
    MmluComparison,
    PerplexityComparison,
    Results,
)
from octavo.units import format_bytes

NOTHING = "–"


class Row(NamedTuple):
    """A measure of the base model and of the edition, as text.

    Attributes:
        measure: its name.
        detail: data, counts and unit.
        before: on the base model.
        after: on the edition.
        change: from one to the other.
    """

    measure: str
    detail: str
    before: str
    after: str
    change: str


class Figure(NamedTuple):
    """One of the few numbers that a reader looks for first."""

    label: str
    value: str
    note: str


def rows(results: Results) -> list[Row]:
    """Everything measured, a row each."""
    edition, evaluation = results.edition, results.evaluation
    found = [
        Row(
            "Size",
            "tensors on disk",
            format_bytes(edition.bytes_before),
            format_bytes(edition.bytes_after),
            percent_change(edition.bytes_before, edition.bytes_after),
        )
    ]
    if evaluation.perplexity:
        found.append(_perplexity_row(evaluation.perplexity))
    if evaluation.divergence:
        found.extend(_divergence_rows(evaluation.divergence))
    if evaluation.mmlu:
        found.append(_mmlu_row(evaluation.mmlu))
    return found


def category_rows(mmlu: MmluComparison) -> list[Row]:
    """MMLU by category."""
    return list(_accuracies(mmlu.before.categories, mmlu.after.categories))


def subject_rows(mmlu: MmluComparison) -> list[Row]:
    """MMLU by subject."""
    return list(_accuracies(mmlu.before.subjects, mmlu.after.subjects))


def figures(results: Results) -> list[Figure]:
    """The headline: size, and what it cost."""
    edition, evaluation = results.edition, results.evaluation
    found = [
        Figure(
            "Size",
            percent_change(edition.bytes_before, edition.bytes_after),
            f"{format_bytes(edition.bytes_before)} → {format_bytes(edition.bytes_after)}",
        )
    ]
    if perplexity := evaluation.perplexity:
        found.append(
            Figure(
                "Perplexity",
                percent_change(1, perplexity.ratio.value, decimals=2),
                f"{perplexity.before.value:.3f} → {perplexity.after.value:.3f}",
            )
        )
    if divergence := evaluation.divergence:
        found.append(Figure("KL divergence", number(divergence.mean.value), "nats per token, mean"))
        found.append(
            Figure(
                "Same first choice",
                f"{100 * divergence.top1_agreement.value:.1f} %",
                "of next tokens",
            )
        )
    if mmlu := evaluation.mmlu:
        before, after = 100 * mmlu.before.value, 100 * mmlu.after.value
        found.append(Figure("MMLU", f"{after:.1f} %", f"{before:.1f} % before"))
    return found


def _perplexity_row(perplexity: PerplexityComparison) -> Row:
    before, after = perplexity.before, perplexity.after
    return Row(
        "Perplexity",
        f"{after.data}, {after.windows:,} windows of {after.seq_len:,} tokens",
        plus_minus(before, decimals=3),
        plus_minus(after, decimals=3),
        _relative(perplexity),
    )


def _relative(perplexity: PerplexityComparison) -> str:
    ratio = perplexity.ratio
    change = Estimate(value=ratio.value - 1, standard_error=ratio.standard_error)
    return plus_minus(change, scale=100, decimals=2, signed=True, unit="%")


def _divergence_rows(divergence: Divergence) -> Iterator[Row]:
    where = f"{divergence.data}, {divergence.windows:,} windows of {divergence.seq_len:,} tokens"
    yield Row(
        "KL divergence from the base",
        f"nats per token, mean; {where}",
        NOTHING,
        _nats(divergence.mean),
        NOTHING,
    )
    yield Row(
        "KL divergence, worst 1 % of tokens",
        "nats per token, mean",
        NOTHING,
        number(divergence.worst_1_percent),
        NOTHING,
    )
    yield Row(
        "Same most likely next token",
        "share of tokens",
        NOTHING,
        plus_minus(divergence.top1_agreement, scale=100, decimals=1, unit="%"),
        NOTHING,
    )


def _nats(estimate: Estimate) -> str:
    # Without a standard error, nothing else says how many decimals a small number needs.
    known = estimate.standard_error
    return plus_minus(estimate) if known else number(estimate.value)


def _mmlu_row(mmlu: MmluComparison) -> Row:
    return Row(
        "MMLU",
        f"{mmlu.after.shots}-shot accuracy, {mmlu.after.questions:,} questions",
        plus_minus(mmlu.before, scale=100, decimals=1, unit="%"),
        plus_minus(mmlu.after, scale=100, decimals=1, unit="%"),
        plus_minus(mmlu.change, scale=100, decimals=1, signed=True, unit="points"),
    )


def _accuracies(before: dict[str, Accuracy], after: dict[str, Accuracy]) -> Iterator[Row]:
    for name in (name for name in before if name in after):
        points = 100 * (after[name].value - before[name].value)
        yield Row(
            name.replace("_", " "),
            f"{after[name].questions:,} questions",
            plus_minus(before[name], scale=100, decimals=1, unit="%"),
            plus_minus(after[name], scale=100, decimals=1, unit="%"),
            f"{points:+.1f} points".replace("-", "−"),
        )
