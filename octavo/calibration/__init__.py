"""Text → tokens → layer inputs → statistics, streamed layer by layer."""

from octavo.calibration.hidden import HiddenShape, HiddenStates, batch_sizes
from octavo.calibration.ranges import COUNTS_BYTES
from octavo.calibration.stream import (
    BATCH_TOKENS,
    MOMENT_TOKENS,
    CalibrationStream,
    Examples,
    batches_at_once,
)
from octavo.calibration.tokens import Calibration, check_length, load_tokens

__all__ = [
    "BATCH_TOKENS",
    "COUNTS_BYTES",
    "MOMENT_TOKENS",
    "Calibration",
    "CalibrationStream",
    "Examples",
    "HiddenShape",
    "HiddenStates",
    "batch_sizes",
    "batches_at_once",
    "check_length",
    "load_tokens",
]
