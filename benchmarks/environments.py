"""The peers' own environments under .cache/, made on the first run, which takes some minutes.

``.cache/NAME-env`` may also be a link to an environment that is elsewhere, with a file ``ready`` in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.common import CACHE, ROOT

# First, so that its CPU build is kept: by default the peers' requirements bring CUDA's libraries.
_TORCH = "torch==2.13.0"

# Under the names of their directories. The versions of those that have golden files are the ones that made them;
# llmcompressor allows no later transformers.
PEERS = {
    "modelopt": (
        "nvidia-modelopt==0.47.0",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "datasets==5.2.0",
        "requests==2.34.2",
    ),
    "quark": ("amd-quark==0.13", "transformers==5.23.0", "accelerate==1.15.0"),
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers==5.17.0", "accelerate==1.15.0"),
    "auto-round": (
        "auto-round==0.16.1",
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "compressed-tensors==0.20.0",
        "datasets==5.2.0",
    ),
}

# What runs in them.
PEER_SCRIPTS = ROOT / "benchmarks" / "peer_scripts"

# What quark.torch compiles when first imported, with ninja and a C++ compiler, half a minute.
_COMPILES_AT_IMPORT = {"quark": "quark.torch"}


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment."""
    home = CACHE / f"{name}-env"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        print(f"installing {name} into its own environment …", flush=True)
        venv.create(home, with_pip=True, clear=True)
        for packages in ((_TORCH,), PEERS[name]):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        if name in _COMPILES_AT_IMPORT:
            code = f"import {_COMPILES_AT_IMPORT[name]}"
            subprocess.run([python, "-c", code], check=True, env=variables(python))
        (home / "ready").touch()
    return python


def variables(python: Path) -> dict[str, str]:
    """The environment variables that a tool runs with: its own programs first, and no network."""
    binaries = python.parent
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(binaries.parent / "kernels"),
        "HF_HUB_OFFLINE": "1",
    }


def versions(python: Path, *packages: str) -> dict[str, str]:
    """The versions of packages in an environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    found = subprocess.run(
        [python, "-c", code, *packages], check=True, capture_output=True, text=True
    )
    result: dict[str, str] = json.loads(found.stdout)
    return result


def octavo_python() -> Path:
    """The interpreter of Octavo's environment, which is this one."""
    return Path(sys.executable)
