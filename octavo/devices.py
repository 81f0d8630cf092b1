"""What GPUs can do, as their makers say it, and what is taken for granted beside them."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """One GPU.

    Attributes:
        tflop_s: dense BF16 products, peak.
        memory_gb_s: memory bandwidth, peak.
        memory: bytes.
        source: the maker's page.
    """

    tflop_s: float
    memory_gb_s: float
    memory: int
    source: str


DEVICES = {
    "a100": Device(312, 2039, 80_000_000_000, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Device(989, 3350, 80_000_000_000, "NVIDIA H100 SXM data sheet"),
    "h200": Device(989, 4800, 141_000_000_000, "NVIDIA H200 SXM data sheet"),
    "b200": Device(2250, 8000, 180_000_000_000, "NVIDIA HGX B200 data sheet"),
    "mi300x": Device(1307, 5300, 192_000_000_000, "AMD Instinct MI300X data sheet"),
}

# Shares of the peaks that a calibration and a cast are taken to reach. Not measured.
PRODUCT_SHARE = 0.5
MEMORY_SHARE = 0.5

# GB/s of local NVMe drives and of a GPU's host link. Not measured.
DISK_READ, DISK_WRITE, LINK = 6.0, 3.0, 25.0
