"""The sample model's edition that most of these tests look at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Quantized(NamedTuple):
    """What a run of ``octavo quantize`` wrote, and what it told."""

    edition: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def quantized(sample: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """By the program a user runs, with all of the golden tokens."""
    octavo, output = Path(sys.executable).with_name("octavo"), tmp_path_factory.mktemp("editions")
    edition, tokens = output / "modelopt", golden / "calib_tokens.npy"
    command = [octavo, "quantize", sample, "-o", edition, "--calib", tokens, "--json"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return Quantized(edition, json.loads(run.stdout))


@pytest.fixture(scope="session")
def modelopt_edition(quantized: Quantized) -> Path:
    return quantized.edition
