"""Octavo against ModelOpt, Quark and llm-compressor: seconds, memory and disk of whole processes.

All on one machine in one run, alternating, each in its own environment (made on the first run, some
minutes), on the same model and tokens, with its ordinary settings and with those it has for models larger
than memory. What each writes is checked, so that none wins by doing less. Results are saved after every
process: docs/benchmarks/peers.json, and docs/benchmarks/peers.md drawn from it. With --only, the other
sections of an earlier run stay, if machine and versions are the same.

Usage: python -m benchmarks.peers TOKENS.npy [--rounds 2] [--only smollm2 …]
A try: python -m benchmarks.peers TOKENS.npy --rounds 1 --samples 8 --seq-len 128 --results DIRECTORY
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import CACHE, RESULTS, machine, sample_model
from benchmarks.edition_check import IncompleteError, check, compare
from benchmarks.environments import (
    PEER_SCRIPTS,
    PEERS,
    octavo_python,
    peer_python,
    variables,
    versions,
)
from benchmarks.peers_page import write_page
from benchmarks.peers_ways import PACKAGES, SECTIONS, SHAPE, Section, Way
from benchmarks.watching import bytes_in, watch


class Stage(NamedTuple):
    """A section with its files.

    Attributes:
        section: what is run.
        places: paths and values that commands have places for.
        reference: scales of the first edition, which is Octavo's; empty until there is one.
    """

    section: Section
    places: dict[str, Path | str]
    reference: dict[str, float]


def prepare(section: Section, tokens: Path, scratch: Path) -> Stage:
    """Make the model, once, and cut the tokens."""
    places: dict[str, Path | str] = {"model": sample_model(), "least_memory": section.least_memory}
    if section.layers is not None:
        places["model"] = model = scratch / f"{SHAPE}-{section.layers}"
        if not model.exists():
            print(f"making {model.name} …", flush=True)
            # In files of 500 MB: some tools hold a file in memory.
            options = f"--like {SHAPE} --layers {section.layers} --shard-size 500MB --quiet"
            synth = ["-m", "octavo.cli", "synth", *options.split(), "-o", str(model)]
            subprocess.run([octavo_python(), *synth], check=True)
    if section.samples:
        places["tokens"] = scratch / f"{section.samples}-{section.seq_len}.npy"
        part = np.load(tokens)[: section.samples, : section.seq_len].astype(np.int64)
        np.save(places["tokens"], part)
    return Stage(section, places, {})


def command_of(
    way: Way, python: Path, places: dict[str, Path | str]
) -> tuple[dict[str, str], list[str]]:
    """The variables and the command line of a way, its paths filled in."""
    words = way.command.split()
    settings = dict(word.split("=", 1) for word in takewhile(lambda word: "=" in word, words))
    first, *rest = words[len(settings) :]
    program = first if first.startswith("-") else str(PEER_SCRIPTS / first)
    return settings, [str(python), program, *(word.format(**places) for word in rest)]


def measure(way: Way, python: Path, stage: Stage, run: Path) -> dict[str, Any]:
    """Run one process, and check what it wrote.

    Args:
        way: what to run.
        python: in which environment.
        stage: on what.
        run: an empty directory that everything is written to.

    Returns:
        What it took, or why it failed.
    """
    output, scratch, temporary = (run / name for name in ("output", "scratch", "temporary"))
    scratch.mkdir()
    temporary.mkdir()
    settings, command = command_of(
        way, python, {**stage.places, "output": output, "scratch": scratch}
    )
    directories = {"TMPDIR": str(temporary), "HF_HOME": str(temporary)}
    log = run.with_suffix(".log")
    usage = watch(command, run, log, {**variables(python), **directories, **settings})
    if usage.code:
        return {"failed": f"exit code {usage.code}: {log.read_text(errors='replace')[-1500:]}"}
    try:
        scales = check(output, Path(stage.places["model"]), static="tokens" in stage.places)
        if stage.reference:
            compare(scales, stage.reference)
    except IncompleteError as error:
        return {"failed": f"an incomplete edition: {error}"}
    if not stage.reference:
        stage.reference.update(scales)
    written = bytes_in(output)
    return {
        "seconds": round(usage.seconds, 2),
        "cpu_seconds": round(usage.cpu_seconds, 2),
        "peak_memory": usage.peak_memory,
        "peak_anonymous": usage.peak_anonymous,
        "output": written,
        "beyond_output": usage.peak_disk - written,
    }


def describe(stage: Stage) -> dict[str, Any]:
    """A section's part of the results, without any yet."""
    section = stage.section
    model = Path(stage.places["model"])
    return {
        "title": section.title,
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "layers": section.layers,
        "samples": section.samples,
        "seq_len": section.seq_len,
        "commands": {name: f"{way.tool}: {way.command}" for name, way in section.ways.items()},
        "least_memory": section.least_memory,
        "runs": {name: [] for name in section.ways},
    }


def earlier(path: Path, current: dict[str, Any]) -> dict[str, Any]:
    """The sections that are saved already, of the same versions on the same machine."""
    if not path.exists():
        return {}
    saved: dict[str, Any] = json.loads(path.read_text())
    same = all(saved[key] == current[key] for key in ("machine", "versions"))
    return saved["sections"] if same else {}


def turns(chosen: list[str], rounds: int) -> Iterator[tuple[int, str, str]]:
    """Round, section and way of every process, in order."""
    for number in range(rounds):
        for name in chosen:
            for label, way in SECTIONS[name].ways.items():
                if number == 0 or not way.once:
                    yield number, name, label


def show(one: dict[str, Any]) -> str:
    """A run in a line."""
    if "failed" in one:
        return f"FAILED, {one['failed']}"
    return (
        f"{one['seconds']:.1f} s, {one['peak_memory'] / 1e9:.2f} GB of memory "
        f"({one['peak_anonymous'] / 1e9:.2f} without files), {one['output'] / 1e9:.2f} GB written, "
        f"{one['beyond_output'] / 1e9:.2f} GB more meanwhile"
    )


def run_all(options: argparse.Namespace, scratch: Path) -> int:
    """Run everything; how many runs failed."""
    pythons = {"octavo": octavo_python(), **{name: peer_python(name) for name in PEERS}}
    found = {name: versions(pythons[name], *PACKAGES[name]) for name in pythons}
    result: dict[str, Any] = {"machine": machine(), "versions": found}
    path = options.results / "peers.json"
    stages = {}
    for name in options.only:
        section = SECTIONS[name]
        less = {
            field: min(getattr(section, field), getattr(options, field))
            for field in ("samples", "seq_len")
        }
        stages[name] = prepare(section._replace(**less), options.tokens, scratch)
    sections = earlier(path, result) | {name: describe(stages[name]) for name in stages}
    result["sections"] = {name: sections[name] for name in SECTIONS if name in sections}
    failed = 0
    for number, name, label in turns(options.only, options.rounds):
        way = SECTIONS[name].ways[label]
        run = scratch / "run"
        run.mkdir()
        one = measure(way, pythons[way.tool], stages[name], run)
        shutil.rmtree(run)
        os.sync()  # so that the next does not wait for this one's writing
        failed += "failed" in one
        print(f"round {number + 1}, {name}: {label}: {show(one)}", flush=True)
        sections[name]["runs"][label].append(one)
        path.write_text(json.dumps(result, indent=2) + "\n")
        write_page(path)
    print(f"saved {path} and {path.with_suffix('.md').name}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path, help="integers [samples, seq_len], .npy")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--samples", type=int, default=1 << 20, help="at most so many")
    parser.add_argument("--seq-len", type=int, default=1 << 20, help="at most so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory to save to")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removing what is temporary
    CACHE.mkdir(exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="peers-") as scratch:
        failed = run_all(options, Path(scratch))
    sys.exit(f"{failed} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
