"""The sample model's edition that most of these tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import Calibration, quantize


@pytest.fixture(scope="session")
def modelopt_edition(sample: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("editions") / "modelopt"
    quantize(sample, output, calibration=Calibration(source=str(golden / "calib_tokens.npy")))
    return output
