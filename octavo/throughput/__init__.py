"""How fast servers are, side by side: a client that loads them, and what its timings amount to.

Any server of the OpenAI completions API will do; nothing here starts one.
"""

from octavo.throughput.endpoint import Endpoint, ask, base_url
from octavo.throughput.machine import Machine, this_machine
from octavo.throughput.metrics import METRICS, compare
from octavo.throughput.notes import find_notes
from octavo.throughput.passes import Candidate, Measured, OnRequest, check_context, measure
from octavo.throughput.results import (
    BenchResults,
    Comparison,
    Contender,
    Pass,
    Request,
    Spread,
)
from octavo.throughput.workload import Load, Workload, parse_concurrency, plan_loads
from octavo.throughput.writing import check_output, write_results

__all__ = [
    "METRICS",
    "BenchResults",
    "Candidate",
    "Comparison",
    "Contender",
    "Endpoint",
    "Load",
    "Machine",
    "Measured",
    "OnRequest",
    "Pass",
    "Request",
    "Spread",
    "Workload",
    "ask",
    "base_url",
    "check_context",
    "check_output",
    "compare",
    "find_notes",
    "measure",
    "parse_concurrency",
    "plan_loads",
    "this_machine",
    "write_results",
]
