"""What benchmarks/peers.py runs: ways to run each tool, and the models they are run on."""

from __future__ import annotations

from typing import NamedTuple


class Way(NamedTuple):
    """A way to run a tool.

    Attributes:
        tool: the environment.
        command: variables to set, a program of benchmarks/peer_scripts (or Python's ``-m``) and its arguments,
            with places for paths.
        once: whether one round is enough: it is slow, or only its memory is looked at.
    """

    tool: str
    command: str
    once: bool = False


class Section(NamedTuple):
    """One model and one task.

    Attributes:
        title: for people.
        layers: of the synthetic model; None for the sample model.
        ways: what takes part, by what it is called; Octavo first.
        samples: calibration samples; 0 for weights alone.
        seq_len: tokens of each.
        least_memory: a limit Octavo just accepts.
    """

    title: str
    layers: int | None
    ways: dict[str, Way]
    samples: int
    seq_len: int
    least_memory: str = ""


# The C library gives freed memory back at once. Without it, what the tools free stays with them.
_FRUGAL = "MALLOC_TRIM_THRESHOLD_=0 "
_OCTAVO = "-m octavo.cli quantize {model} -o {output} --quiet"
_CALIBRATED = _OCTAVO + " --calib {tokens}"
_MODELOPT = "modelopt_quantize.py {model} {tokens} {output}"
_QUARK = "quark_quantize.py {model} {tokens} {output}"
_LLM_COMPRESSOR = "llmcompressor_quantize.py {model} {tokens} {output}"

_ALL = {
    "Octavo": Way("octavo", _CALIBRATED),
    "Octavo, least memory": Way("octavo", _CALIBRATED + " --max-memory {least_memory}", once=True),
    "ModelOpt, batch 1": Way("modelopt", _MODELOPT + " 1"),
    "ModelOpt, batch 8": Way("modelopt", _MODELOPT + " 8"),
    "ModelOpt, layer-wise from disk": Way(
        "modelopt", _FRUGAL + _MODELOPT + " 8 {scratch}", once=True
    ),
    "Quark, batch 1": Way("quark", _QUARK + " 1", once=True),
    "Quark, batch 8": Way("quark", _QUARK + " 8"),
    "Quark, from disk": Way("quark", _FRUGAL + _QUARK + " 8 {scratch}", once=True),
    "llm-compressor, batch 1": Way("llmcompressor", _LLM_COMPRESSOR + " 1", once=True),
    "llm-compressor, batch 8": Way("llmcompressor", _LLM_COMPRESSOR + " 8"),
    "llm-compressor, sequential from disk": Way(
        "llmcompressor", _FRUGAL + _LLM_COMPRESSOR + " 8 {scratch}", once=True
    ),
}
# Without the slower of two batch sizes.
_FEWER = {name: way for name, way in _ALL.items() if not name.endswith("batch 1")}
_ONCE = {name: way._replace(once=True) for name, way in _FEWER.items()}
_WEIGHTS = {
    "Octavo": Way("octavo", _OCTAVO + " --scheme fp8-dynamic"),
    "ModelOpt, from disk": Way(
        "modelopt", _FRUGAL + "modelopt_weights.py {model} {output} {scratch}"
    ),
    "Quark, file to file": Way("quark", _FRUGAL + "quark_weights.py {model} {output}"),
    "llm-compressor, file to file": Way(
        "llmcompressor", _FRUGAL + "llmcompressor_weights.py {model} {output}"
    ),
}

SHAPE = "llama-3.2-1b"
"""What the synthetic models are like."""

SECTIONS = {
    "smollm2": Section("SmolLM2-135M-Instruct", None, _ALL, 128, 512, "750MB"),
    "1b": Section(f"Random weights, {SHAPE}", 16, _FEWER, 32, 256, "950MB"),
    "growth": Section(f"Half as many layers of {SHAPE}", 8, _ONCE, 32, 256, "950MB"),
    "weights": Section(f"Weights alone, {SHAPE}", 16, _WEIGHTS, 0, 0),
}

PACKAGES = {
    "octavo": ("octavo", "torch", "transformers"),
    "modelopt": ("nvidia-modelopt", "torch", "transformers", "accelerate"),
    "quark": ("amd-quark", "torch", "transformers"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "torch", "transformers"),
}
"""In whose versions readers will be interested, for each environment."""
