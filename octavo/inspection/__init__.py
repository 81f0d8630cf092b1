"""What is in a checkpoint, and what is wrong with it."""

from octavo.inspection.findings import (
    Check,
    Fault,
    Finding,
    Severity,
    by_severity,
    run_checks,
)
from octavo.inspection.overview import Inspection, as_json, describe, inspect, open_edition
from octavo.inspection.reference import Comparison, compare
from octavo.inspection.survey import OnProgress, Progress, silent
from octavo.inspection.tensor import TensorReport, inspect_tensor

__all__ = [
    "Check",
    "Comparison",
    "Fault",
    "Finding",
    "Inspection",
    "OnProgress",
    "Progress",
    "Severity",
    "TensorReport",
    "as_json",
    "by_severity",
    "compare",
    "describe",
    "inspect",
    "inspect_tensor",
    "open_edition",
    "run_checks",
    "silent",
]
