"""Text → tokens → layer inputs → statistics, streamed layer by layer."""

from octavo.calibration.stream import CalibrationStream
from octavo.calibration.tokens import Calibration, load_tokens

__all__ = ["Calibration", "CalibrationStream", "load_tokens"]
