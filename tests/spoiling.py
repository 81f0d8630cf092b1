"""Ways to spoil an edition that a test has made a copy of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the object in ``path``."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of the one shard in ``directory``."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def hide_quantization(directory: Path) -> None:
    """Take away what says that a ModelOpt edition is quantized."""
    edit_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    (directory / "hf_quant_config.json").unlink()
