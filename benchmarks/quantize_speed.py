"""Seconds to quantize SmolLM2-135M-Instruct: Octavo against ModelOpt, whole processes, alternating.

ModelOpt gets an environment of its own under .cache/ (made on the first run, some minutes), and
runs with one sample at a time, as the golden files were made, and with eight.

Usage: python -m benchmarks.quantize_speed TOKENS.npy [--rounds 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.common import CACHE, ROOT, Run, median, run, sample_model, save
from benchmarks.environments import PEER_SCRIPTS, peer_python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, peer = sample_model(), peer_python("modelopt")
    script = PEER_SCRIPTS / "modelopt_quantize.py"
    octavo = Path(sys.executable).with_name("octavo")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        out = Path(scratch)
        commands: dict[str, list[str | Path]] = {
            "octavo": [octavo, "quantize", model, "-o", out / "octavo", "--overwrite", "--quiet",
                       "--calib", options.tokens],
            "modelopt, batch 1": [peer, script, model, options.tokens, out / "modelopt1", "1"],
            "modelopt, batch 8": [peer, script, model, options.tokens, out / "modelopt8", "8"],
        }  # fmt: skip
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for number in range(options.rounds):
            for name, command in commands.items():
                runs[name].append(run(command, out / "log"))
                print(f"round {number + 1}: {name}: {runs[name][-1].seconds:.1f} s", flush=True)
    seconds = {name: median([one.seconds for one in all_runs]) for name, all_runs in runs.items()}
    for name, value in seconds.items():
        peak = max(one.peak_memory for one in runs[name]) / 1e6
        print(
            f"{name:20} {value:6.1f} s median, {value / seconds['octavo']:.2f} x, peak {peak:.0f} MB"
        )
    path = save(
        "quantize_speed",
        {
            "model": "SmolLM2-135M-Instruct",
            "tokens": options.tokens.name,
            "seconds": {
                name: [round(one.seconds, 2) for one in all_runs] for name, all_runs in runs.items()
            },
            "peak_memory": {
                name: max(one.peak_memory for one in all_runs) for name, all_runs in runs.items()
            },
            "modelopt_over_octavo": {
                name: round(value / seconds["octavo"], 2)
                for name, value in seconds.items()
                if name != "octavo"
            },
        },
    )
    print(f"saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
