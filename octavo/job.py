"""What every step of a quantization needs to know, on whichever machine it runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import canonical
from octavo.alignment import align_keys
from octavo.calibration import (
    COUNTS_BYTES,
    Calibration,
    HiddenShape,
    batch_sizes,
    load_tokens,
)
from octavo.canonical import LayerPlan
from octavo.checkpoint import Checkpoint
from octavo.decoder import Decoder
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.formats import Dialect, Json, Modules, Target, get_format
from octavo.formats.dialect import without_quantization
from octavo.memory import LayerShape, Settings
from octavo.preflight import refuse_quantized
from octavo.scheme import Scheme
from octavo.transfer import meta


class Job(NamedTuple):
    """One model on its way into one dialect.

    Attributes:
        source: the checkpoint.
        decoder: its decoder layers.
        plans: what happens to each of them.
        format: the name of what is written.
        dialect: what that is.
        target: the edition it describes.
    """

    source: Edition
    decoder: Decoder
    plans: list[LayerPlan]
    format: str
    dialect: Dialect
    target: Target

    @property
    def scheme(self) -> Scheme:
        """What is quantized, and how."""
        return self.target.scheme

    @property
    def checkpoint(self) -> Checkpoint:
        """The files that are read."""
        return self.source.checkpoint

    def configs(self) -> dict[str, Json]:
        """The dialect's JSON files, by name."""
        linears = [name for plan in self.plans for name in plan.linears]
        kept = [name for plan in self.plans for name in plan.kept]
        return self.dialect.configs(self.target, Modules(kept, self.scheme.differing(linears)))

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors to the dialect's."""
        return self.dialect.encode(tensors, self.target)

    def align_keys(self, index: int, tensors: dict[str, Tensor]) -> list[str]:
        """Move the keys of a layer onto the numbers of an FP8 cache, in place (:mod:`octavo.alignment`).

        Args:
            index: the layer.
            tensors: its tensors, at least.

        Returns:
            The attention blocks where there was something to move.
        """
        if self.scheme.kv_cache == "none":
            return []
        blocks = self.decoder.attention_blocks(index)
        return [name for name, block in blocks if align_keys(tensors, name, block.head_dim)]

    def outside(self) -> list[str]:
        """Names of tensors that belong to no decoder layer."""
        inside = {name for plan in self.plans for name in plan.tensors}
        return [name for name in self.source if name not in inside]

    def layout(self, layers: Collection[int] | None = None) -> dict[str, Tensor]:
        """The edition's tensors as meta tensors: embedding, decoder layers, the rest.

        Args:
            layers: only those of these decoder layers; None for all there is.
        """
        source = {name: meta(self.source, name) for name in self.source}
        first: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}
        for name in self.outside() if layers is None else ():
            encoded = self.encode({name: source[name]})
            (first if "embed" in name else last).update(encoded)
        for index, plan in enumerate(self.plans):
            if layers is None or index in layers:
                first |= self.encode(canonical.layout_layer(plan, source, self.scheme))
        return first | last

    def layer_bytes(self, index: int) -> int:
        """Bytes of a decoder layer in the checkpoint."""
        return sum(self.checkpoint[name].nbytes for name in self.plans[index].tensors)

    def unit_bytes(self, index: int) -> int:
        """Bytes of the largest group of tensors of a decoder layer that is quantized and stored together."""
        plan, units = self.plans[index], canonical.units(self.plans[index], self.dialect.fuses)
        weights = {f"{module}.weight" for module in plan.linears}

        def nbytes(name: str) -> int:
            entry = self.checkpoint[name]
            return entry.nbytes // (entry.dtype.itemsize if name in weights else 1)

        return max(sum(map(nbytes, unit)) for unit in units)


def open_job(directory: Path, scheme: Scheme, format: str, device: torch.device) -> Job:
    """Open a checkpoint and plan its quantization; nothing but headers is read.

    Args:
        directory: a BF16, FP16 or FP32 checkpoint.
        scheme: what is quantized and how.
        format: a dialect's name.
        device: where its layers will be computed.

    Raises:
        OctavoError: the checkpoint or an option does not allow it.
    """
    dialect = get_format(format, scheme)
    if dialect.merges:
        scheme = scheme.model_copy(update={"merge_scales": True})
    checkpoint = Checkpoint(directory)
    refuse_quantized(checkpoint)
    decoder = Decoder(checkpoint, device)
    plans = [_plan_layer(decoder, index, scheme) for index in range(len(decoder.layers))]
    if not any(plan.linears for plan in plans):
        raise OctavoError(
            f"--exclude {' '.join(scheme.exclude)} leaves no linear layer to quantize. "
            "Narrow the patterns."
        )
    _check_groups(plans, scheme)
    target = Target(without_quantization(checkpoint.config), scheme)
    return Job(Edition(checkpoint), decoder, plans, format, dialect, target)


def _check_groups(plans: Iterable[LayerPlan], scheme: Scheme) -> None:
    """Raise if inputs of what engines fuse into one matrix are to be scaled in different ways."""
    for group in (one for plan in plans for one in canonical.fused_groups(plan.linears)):
        dynamic = scheme.differing(group)
        static = [name for name in group if name not in dynamic]
        if dynamic and static:
            raise OctavoError(
                f"--dynamic-inputs {' '.join(scheme.dynamic)} means {dynamic[0]} and not {static[0]}, which engines "
                "compute as one. Let the patterns fit all of q/k/v, and both of gate/up, or none."
            )


def calibration_tokens(job: Job, calibration: Calibration) -> Tensor | None:
    """The samples that a job's statistics are taken on, int64 ``[samples, seq_len]``; None where it needs none.

    Raises:
        OctavoError: as :func:`octavo.calibration.load_tokens`.
    """
    if not job.scheme.needs_calibration:
        return None
    config = job.decoder.config
    return load_tokens(
        calibration,
        job.checkpoint.directory,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


def layer_shape(job: Job, *, on_gpu: bool = False) -> LayerShape:
    """What a run's memory on the host depends on. With a GPU, one tensor at a time goes through it."""
    checkpoint, dtype = job.checkpoint, job.decoder.dtype
    sizes = [[checkpoint[name].nbytes for name in plan.tensors] for plan in job.plans]
    copied = [
        [checkpoint[name].nbytes for name in plan.tensors if checkpoint[name].dtype != dtype]
        for plan in job.plans
    ]
    return LayerShape.of(
        job.decoder.config,
        nbytes=max(map(max, sizes)) if on_gpu else max(map(sum, sizes)),
        largest=max(job.unit_bytes(index) for index in range(len(job.plans))),
        itemsize=dtype.itemsize,
        copied=max(map(sum, copied)) + _counted(job),
        # A GPU leaves the host nothing to compute.
        fused=on_gpu or dtype == torch.bfloat16,
        widest=0 if on_gpu or job.scheme.rounding == "nearest" else _widest(job),
        learned=0 if on_gpu or job.scheme.rounding != "learned" else _most_weights(job),
    )


def _counted(job: Job) -> int:
    """Bytes of the counts of magnitudes that are taken while a decoder layer is calibrated."""
    if job.scheme.scales == "amax":
        return 0
    seen = max(len(canonical.inputs(plan)) + 2 * len(plan.attention) for plan in job.plans)
    return seen * COUNTS_BYTES


def _most_weights(job: Job) -> int:
    """Numbers in the weights to quantize of the largest decoder layer."""
    shapes = [
        [job.checkpoint[f"{name}.weight"].shape for name in plan.linears] for plan in job.plans
    ]
    return max(sum(map(math.prod, layer)) for layer in shapes)


def _widest(job: Job) -> int:
    linears = {f"{module}.weight" for plan in job.plans for module in plan.linears}
    return max(job.checkpoint[name].shape[1] for name in linears)


def hidden_shape(job: Job, tokens: Tensor, settings: Settings) -> HiddenShape:
    """How the calibration samples ``[samples, seq_len]`` go through the model."""
    samples, seq_len = tokens.shape
    batches = batch_sizes(samples, seq_len, settings.batch_tokens)
    # Learning takes the original model's beside the quantized one's.
    streams = 2 if job.scheme.rounding == "learned" else 1
    return HiddenShape(batches, seq_len, job.decoder.config.hidden_size, job.decoder.dtype, streams)


def _plan_layer(decoder: Decoder, index: int, scheme: Scheme) -> LayerPlan:
    linears = tuple(decoder.linears(index))
    return LayerPlan(
        tensors=tuple(decoder.tensor_names(index)),
        linears=tuple(name for name in linears if not scheme.excludes(name)),
        kept=tuple(name for name in linears if scheme.excludes(name)),
        attention=tuple(name for name, _ in decoder.attention_blocks(index)),
    )
