"""What an edition cost, for people: a model card, a page with figures, and all the numbers.

It draws and never measures: everything comes from a :class:`Results`.
"""

from octavo.reporting.base_card import BaseCard, read_base_card
from octavo.reporting.record import Record, read_record
from octavo.reporting.results import (
    Accuracy,
    Divergence,
    Edition,
    Environment,
    Estimate,
    Evaluation,
    Histogram,
    Mmlu,
    MmluComparison,
    Perplexity,
    PerplexityComparison,
    Results,
)
from octavo.reporting.writing import check_report_target, write_report

__all__ = [
    "Accuracy",
    "BaseCard",
    "Divergence",
    "Edition",
    "Environment",
    "Estimate",
    "Evaluation",
    "Histogram",
    "Mmlu",
    "MmluComparison",
    "Perplexity",
    "PerplexityComparison",
    "Record",
    "Results",
    "check_report_target",
    "read_base_card",
    "read_record",
    "write_report",
]
