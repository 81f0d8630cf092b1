"""The machine the numbers come from."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from pydantic import PositiveInt

from octavo.reporting.validation import Frozen


class Machine(Frozen):
    """A computer.

    Attributes:
        cpu: the processor by its maker's name.
        cores: as the operating system counts them.
        gpus: by their maker's names.
        os: operating system and version.
    """

    cpu: str
    cores: PositiveInt
    gpus: tuple[str, ...]
    os: str


def this_machine() -> Machine:
    """The one this runs on."""
    return Machine(
        cpu=_processor(),
        cores=os.cpu_count() or 1,
        gpus=_gpus(),
        os=platform.platform(),
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _gpus() -> tuple[str, ...]:
    import torch

    if torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    # The engine may have a PyTorch of its own that sees more than this one.
    if program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if found.returncode == 0:
            return tuple(found.stdout.splitlines())
    return ()
