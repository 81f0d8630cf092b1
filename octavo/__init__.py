"""Octavo: FP8 editions of large language models.

The Python API, one verb each. Attributes load on first use, so that ``import octavo`` and
``octavo --help`` do not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octavo.errors import OctavoError
from octavo.version import __version__

if TYPE_CHECKING:
    from octavo.analysis import analyze
    from octavo.benchmarking import bench
    from octavo.budget import Budget
    from octavo.budgeting import quantize_within
    from octavo.calibration import Calibration
    from octavo.completion import complete
    from octavo.conversion import ConvertResult, convert
    from octavo.evaluation import evaluate
    from octavo.inspection import inspect
    from octavo.loading import load
    from octavo.pipeline import QuantizeResult, quantize
    from octavo.planning import Plan, plan
    from octavo.publishing import report
    from octavo.rotating import rotate
    from octavo.sample import sample_model
    from octavo.scheme import Scheme
    from octavo.self_calibration import write_calibration
    from octavo.serving import serve
    from octavo.synthesis import synth
    from octavo.verification import verify

_HOMES = {
    "Budget": "octavo.budget",
    "Calibration": "octavo.calibration",
    "ConvertResult": "octavo.conversion",
    "QuantizeResult": "octavo.pipeline",
    "Scheme": "octavo.scheme",
    "analyze": "octavo.analysis",
    "bench": "octavo.benchmarking",
    "complete": "octavo.completion",
    "convert": "octavo.conversion",
    "evaluate": "octavo.evaluation",
    "inspect": "octavo.inspection",
    "load": "octavo.loading",
    "Plan": "octavo.planning",
    "plan": "octavo.planning",
    "quantize": "octavo.pipeline",
    "quantize_within": "octavo.budgeting",
    "report": "octavo.publishing",
    "rotate": "octavo.rotating",
    "sample_model": "octavo.sample",
    "serve": "octavo.serving",
    "synth": "octavo.synthesis",
    "verify": "octavo.verification",
    "write_calibration": "octavo.self_calibration",
}

__all__ = [
    "Budget",
    "Calibration",
    "ConvertResult",
    "OctavoError",
    "Plan",
    "QuantizeResult",
    "Scheme",
    "__version__",
    "analyze",
    "bench",
    "complete",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "quantize",
    "quantize_within",
    "report",
    "rotate",
    "sample_model",
    "serve",
    "synth",
    "verify",
    "write_calibration",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
