"""The same run on many machines: stages of decoder layers on Ray.

Each worker owns a contiguous run of layers. It reads only those and writes only those, and holds as many of
them in memory at a time as fit. The calibration samples flow from worker to worker a batch at a time: a worker
asks the one before it for a few batches ahead and computes on those it has, so that stages overlap and nobody
is flooded. Batches stay in the files of the worker that made them until the end. A worker that dies is
started again by Ray, goes on from its journal, and finds or makes again whatever it is asked for. A lock on
each stage keeps a worker that lives on unnoticed, its driver killed or its network cut, from writing beside
its successor.

Statistics are maxima and batches are those of a single process, so the edition is the same to the last byte.

:mod:`~octavo.cluster.orders` decides, :mod:`~octavo.cluster.worker` does a stage, :mod:`~octavo.cluster.crew`
sees all of them through, :mod:`~octavo.cluster.session` speaks with Ray.
"""

from octavo.cluster.crew import run_stages
from octavo.cluster.orders import (
    GPU_SHARE,
    Order,
    hold_layers,
    make_orders,
    passes_of,
    split,
    worker_device,
    worker_memory,
    worker_threads,
)
from octavo.cluster.worker import Outcome, Report

__all__ = [
    "GPU_SHARE",
    "Order",
    "Outcome",
    "Report",
    "hold_layers",
    "make_orders",
    "passes_of",
    "run_stages",
    "split",
    "worker_device",
    "worker_memory",
    "worker_threads",
]
