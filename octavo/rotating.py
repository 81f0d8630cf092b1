"""``octavo.rotate``: a checkpoint of the same model in the axes in which FP8 loses least (:mod:`octavo.rotation`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.calibration import (
    BATCH_TOKENS,
    Calibration,
    CalibrationStream,
    HiddenShape,
    batch_sizes,
    batches_at_once,
    load_tokens,
)
from octavo.checkpoint import Checkpoint, CheckpointWriter, Workspace
from octavo.checkpoint.hub import resolve_model
from octavo.decoder import Decoder
from octavo.edition import ROTATION_KEY
from octavo.preflight import check_target, pick_device, refuse_quantized
from octavo.rotation import Axes, Learned, Rewriting, Survey, learn_rotation, survey
from octavo.stopwatch import Stopwatch
from octavo.threads import one_thread_each
from octavo.transfer import carry_files
from octavo.version import __version__

SAMPLES = 32
"""Sequences by default: second moments need less text than largest magnitudes."""


class RotateResult(NamedTuple):
    """What was done. Sizes in bytes, times in seconds.

    Attributes:
        output: the checkpoint's directory.
        layers: decoder layers.
        tensors: tensors written.
        tokens: calibration tokens.
        noise: the power of the noise that FP8 brings where hidden states are read, as a share of that in the model's own axes.
        untied: whether ``lm_head`` and the embedding were one tensor and are two.
        bytes_before: tensors of the input.
        bytes_after: tensors of the output.
        seconds: wall-clock time by stage, in order, and ``total``.
    """

    output: str
    layers: int
    tensors: int
    tokens: int
    noise: float
    untied: bool
    bytes_before: int
    bytes_after: int
    seconds: dict[str, float]


def rotate(
    model: str | Path,
    output: str | Path,
    *,
    calibration: Calibration | None = None,
    device: str = "auto",
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> RotateResult:
    """Write a checkpoint whose function is the same, and which loses less in FP8.

    Hidden states are rotated, and each head's values multiplied by a matrix, which the weights around them take back. Norms'
    weights become one; a tied embedding is written twice. The output is an ordinary checkpoint in the input's dtype: to be
    given to :func:`octavo.quantize`.

    Args:
        model: a Hugging Face checkpoint directory in BF16, FP16 or FP32, or a hub id.
        output: the directory to create; it appears only when complete.
        calibration: the text that shows where hidden states are large; 32 samples of the built-in text by default.
        device: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` (CUDA where there is one).
        shard_size: bytes of tensors in one file, at most.
        overwrite: replace ``output`` if it exists.
        on_progress: called with what is being done, and how much of it: decoder layers surveyed, megabytes written.

    Returns:
        What it wins, sizes, times.

    Raises:
        OctavoError: the input, an option or the disk does not allow it; nothing is left behind.
    """
    clock, calibration = Stopwatch(), calibration or Calibration(samples=SAMPLES)
    with ExitStack() as stack:
        with clock("open"):
            source, target = resolve_model(model), Path(output)
            check_target(source, target)
            checkpoint = Checkpoint(source)
            stack.callback(checkpoint.close)
            refuse_quantized(checkpoint)
            decoder = Decoder(checkpoint, pick_device(device))
            layout = Rewriting.layout(decoder)
        with clock("tokenize"):
            config = decoder.config
            tokens = load_tokens(
                calibration,
                source,
                vocab_size=config.vocab_size,
                max_positions=config.max_position_embeddings,
            )
        work = stack.enter_context(Workspace(target, overwrite=overwrite))
        writer = stack.enter_context(CheckpointWriter(work.place, layout, shard_size=shard_size))
        with clock("survey"):
            found = _survey(decoder, tokens, work, on_progress)
        with clock("learn"), torch.inference_mode(mode=False):
            learned = learn_rotation(found.moments, found.order.to(decoder.device))
        with clock("write"):
            total = sum(one.nbytes for one in layout.values())
            Rewriting(decoder, Axes(learned.rotation, found.values), writer).write(
                lambda done: on_progress("rotating", done, total)
            )
        with clock("sync"):
            carry_files(source, writer)
            writer.write_json("config.json", _config(checkpoint, calibration, tokens, learned))
            writer.seal()
            work.publish()
    return RotateResult(
        output=str(target),
        layers=len(decoder.layers),
        tensors=len(layout),
        tokens=tokens.numel(),
        noise=learned.noise,
        untied=config.tie_word_embeddings,
        bytes_before=checkpoint.nbytes,
        bytes_after=total,
        seconds=clock.seconds(),
    )


def _survey(
    decoder: Decoder,
    tokens: Tensor,
    work: Workspace,
    on_progress: Callable[[str, int, int], None],
) -> Survey:
    samples, seq_len = tokens.shape
    batches = batch_sizes(samples, seq_len, BATCH_TOKENS[decoder.device.type])
    shape = HiddenShape(batches, seq_len, decoder.config.hidden_size, decoder.dtype)
    layers = len(decoder.layers)
    with (
        one_thread_each() as cores,
        CalibrationStream(
            decoder,
            shape,
            work.directory,
            work.target,
            workers=batches_at_once(decoder.device, cores),
        ) as stream,
    ):
        stream.embed(tokens)
        return survey(
            decoder, stream, work.place, lambda done: on_progress("surveying", done, layers)
        )


def _config(
    checkpoint: Checkpoint, calibration: Calibration, tokens: Tensor, learned: Learned
) -> dict[str, Any]:
    """The model's, saying what was done, which editions made of it say too."""
    return {
        **checkpoint.config,
        "tie_word_embeddings": False,
        ROTATION_KEY: {
            "octavo": __version__,
            "calibration": calibration.drawn(tokens),
            "noise": learned.noise,
        },
    }
