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
    static, cached = record.scheme.inputs == "static", record.scheme.kv_cache == "fp8"
    # On the command line, calibration data means static inputs.
    if cached and not static:
        return Snippet("Quantize", "python", _python(record, edition))
    return Snippet("Quantize", "sh", _shell(record, edition))


def serve(edition: Edition) -> list[Snippet]:
    """How engines that read the edition's dialect serve it."""
    return [_ENGINES[engine](edition) for engine in _READ_BY.get(edition.format, ("vLLM",))]


def _shell(record: Record, edition: str) -> str:
    scheme, calibration = record.scheme, record.calibration
    options = [["-o", edition], ["--format", record.format], ["--kv-cache", scheme.kv_cache]]
    if calibration is None:
        options.append(["--calib", "none"])
    else:
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
    return " \\\n  ".join(shlex.join(line) for line in lines)


def _python(record: Record, edition: str) -> str:
    calibration = record.calibration.model_dump() if record.calibration else {}
    return (
        "import octavo\n\n"
        "octavo.quantize(\n"
        f"    {record.base_model!r},\n"
        f"    {edition!r},\n"
        f"    scheme=octavo.Scheme(**{record.scheme.model_dump()!r}),\n"
        f"    calibration=octavo.Calibration(**{calibration!r}),\n"
        f"    format={record.format!r},\n"
        ")"
    )


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
