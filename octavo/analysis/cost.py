"""What an analysis takes, known before it begins.

Every variant of a layer goes through all layers after it, so that the work grows with the square of the number of
layers: 6 variants to a layer are about 2,900 passes of the windows through a layer for 30 layers, 13,000 for 64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from octavo.analysis.units import Unit
from octavo.analysis.variants import FIRST, variants_shape
from octavo.job import Job, hidden_shape
from octavo.memory import Settings


class Cost(NamedTuple):
    """How much is to be done.

    Attributes:
        units: measured, each on its own, whole layers among them.
        tokens: of all windows.
        passes: of the windows through a decoder layer.
        calibration_tokens: that go through every layer once, to take scales on; 0 without calibration.
        work: all of it, the final norm and ``lm_head`` included, in passes of the windows through a layer.
        disk: bytes of hidden states.
    """

    units: int
    tokens: int
    passes: int
    calibration_tokens: int
    work: float
    disk: int


def cost_of(
    job: Job, units: Sequence[Unit], samples: Tensor | None, tokens: Tensor, settings: Settings
) -> Cost:
    """What :func:`octavo.analysis.measuring.measure` will do with the same arguments and these units."""
    layers, slots = len(job.plans), FIRST + len(units)
    new = Counter(unit.layer for unit in units)
    passes = sum(FIRST + begun for begun in accumulate(new[index] for index in range(layers)))
    disk = variants_shape(job.decoder, slots, *tokens.shape).nbytes
    if samples is not None:
        # Two files take turns.
        disk += 2 * hidden_shape(job, samples, settings).nbytes
    calibrated = 0 if samples is None else samples.numel()
    return Cost(
        units=len(units),
        tokens=tokens.numel(),
        passes=passes,
        calibration_tokens=calibrated,
        work=passes + calibration_work(samples, tokens) * layers + slots * head_work(job),
        disk=disk,
    )


def calibration_work(samples: Tensor | None, tokens: Tensor) -> float:
    """What a pass of the samples through a layer is, in passes of the windows."""
    return 0.0 if samples is None else samples.numel() / tokens.numel()


def head_work(job: Job) -> float:
    """What a pass of the windows through ``lm_head`` is, in passes through a layer, by their sizes."""
    config = job.decoder.config
    weights = sum(
        job.checkpoint[f"{module}.weight"].nbytes
        for module in (*job.plans[0].linears, *job.plans[0].kept)
    )
    return float(config.vocab_size * config.hidden_size * job.decoder.dtype.itemsize / weights)
