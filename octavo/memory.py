"""How much memory a run takes, and the settings that keep it below a limit.

In memory at a time are: the program, one or two decoder layers as the checkpoint has them, a few quantized
weights on their way to the disk, and on each core a batch of samples inside a layer.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import OctavoError
from octavo.units import format_bytes

# The Python process with PyTorch, transformers and compiled kernels, a tokenizer and its text, and what
# allocators keep; measured by benchmarks/memory.py.
PROGRAM = 640 << 20

# Quantized weights at a time: one that is computed, one that waits, one that is written.
_IN_FLIGHT = 3


class LayerShape(NamedTuple):
    """What memory depends on, of a model's largest decoder layer.

    Attributes:
        nbytes: in the checkpoint.
        largest: elements of its largest tensor that is stored as one.
        hidden: width of the hidden state.
        inner: width of the MLP.
        heads: width of all queries together.
        cached: width of all keys together.
        itemsize: bytes of an activation.
    """

    nbytes: int
    largest: int
    hidden: int
    inner: int
    heads: int
    cached: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, nbytes: int, largest: int, itemsize: int) -> LayerShape:
        """From a ``transformers`` configuration."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            nbytes,
            largest,
            config.hidden_size,
            config.intermediate_size,
            heads * size,
            (config.num_key_value_heads or heads) * size,
            itemsize,
        )


class Settings(NamedTuple):
    """How a run uses memory.

    Attributes:
        batch_tokens: tokens computed at a time; part of what the result depends on, since matrix products
            of other shapes round otherwise.
        read_ahead: read the next layer while one computes.
    """

    batch_tokens: int
    read_ahead: bool


def peak_memory(
    shape: LayerShape, settings: Settings, *, seq_len: int, cores: int, layers: int
) -> int:
    """Bytes of memory a run on CPUs takes at most.

    Args:
        shape: of the largest decoder layer.
        settings: how it runs.
        seq_len: tokens of a sample, 0 without calibration.
        cores: batches computed at a time.
        layers: of the model.
    """
    buffers = 2 if settings.read_ahead and layers > 1 else 1
    return (
        PROGRAM
        + buffers * shape.nbytes
        + _IN_FLIGHT * shape.largest
        + (cores * batch_memory(shape, settings, seq_len) if seq_len else 0)
    )


def batch_memory(shape: LayerShape, settings: Settings, seq_len: int) -> int:
    """Bytes of one batch inside a layer: the most that is alive at once, in attention or in the MLP."""
    tokens = max(settings.batch_tokens, seq_len)
    attention = 4 * shape.hidden + 4 * shape.heads + 4 * shape.cached
    mlp = 3 * shape.hidden + 3 * shape.inner
    return tokens * shape.itemsize * max(attention, mlp)


def choose_settings(
    shape: LayerShape,
    limit: int | None,
    default_tokens: int,
    *,
    seq_len: int,
    cores: int,
    layers: int,
) -> Settings:
    """The fastest settings that stay below a limit.

    Args:
        shape: of the largest decoder layer.
        limit: bytes; None for no limit.
        default_tokens: what a batch has without a limit.
        seq_len: tokens of a sample, 0 without calibration.
        cores: batches computed at a time.
        layers: of the model.

    Raises:
        OctavoError: none do; says what it would take.
    """
    smallest = seq_len or default_tokens
    sizes = [default_tokens]
    while sizes[-1] > smallest:
        sizes.append(max(sizes[-1] // 2, smallest))
    candidates = [Settings(size, ahead) for ahead in (True, False) for size in sizes]
    if limit is None:
        return candidates[0]

    def peak(settings: Settings) -> int:
        return peak_memory(shape, settings, seq_len=seq_len, cores=cores, layers=layers)

    for settings in candidates:
        if peak(settings) <= limit:
            return settings
    least = peak(candidates[-1])
    raise OctavoError(
        f"--max-memory {format_bytes(limit)} is too little: this run takes {format_bytes(least)} at least, of "
        f"which {format_bytes(PROGRAM)} are the program, {format_bytes(shape.nbytes)} one decoder layer, and the "
        f"rest quantized weights and a batch of {smallest:,} tokens on each of {cores} cores. Allow as much"
        + (", or pass a shorter --seq-len." if seq_len else ".")
    )


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Rather than getrusage, whose peak begins with that of the process this one came from.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
