"""How far calibrated scales lie from ModelOpt's golden file: Octavo's, and ModelOpt's own.

A maximum over many tokens of a deep BF16 model carries the rounding of every matrix product before
it, and processors round differently. This runs both tools on this machine with the golden tokens,
and compares every input, key and value scale with the golden file and with each other.

Usage: python -m benchmarks.parity GOLDEN_DIRECTORY
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.common import CACHE, ROOT, run, sample_model, save
from benchmarks.environments import PEER_SCRIPTS, peer_python

_KINDS = ("input_scale", "k_scale", "v_scale")


def scales(directory: Path) -> dict[str, float]:
    """Every activation scale of a checkpoint of one file."""
    tensors = load_file(directory / "model.safetensors")
    return {name: tensor.item() for name, tensor in tensors.items() if name.endswith(_KINDS)}


def compare(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """How many scales agree, and how well."""
    away = {name: abs(ours[name] / theirs[name] - 1) for name in theirs}
    return {
        "scales": len(away),
        "equal": sum(value < 1e-6 for value in away.values()),
        "beyond_1_percent": sum(value > 0.01 for value in away.values()),
        "largest_percent": round(100 * max(away.values()), 2),
        "mean_percent": round(100 * sum(away.values()) / len(away), 3),
    }


def main() -> None:
    golden = Path(sys.argv[1])
    tokens = golden / "calib_tokens.npy"
    records = json.loads((golden / "modelopt-0.47.0" / "tensors.json").read_text())
    found = {
        "golden": {name: entry["value"] for name, entry in records.items() if name.endswith(_KINDS)}
    }
    script = PEER_SCRIPTS / "modelopt_quantize.py"
    octavo = Path(sys.executable).with_name("octavo")
    model = sample_model()
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        out = Path(scratch)
        run(
            [octavo, "quantize", model, "-o", out / "octavo", "--quiet", "--calib", tokens],
            out / "log",
        )
        found["octavo"] = scales(out / "octavo")
        for batch in ("1", "8"):
            target = out / f"modelopt{batch}"
            run([peer_python("modelopt"), script, model, tokens, target, batch], out / "log")
            found[f"modelopt, batch {batch}"] = scales(target)
    pairs = [
        ("octavo", "golden"),
        ("modelopt, batch 1", "golden"),
        ("modelopt, batch 8", "golden"),
        ("modelopt, batch 8", "modelopt, batch 1"),
        ("octavo", "modelopt, batch 1"),
        ("octavo", "modelopt, batch 8"),
    ]
    result = {f"{a} against {b}": compare(found[a], found[b]) for a, b in pairs}
    for name, row in result.items():
        print(f"{name:40} {row}")
    print(f"saved {save('parity', result).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
