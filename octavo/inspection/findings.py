"""What a check is, and what it finds: faults of one kind, in however many places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S")


class Severity(StrEnum):
    """How bad it is.

    ``error``: the edition computes wrong numbers, or no engine loads it. ``warning``: quality or
    engines may suffer. ``note``: worth knowing.
    """

    error = "error"
    warning = "warning"
    note = "note"


class Fault(NamedTuple):
    """One place where a check found something.

    Attributes:
        place: a tensor, module or file.
        found: what is there.
    """

    place: str
    found: str


@dataclass(frozen=True)
class Finding:
    """Everything one check found.

    Attributes:
        code: the check's name.
        severity: how bad it is.
        faults: where, and what.
        expected: what should be there.
        advice: what to do.
    """

    code: str
    severity: Severity
    faults: tuple[Fault, ...]
    expected: str
    advice: str


class Check(NamedTuple, Generic[S]):
    """A question about something, such as a survey of an edition.

    Attributes:
        code: its name.
        severity: of what it finds.
        find: the places where the answer is bad.
        expected: for the finding.
        advice: for the finding.
    """

    code: str
    severity: Severity
    find: Callable[[S], Iterable[Fault]]
    expected: str
    advice: str


def run_checks(checks: Iterable[Check[S]], subject: S) -> tuple[Finding, ...]:
    """What ``checks`` find in ``subject``, one finding each at most, errors first."""
    found = {check: tuple(check.find(subject)) for check in checks}
    return by_severity(
        Finding(check.code, check.severity, faults, check.expected, check.advice)
        for check, faults in found.items()
        if faults
    )


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, notes last."""
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))
