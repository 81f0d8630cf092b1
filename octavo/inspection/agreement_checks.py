"""Checks of agreement: do config, tensors and files tell the same story?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from octavo.canonical import fused_groups
from octavo.inspection.findings import Check, Fault, Severity
from octavo.inspection.survey import SCALES, Survey
from octavo.skeleton import FLOATS


def _missing(survey: Survey) -> Iterator[Fault]:
    for name, shape in survey.outline.shapes.items():
        if name not in survey.tensors and name not in survey.outline.tied:
            yield Fault(name, f"no tensor; the config calls for shape {list(shape)}")


def _unknown(survey: Survey) -> Iterator[Fault]:
    for name, info in survey.tensors.items():
        known = name in survey.outline.shapes or name.endswith(SCALES)
        if not known and "scale" not in name.rpartition(".")[2]:
            yield Fault(name, f"shape {list(info.shape)}")


def _shapes(survey: Survey) -> Iterator[Fault]:
    for name, shape in survey.outline.shapes.items():
        if name in survey.tensors and survey.tensors[name].shape != shape:
            found = survey.tensors[name].shape
            yield Fault(name, f"shape {list(found)}, the config calls for {list(shape)}")


def _dtypes(survey: Survey) -> Iterator[Fault]:
    for name in survey.outline.shapes:
        if name not in survey.tensors or survey.tensors[name].dtype in FLOATS:
            continue
        dtype, module = survey.tensors[name].dtype, name.removesuffix(".weight")
        # That an excluded module is FP8 is another check's.
        excluded = survey.scheme is not None and survey.scheme.excludes(module)
        if dtype != torch.float8_e4m3fn or not (module in survey.outline.linears or excluded):
            yield Fault(name, str(dtype).removeprefix("torch."))


def _undeclared(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is None:
        for module in survey.codes:
            yield Fault(f"{module}.weight", "FP8, though the config has no quantization")


def _excluded(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is not None:
        for module in survey.codes:
            if survey.scheme.excludes(module):
                yield Fault(module, "an FP8 weight, though the config leaves it unquantized")


def _unquantized(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is None:
        return
    for module in survey.outline.linears:
        info = survey.tensors.get(f"{module}.weight")
        if info is not None and info.dtype in FLOATS and not survey.scheme.excludes(module):
            dtype = str(info.dtype).removeprefix("torch.")
            yield Fault(module, f"a {dtype} weight, though the config does not leave it out")


def _mixed(survey: Survey) -> Iterator[Fault]:
    for members in fused_groups(survey.outline.linears):
        quantized = [module.rpartition(".")[2] for module in members if module in survey.codes]
        others = [module.rpartition(".")[2] for module in members if module not in survey.codes]
        if quantized and others:
            parent = members[0].rpartition(".")[0]
            yield Fault(parent, f"FP8 in {', '.join(quantized)}, not in {', '.join(others)}")


def _inputs_mixed(survey: Survey) -> Iterator[Fault]:
    if survey.scheme is None:
        return
    for members in fused_groups(survey.outline.linears):
        quantized = [module for module in members if module in survey.codes]
        dynamic = survey.scheme.differing(quantized)
        if dynamic and len(dynamic) < len(quantized):
            last = [module.rpartition(".")[2] for module in dynamic]
            others = [module.rpartition(".")[2] for module in quantized if module not in dynamic]
            parent = members[0].rpartition(".")[0]
            yield Fault(parent, f"dynamic inputs in {', '.join(last)}, not in {', '.join(others)}")


def _untied(survey: Survey) -> Iterator[Fault]:
    for name in survey.untied:
        yield Fault(name, f"another tensor than {survey.outline.tied[name]}")


def _stale(survey: Survey) -> Iterator[Fault]:
    for file in survey.stale:
        yield Fault(file, "a file that is not of this checkpoint")


def _unlisted(survey: Survey) -> Iterator[Fault]:
    for name in survey.unlisted:
        yield Fault(name, "a tensor in a shard, but not in the index")


CHECKS: tuple[Check[Survey], ...] = (
    Check(
        "tensor-missing",
        Severity.error,
        _missing,
        "Every tensor of the model, lm_head.weight too unless tie_word_embeddings is true.",
        "Engines leave it random or refuse the checkpoint. Copy the missing shard, or see that config.json belongs "
        "to the weights.",
    ),
    Check(
        "tensor-shape",
        Severity.error,
        _shapes,
        "The shapes that config.json calls for.",
        "Check that config.json and the weights belong together.",
    ),
    Check(
        "tensor-dtype",
        Severity.error,
        _dtypes,
        "BF16, FP16 or FP32, and for linear layers of decoder layers E4M3.",
        "Start again from the original, unquantized checkpoint.",
    ),
    Check(
        "tensor-unknown",
        Severity.note,
        _unknown,
        "Tensors of the model only.",
        "Engines ignore them or complain. They may be leftovers of training or of another model.",
    ),
    Check(
        "quantization-undeclared",
        Severity.error,
        _undeclared,
        "A quantization_config in config.json beside FP8 weights.",
        "Engines take the codes for weights. Restore the config that the edition was written with.",
    ),
    Check(
        "excluded-quantized",
        Severity.error,
        _excluded,
        "Unquantized weights in the modules that the config leaves out.",
        "Engines take the codes for weights, without their scales. Correct the list of excluded modules, or quantize "
        "again.",
    ),
    Check(
        "unquantized-unlisted",
        Severity.error,
        _unquantized,
        "FP8 weights in every linear layer that the config does not leave out.",
        "Engines cast the weight to FP8 without a scale, or refuse it. Add the module to the config's excluded ones, "
        "or quantize again.",
    ),
    Check(
        "fusion-mixed",
        Severity.warning,
        _mixed,
        "One precision in what engines fuse: q/k/v, and gate/up.",
        "vLLM refuses such a checkpoint. Exclude all of the group or none of it.",
    ),
    Check(
        "fusion-inputs-mixed",
        Severity.error,
        _inputs_mixed,
        "Static or dynamic inputs in what engines fuse: q/k/v, and gate/up.",
        "vLLM refuses Quark's checkpoints of that kind, and in compressed-tensors' takes all of the group for static. "
        "Quantize the original checkpoint again, with the same inputs in all of the group.",
    ),
    Check(
        "tied-lost",
        Severity.error,
        _untied,
        "The same numbers: config.json has tie_word_embeddings true.",
        "Engines drop the tensor and use the embedding. Set tie_word_embeddings to false if the tensor is meant.",
    ),
    Check(
        "file-stale",
        Severity.warning,
        _stale,
        "Only the shards that the index names, or one model.safetensors.",
        "Tools that read every *.safetensors take the wrong tensors. Remove the file.",
    ),
    Check(
        "index-incomplete",
        Severity.warning,
        _unlisted,
        "Every tensor in model.safetensors.index.json.",
        "Tools that go by the index do not see it. Write the index again.",
    ),
)
