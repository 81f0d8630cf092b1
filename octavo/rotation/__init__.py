"""Other axes for a model's hidden states and values, in which FP8 loses less; the model's function stays.

What is rounded to E4M3 errs by a share of itself. With inputs x and a weight W, rounding either moves the outputs by
a noise of power ``Σ_i E[x_i²] |W_i|²``, ``W_i`` being the columns: it is small where large inputs meet small columns. The same
product in other axes, ``(W Mᵀ⁻¹)(M x)``, has another noise, and the axes are free wherever linear layers follow each
other: hidden states may be rotated (RMSNorm allows no more), and each head's values may be multiplied by any matrix.
"""

from octavo.rotation.basis import Rotation, blocks_of
from octavo.rotation.learning import Learned, learn_rotation, mean_noise
from octavo.rotation.rewriting import Axes, Rewriting
from octavo.rotation.surveying import Survey, survey
from octavo.rotation.values import value_axes

__all__ = [
    "Axes",
    "Learned",
    "Rewriting",
    "Rotation",
    "Survey",
    "blocks_of",
    "learn_rotation",
    "mean_noise",
    "survey",
    "value_axes",
]
