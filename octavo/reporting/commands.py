"""The commands a reader of the report can type: to make the edition again, and to serve it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from octavo.reporting.record import Record
from octavo.reporting.results import Edition


class Snippet(NamedTuple):
    """Something to type, and where.

    Attributes:
        title: what it is for.
        language: ``sh`` or ``python``.
        code: what to type.
    """

    title: str
    language: str
    code: str


def make_again(record: Record, edition: str) -> Snippet:
    """What makes the edition again, byte for byte given the same versions."""
    scheme, calibration = record.scheme, record.calibration
    options = [["-o", edition], ["--format", record.format], ["--scheme", scheme.kind]]
    options.append(["--kv-cache", scheme.kv_cache])
    if calibration is not None:
        options.append(["--calib", calibration.source])
        if calibration.text_field != "text":
            options.append(["--text-field", calibration.text_field])
        options.append(
            ["--samples", f"{calibration.samples}", "--seq-len", f"{calibration.seq_len}"]
        )
        options.append(["--seed", f"{calibration.seed}"])
    options.extend(["--exclude", pattern] for pattern in scheme.exclude)
    if scheme.merge_scales:
        options.append(["--merge-scales"])
    lines = [["octavo", "quantize", record.base_model], *options]
    return Snippet("Quantize", "sh", " \\\n  ".join(shlex.join(line) for line in lines))


def serve(edition: Edition) -> list[Snippet]:
    """How engines that read the edition's dialect serve it."""
    return [_ENGINES[engine](edition) for engine in _READ_BY.get(edition.format, ("vLLM",))]


def _vllm(edition: Edition) -> Snippet:
    # Without the option vLLM keeps the cache in the model's dtype and leaves the scales unused.
    cache = ["--kv-cache-dtype", "fp8"] if edition.scheme.kv_cache == "fp8" else []
    return Snippet("vLLM", "sh", shlex.join(["vllm", "serve", edition.name, *cache]))


def _tensorrt_llm(edition: Edition) -> Snippet:
    # It reads the cache's format from hf_quant_config.json.
    return Snippet("TensorRT-LLM", "sh", shlex.join(["trtllm-serve", edition.name]))


def _tensorrt_llm_api(edition: Edition) -> Snippet:
    code = (
        "from tensorrt_llm import LLM\n\n"
        f"llm = LLM(model={edition.name!r})\n"
        'print(llm.generate("The capital of France is").outputs[0].text)'
    )
    return Snippet("TensorRT-LLM, from Python", "python", code)


_ENGINES = {
    "vLLM": _vllm,
    "TensorRT-LLM": _tensorrt_llm,
    "TensorRT-LLM API": _tensorrt_llm_api,
}
# Which of them read a dialect.
_READ_BY = {
    "modelopt": ("vLLM", "TensorRT-LLM", "TensorRT-LLM API"),
    "quark": ("vLLM",),
}
