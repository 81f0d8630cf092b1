"""What is quantized and how: a frozen, validated description, without tensors.

Weights are always E4M3, symmetric, one static scale per tensor. ``lm_head``, embeddings and norms
keep their dtype.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Scheme(BaseModel):
    """The choices that decide which numbers an edition holds.

    Attributes:
        inputs: scales of the linear layers' inputs: ``static`` (one per tensor, calibrated) or
            ``dynamic`` (computed by the engine for each token, nothing stored).
        kv_cache: ``fp8`` stores ``k_scale`` and ``v_scale`` for each attention block, ``none``
            leaves the cache in the model's dtype.
        exclude: shell-style patterns over module names (``model.layers.0.*``, ``*.o_proj``);
            a linear layer that matches any of them keeps its dtype.
        merge_scales: give q/k/v and gate/up one shared weight scale, as engines that fuse them
            into one matrix product want it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: Literal["static", "dynamic"] = "static"
    kv_cache: Literal["fp8", "none"] = "fp8"
    exclude: tuple[str, ...] = ()
    merge_scales: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether any scale depends on data."""
        return self.inputs == "static" or self.kv_cache == "fp8"

    def excludes(self, module: str) -> bool:
        """Whether the linear layer named ``module`` keeps its dtype."""
        return any(fnmatchcase(module, pattern) for pattern in self.exclude)


# Linear layers that engines fuse into one matrix, by the last part of their names.
FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
