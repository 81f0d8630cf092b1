"""Where a model loses by FP8, measured before it is quantized: each part's KL divergence, each linear layer's errors."""

from octavo.analysis.analyzing import LinearLoss, analyze, linear_losses
from octavo.analysis.cost import Cost, cost_of
from octavo.analysis.measuring import Measured, all_units, measure
from octavo.analysis.units import KV_CACHE, LAYER, Unit

__all__ = [
    "KV_CACHE",
    "LAYER",
    "Cost",
    "LinearLoss",
    "Measured",
    "Unit",
    "all_units",
    "analyze",
    "cost_of",
    "linear_losses",
    "measure",
]
