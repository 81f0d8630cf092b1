"""The commands a reader of the report can type: to make the edition again, and to serve it."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from octavo.reporting.record import CalibrationRecord, Record, RotationRecord
from octavo.reporting.results import Edition
from octavo.scheme import Scheme
from octavo.servers.reads import TENSORRT_LLM, VLLM


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
        options.extend(_drawn(calibration))
    options.extend(["--exclude", pattern] for pattern in scheme.exclude)
    options.extend(["--dynamic-inputs", pattern] for pattern in scheme.dynamic)
    if scheme.merge_scales:
        options.append(["--merge-scales"])
    options.extend(
        [f"--{name}", value]
        for name, value in (("rounding", scheme.rounding), ("scales", scheme.scales))
        if value != Scheme.model_fields[name].default
    )
    return _command("Quantize", [["octavo", "quantize", record.base_model], *options])


def rotate_again(rotation: RotationRecord, original: str, rotated: str) -> Snippet:
    """What makes the checkpoint that the edition was made from."""
    options = [["-o", rotated], *_drawn(rotation.calibration)]
    return _command("Rotate", [["octavo", "rotate", original], *options])


def _drawn(calibration: CalibrationRecord) -> list[list[str]]:
    """Options that draw the same tokens."""
    options = [["--calib", calibration.source]]
    if calibration.text_field != "text":
        options.append(["--text-field", calibration.text_field])
    options.append(["--samples", f"{calibration.samples}", "--seq-len", f"{calibration.seq_len}"])
    options.append(["--seed", f"{calibration.seed}"])
    return options


def _command(title: str, lines: list[list[str]]) -> Snippet:
    return Snippet(title, "sh", " \\\n  ".join(shlex.join(line) for line in lines))


def serve(edition: Edition) -> list[Snippet]:
    """How engines that read the edition's dialect and scheme serve it."""
    return [
        write(edition)
        for reads, write in _ENGINES
        if edition.scheme.kind in reads.get(edition.format, ())
    ]


def _vllm(edition: Edition) -> Snippet:
    # Without the option vLLM keeps the cache in the model's dtype and leaves the scales unused.
    cache = ["--kv-cache-dtype", "fp8"] if edition.scheme.kv_cache == "fp8" else []
    return Snippet("vLLM", "sh", shlex.join(["vllm", "serve", edition.name, *cache]))


def _tensorrt_llm(edition: Edition) -> Snippet:
    if edition.format == "tensorrt-llm":
        engine = f"{edition.name}-engine"
        build = ["trtllm-build", "--checkpoint_dir", edition.name, "--output_dir", engine]
        run = ["trtllm-serve", engine, "--backend", "tensorrt", "--tokenizer", edition.name]
        return Snippet("TensorRT-LLM", "sh", f"{shlex.join(build)}\n{shlex.join(run)}")
    # It reads the cache's format from hf_quant_config.json.
    return Snippet("TensorRT-LLM", "sh", shlex.join(["trtllm-serve", edition.name]))


_ENGINES = ((VLLM, _vllm), (TENSORRT_LLM, _tensorrt_llm))
