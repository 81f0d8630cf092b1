"""Is an edition sound, is it near its original, and does an engine take it as it is?"""

from octavo.verification.running import Scores
from octavo.verification.verifying import Verification, verify

__all__ = ["Scores", "Verification", "verify"]
