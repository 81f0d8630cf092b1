"""``octavo.convert``: an FP8 edition in another dialect, or back to a plain checkpoint.

A dialect is a renaming, so FP8 codes are copied as they are. Only where the target holds one scale for
several weights that have a scale each are codes made anew, and what that costs is measured. One weight
is in memory at a time, or those that the target stores as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from octavo import fp8
from octavo.canonical import fused_groups, partial_blocks
from octavo.checkpoint import Checkpoint, CheckpointWriter, Workspace, read_json
from octavo.checkpoint.hub import resolve_model
from octavo.consistency import attention_blocks, check_promises, decoder_linears
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.formats import Dialect, Json, Modules, Target, get_format
from octavo.preflight import check_target
from octavo.scheme import BLOCK, Scheme
from octavo.skeleton import build_skeleton
from octavo.stopwatch import Stopwatch
from octavo.threads import one_thread_each
from octavo.transfer import carry_files, carry_tensors, meta

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_RECORD = "octavo.json"
_LINEAR = ("weight", "weight_scale", "input_scale", "bias")
_CACHE = ("k_scale", "v_scale")


class ConvertResult(NamedTuple):
    """What a conversion did. Sizes in bytes, times in seconds.

    Attributes:
        output: the new directory.
        before: dialect of the source.
        after: dialect of the output; None for a plain checkpoint.
        tensors: tensors written.
        bytes_before: tensors of the source.
        bytes_after: tensors of the output.
        requantized: what new codes did to the weights that got a merged scale, by module.
        seconds: wall-clock time by stage, in order, and ``total``.
        warnings: what the user should know, a sentence each.
    """

    output: str
    before: str
    after: str | None
    tensors: int
    bytes_before: int
    bytes_after: int
    requantized: dict[str, fp8.RoundingError]
    seconds: dict[str, float]
    warnings: list[str]


class _Plan(NamedTuple):
    """How the source becomes the output.

    Attributes:
        groups: canonical names that are read, changed and encoded together, in the output's order.
        touched: those of them whose bytes may change; the others are copied.
        layout: canonical tensors on the meta device to those of the output.
        change: canonical tensors to those of the output.
        encode: the output's canonical tensors to what is stored.
        files: the output's JSON files.
    """

    groups: list[list[str]]
    touched: set[str]
    layout: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    files: dict[str, Json]


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    dequantize: str | None = None,
    tp: int = 1,
    pp: int = 1,
    config: str | Path | None = None,
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConvertResult:
    """Write an FP8 edition in another dialect, or as a plain checkpoint.

    Args:
        source: an edition in any dialect of :data:`octavo.formats.FORMATS`.
        output: the directory to create; it appears only when complete.
        to: the dialect to write.
        dequantize: instead, the dtype of a plain checkpoint: ``bf16``, ``fp16`` or ``fp32``.
        tp: tensor parallel ranks, for a dialect that keeps a file for each.
        pp: pipeline parallel ranks, likewise.
        config: the original model's ``config.json``, where the source does not carry it (a
            TensorRT-LLM checkpoint of another tool).
        shard_size: bytes of tensors in one file, at most.
        overwrite: replace ``output`` if it exists.
        on_progress: called with bytes done and in all.

    Returns:
        Sizes, counts, times, and what changed.

    Raises:
        OctavoError: the source is no edition or contradicts itself, the target cannot carry it, or
            the disk does not allow it; nothing is left behind.
    """
    clock = Stopwatch()
    with clock("open"):
        if (to is None) == (dequantize is None):
            raise OctavoError(
                "A conversion goes either to a dialect (--to) or to a plain checkpoint "
                "(--dequantize bf16). Choose one of the two."
            )
        directory, target = resolve_model(source), Path(output)
        check_target(directory, target)
        checkpoint = Checkpoint(directory)
    try:
        with clock("open"):
            edition = Edition(checkpoint, None if config is None else read_json(Path(config)))
            if edition.dialect is None or edition.scheme is None:
                raise OctavoError(
                    f"{directory} is not quantized: there is nothing to convert. "
                    "`octavo quantize` makes an FP8 edition of it, in any dialect."
                )
            _, model = build_skeleton(edition)
            check_promises(edition, edition.scheme, model)
            requantized: dict[str, fp8.RoundingError] = {}
            plan = (
                _plain(edition, model, _dtype(dequantize))
                if to is None
                else _translated(edition, edition.scheme, model, to, tp, pp, requantized)
            )
        layout: dict[str, Tensor] = {}
        for names in plan.groups:
            layout |= plan.encode(plan.layout(_canonical(edition, names)))
        with (
            Workspace(target, overwrite=overwrite) as work,
            CheckpointWriter(work.place, layout, shard_size=shard_size) as writer,
            # Strips are too small for several threads.
            one_thread_each(),
            clock("convert"),
        ):
            _write(edition, plan, writer, on_progress)
            _write_files(edition, plan, writer, to, requantized)
            writer.seal()
            work.publish()
    finally:
        checkpoint.close()
    return ConvertResult(
        output=str(target),
        before=edition.dialect,
        after=to,
        tensors=len(layout),
        bytes_before=edition.nbytes,
        bytes_after=sum(tensor.nbytes for tensor in layout.values()),
        requantized=requantized,
        seconds=clock.seconds(),
        warnings=_warnings(edition, edition.scheme, requantized, to),
    )


def _write(
    edition: Edition,
    plan: _Plan,
    writer: CheckpointWriter,
    on_progress: Callable[[int, int], None],
) -> None:
    total = sum(edition[name].nbytes for names in plan.groups for name in names)
    done = 0
    for names in plan.groups:
        if plan.touched.isdisjoint(names):
            carry_tensors(edition, names, writer, plan.encode)
        else:
            changed = plan.change({name: edition.read(name) for name in names})
            for name, tensor in plan.encode(changed).items():
                writer.write(name, tensor)
        done += sum(edition[name].nbytes for name in names)
        on_progress(done, total)


def _write_files(
    edition: Edition,
    plan: _Plan,
    writer: CheckpointWriter,
    to: str | None,
    requantized: Mapping[str, fp8.RoundingError],
) -> None:
    carry_files(edition.directory, writer)
    for file, content in plan.files.items():
        writer.write_json(file, content)
    if to is None or not (edition.directory / _RECORD).exists():
        return
    record = read_json(edition.directory / _RECORD)
    record["format"] = to
    # What rounding did to these is no longer what was measured.
    if isinstance(weights := record.get("weights"), dict):
        record["weights"] = {name: weights[name] for name in weights if name not in requantized}
    writer.write_json(_RECORD, record)


def _translated(
    edition: Edition,
    scheme: Scheme,
    model: PreTrainedModel,
    to: str,
    tp: int,
    pp: int,
    requantized: dict[str, fp8.RoundingError],
) -> _Plan:
    """The plan for another dialect; fills ``requantized`` as it is carried out."""
    dialect = get_format(to, scheme)
    if (tp, pp) != (1, 1) and not dialect.ranks:
        raise OctavoError(
            f"--tp {tp} --pp {pp} asks for a file for each rank, and {to} has none: its engines split "
            "tensors when they load them. Drop both options."
        )
    target = Target(edition.config, scheme, tp, pp)
    merged = _merged_scales(edition, model, to) if dialect.merges else {}

    def layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {**tensors, **{name: merged[name] for name in tensors if name in merged}}
        for name, scale in changed.items():
            module = name.removesuffix(".weight_scale")
            if module != name and not torch.equal(scale, tensors[name]):
                changed[f"{module}.weight"], requantized[module] = fp8.rescale(
                    tensors[f"{module}.weight"], tensors[name], scale
                )
        return changed

    linears = decoder_linears(model)
    modules = Modules(
        unquantized=[name for name in linears if not edition.is_quantized(name)],
        dynamic=scheme.differing(name for name in linears if edition.is_quantized(name)),
    )
    return _Plan(
        _groups(edition, model, dialect),
        {name for name in edition if name.rpartition(".")[0] in linears or _is_scale(name)},
        layout,
        change,
        lambda tensors: dialect.encode(tensors, target),
        dialect.configs(target, modules),
    )


def _plain(edition: Edition, model: PreTrainedModel, dtype: torch.dtype) -> _Plan:
    """The plan for a checkpoint without quantization, all its floating point tensors in ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor

    def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: _dequantized(tensor, tensors[f"{name}_scale"], dtype)
            if tensor.dtype == fp8.E4M3
            else cast(tensor)
            for name, tensor in tensors.items()
            if not _is_scale(name)
        }

    def layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: cast(tensor) for name, tensor in tensors.items() if not _is_scale(name)}

    config = {key: value for key, value in edition.config.items() if key != "torch_dtype"}
    return _Plan(
        _groups(edition, model, None),
        {name for name in edition if edition[name].dtype != dtype or _is_scale(name)},
        layout,
        change,
        dict,
        {"config.json": {**config, "dtype": str(dtype).removeprefix("torch.")}},
    )


def _dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's values ``[out, in]`` in ``dtype``, a strip of rows at a time."""
    result = torch.empty(codes.shape, dtype=dtype)
    for top in range(0, len(codes), BLOCK):
        rows = slice(top, top + BLOCK)
        scales = fp8.rows_of(scale, top, BLOCK, len(codes))
        result[rows] = fp8.dequantize(codes[rows], scales)
    return result


def _merged_scales(edition: Edition, model: PreTrainedModel, to: str) -> dict[str, Tensor]:
    """The scales of each fused group, by canonical name: the largest of its members'."""
    merged: dict[str, Tensor] = {}
    for group in fused_groups(decoder_linears(model)):
        quantized = [module for module in group if edition.is_quantized(module)]
        if quantized and len(quantized) < len(group):
            kept = next(module for module in group if module not in quantized)
            raise OctavoError(
                f"{to} has one precision for what it stores or scales together, and in this edition "
                f"{quantized[0]} is FP8 while {kept} is not. Quantize the original again with all or "
                "none of the group excluded."
            )
        for kind in ("weight_scale", "input_scale"):
            names = [f"{module}.{kind}" for module in quantized]
            if names:
                largest = torch.stack([edition.read(name) for name in names]).amax()
                merged |= dict.fromkeys(names, largest)
    return merged


def _groups(edition: Edition, model: PreTrainedModel, dialect: Dialect | None) -> list[list[str]]:
    """Canonical names in the model's order: a linear layer with its scales, keys' scale with values'."""
    groups: dict[str, list[str]] = {}
    for name in _in_order(edition, model):
        module, _, leaf = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        key = name
        if leaf in _CACHE:
            key = f"{module} cache"
        elif leaf in _LINEAR and (edition.is_quantized(module) or projection.endswith("_proj")):
            fused = [group for group in (dialect.fuses if dialect else ()) if projection in group]
            key = f"{parent} {fused[0]}" if fused else module
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _in_order(edition: Edition, model: PreTrainedModel) -> list[str]:
    """The edition's canonical names in the order `octavo quantize` writes them: as the model lists its
    tensors, scales after what they scale, those of keys and values at the end of their layer."""
    caches = {
        block.rpartition(".")[0]: [f"{block}.{leaf}" for leaf in _CACHE]
        for block in attention_blocks(model)
    }
    names: dict[str, None] = {}
    last = ""
    for name in model.state_dict():
        module = name.rpartition(".")[0]
        layer = next((layer for layer in caches if name.startswith(f"{layer}.")), "")
        if layer != last:
            names |= dict.fromkeys(caches.get(last, []))
            last = layer
        names |= dict.fromkeys((name, f"{name}_scale", f"{module}.input_scale"))
    return [*(name for name in names if name in edition), *(n for n in edition if n not in names)]


def _canonical(edition: Edition, names: list[str]) -> dict[str, Tensor]:
    """Meta tensors in the canonical form: scales are float32, those of one value scalars."""
    tensors = {name: meta(edition, name) for name in names}
    for name in tensors:
        if _is_scale(name):
            module = name.removesuffix(".weight_scale")
            shape = edition.weight_scale_shape(module) if module != name else ()
            tensors[name] = torch.empty(shape, dtype=torch.float32, device="meta")
    return tensors


def _is_scale(name: str) -> bool:
    return name.endswith("_scale")


def _dtype(name: str | None) -> torch.dtype:
    if name not in DTYPES:
        raise OctavoError(f"Unknown dtype {name!r}. Expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _warnings(
    edition: Edition,
    scheme: Scheme,
    requantized: Mapping[str, fp8.RoundingError],
    to: str | None,
) -> list[str]:
    found: list[str] = []
    if scheme.weights == "block" and to is not None:
        shapes = {
            module: edition[f"{module}.weight"].shape for module in edition.quantized_modules()
        }
        found += filter(None, [partial_blocks(shapes)])
    if requantized:
        noise = {name: error.sqnr_db for name, error in requantized.items() if error.sqnr_db}
        worst = min(noise, key=lambda name: noise[name], default=None)
        told = (
            f" The signal is {noise[worst]:.1f} dB above the added error in the worst, {worst}."
            if worst
            else ""
        )
        found.append(
            f"{to} has one scale for q/k/v and one for gate/up: {len(requantized)} weights whose scale "
            f"is not their group's largest were rounded again.{told} `octavo quantize --merge-scales` "
            "rounds only once."
        )
    return found
