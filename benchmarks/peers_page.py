"""docs/benchmarks/peers.md, drawn from peers.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import median

_OURS = "Octavo"
_NAMES = {
    "octavo": "Octavo",
    "modelopt": "ModelOpt",
    "quark": "Quark",
    "llmcompressor": "llm-compressor",
}

_INTRODUCTION = """\
# Octavo, ModelOpt, Quark, llm-compressor

Drawn by `python -m benchmarks.peers TOKENS.npy`; raw results: [peers.json](peers.json). Whole processes from
start to exit, alternating, on one machine with {cores} cores ({cpu}), {memory_gb} GB of memory and
{gpu}, each tool in its own environment. What is compiled once per machine is compiled before.

| tool | versions |
|---|---|
{versions}

Calibrated: static FP8 weights and inputs, a scale for each tensor, and FP8 keys and values, of every linear
layer but the head. What each tool wrote is checked: every weight in FP8 with its scales, and scales equal to
Octavo's up to rounding. Medians, of {rounds} round(s); what is slow or there for its memory alone ran in the first
only.

- **memory**: the most that was resident, of all a tool's processes together. **without files**: of that, without
  pages of files, which the system drops when it needs the room.
- **output**: what was written. **beyond it**: the most that lay on the disk besides: offloaded weights, hidden
  states, checkpoints, temporary files.
"""

_HOW = """\
## How each runs

*From disk*: `accelerate` offloads the decoder layers to the disk, and the C library gives freed memory back at once
(`MALLOC_TRIM_THRESHOLD_=0`; without it llm-compressor's grows with the model). ModelOpt's *layer-wise* calibration
takes one layer after the other, with a checkpoint of every layer's statistics, and exports layer by layer.
llm-compressor calibrates sequentially by default; *from disk*, samples pass through each layer once rather than
twice. Both write shards of 100 MB then, since they hold one in memory. Quark has no such mode for static FP8 on a
CPU: it loads every layer for every batch, and keeps what it has quantized in memory; its *file to file* mode writes
no scales of inputs, keys and values, whatever it is asked for, and its *per-block* mode wants an accelerator.
ModelOpt without calibration keeps every offloaded weight that it has touched in memory. Programs:
`benchmarks/peer_scripts/`.

| | environment and command |
|---|---|
"""


def write_page(results: Path) -> None:
    """Draw the page of a file of results beside it."""
    result = json.loads(results.read_text())
    sections = result["sections"]
    parts = [_introduction(result), *(_section(section) for section in sections.values())]
    small, large = sections.get("growth"), sections.get("1b")
    if small and large and all(small[key] == large[key] for key in ("samples", "seq_len")):
        parts.append(_growth(small, large))
    rows = {  # each once
        f"| {name} | `{command.format_map(_Placeholders(section))}` |\n": None
        for section in sections.values()
        for name, command in section["commands"].items()
    }
    parts.append(_HOW + "".join(rows))
    results.with_suffix(".md").write_text("\n".join(parts))


class _Placeholders(dict[str, str]):
    """Leaves paths out of a command, but not its limit."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__(least_memory=section["least_memory"])

    def __missing__(self, key: str) -> str:
        return key.upper()


def _introduction(result: dict[str, Any]) -> str:
    versions = "\n".join(
        f"| {_NAMES[tool]} | {', '.join(f'{name} {version}' for name, version in packages.items())} |"
        for tool, packages in result["versions"].items()
    )
    machine = result["machine"]
    rounds = max(
        len(runs) for section in result["sections"].values() for runs in section["runs"].values()
    )
    return _INTRODUCTION.format(
        **{**machine, "gpu": machine["gpu"] or "no GPU"}, versions=versions, rounds=rounds
    )


def _section(section: dict[str, Any]) -> str:
    """One model's table, and how Octavo stands in it."""
    tokens = (
        f"{section['samples']} × {section['seq_len']} tokens" if section["samples"] else "no tokens"
    )
    lines = [
        f"## {section['title']}: {section['model_bytes'] / 1e9:.2f} GB, {tokens}",
        "",
        "| | seconds | against Octavo | memory, GB | without files | output, GB | beyond it |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = _medians(section["runs"][_OURS])
    medians = {name: _medians(runs) for name, runs in section["runs"].items()}
    for name, values in medians.items():
        if values is None:
            failed = next((run["failed"] for run in section["runs"][name]), "not run yet")
            lines.append(f"| {name} | {failed.splitlines()[-1] if failed else failed} | | | | | |")
            continue
        ratio = f"{values['seconds'] / ours['seconds']:.2f} ×" if ours else ""
        fields = ("peak_memory", "peak_anonymous", "output", "beyond_output")
        cells = " | ".join(f"{values[field] / 1e9:.2f}" for field in fields)
        lines.append(f"| {name} | {values['seconds']:.1f} | {ratio} | {cells} |")
    others = {
        name: values for name, values in medians.items() if values and not name.startswith(_OURS)
    }
    if ours and others:
        lines += ["", _standing(ours, others)]
    return "\n".join(lines) + "\n"


def _standing(ours: dict[str, float], others: dict[str, dict[str, float]]) -> str:
    """How the best of the others compare."""

    def best(field: str, show: Callable[[float], str]) -> str:
        name = min(others, key=lambda one: others[one][field])
        value = others[name][field]
        return f"{show(value)} ({name}), {value / ours[field]:.2f} × Octavo's {show(ours[field])}"

    return (
        f"Of the others, the fastest takes {best('seconds', lambda s: f'{s:.1f} s')}; the smallest memory is "
        f"{best('peak_memory', lambda b: f'{b / 1e9:.2f} GB')}; without files it is "
        f"{best('peak_anonymous', lambda b: f'{b / 1e9:.2f} GB')}."
    )


def _growth(small: dict[str, Any], large: dict[str, Any]) -> str:
    """How memory grows with the number of layers: flat is 0, a model that is in memory once is 1."""
    added = (large["model_bytes"] - small["model_bytes"]) / 1e9
    lines = [
        f"## Growth of memory with model size: {small['layers']} and {large['layers']} layers",
        "",
        f"The same layers and tokens, {added:.2f} GB more of weights. 0 is flat; 1, the weights are in memory once.",
        "",
        "| | memory, GB | | without files, GB | | GB for each GB of weights | without files |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in large["runs"]:
        few, many = _medians(small["runs"][name]), _medians(large["runs"][name])
        if few and many:
            fields = ("peak_memory", "peak_anonymous")
            sizes = [f"{one[field] / 1e9:.2f}" for field in fields for one in (few, many)]
            slopes = [f"{(many[field] - few[field]) / 1e9 / added:+.2f}" for field in fields]
            lines.append("| " + " | ".join([name, *sizes, *slopes]) + " |")
    return "\n".join(lines) + "\n"


def _medians(runs: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Medians of what did not fail; None where nothing did not."""
    finished = [run for run in runs if "failed" not in run]
    if not finished:
        return None
    return {field: median([run[field] for run in finished]) for field in finished[0]}
