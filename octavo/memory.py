"""How much memory a run takes, the settings that keep it below a limit, and what keeps it there.

In memory at a time are: the program, one or two decoder layers as the checkpoint has them, a few quantized
weights on their way to the disk, and on each core a batch of samples inside a layer. Before the layers come the
calibration text and the embedding rows of its tokens. The system's page cache does not count.

An allocator keeps what is freed, in pieces that what comes next need not fit: left alone, the holes grow for
hundreds of batches. So before each batch and each quantized weight a run looks at what it takes, and beyond a
threshold hands back what is free. What may come on top of the threshold until it looks again is a batch on each
core, or a weight: that makes the bound.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

from octavo.calibration.hidden import batch_sizes
from octavo.calibration.tokens import LONGEST
from octavo.errors import OctavoError
from octavo.units import format_bytes

# The Python process with PyTorch, transformers and compiled kernels, and what comes and goes in pieces of a few
# MB. Measured: 547 to 593 MB for a model of two tiny layers.
PROGRAM = 620_000_000

# As much of it as comes after a run has chosen its settings: kernels above all. Measured: 45 to 65 MB.
_TO_COME = 70_000_000

# Bytes it takes to tokenize a byte of text, to hold one of a whole document, and to load one of tokenizer.json.
# Measured: 206, 3 and 21.
_TEXT, _WHOLE, _TOKENIZER = 220, 4, 24

# Embedding rows, and what checking them for NaN takes beside them.
_ROWS = 3

# Quantized weights that wait or are being written while the next is computed.
WAITING = 2

# What a matrix product takes beside its operands: bytes for each token, and in any case.
_PRODUCT, _PRODUCT_LEAST = 4_000, 1_000_000

# Bytes for each element of a matrix of second moments while it is factored: in float32 itself, in order, its
# inverse, that one's factor, and what LAPACK gets; three more, as measured, of what is freed but not given back at
# once. Of the rows of a weight that each core rounds by it: some copies.
_MOMENTS = 23
_STRIP = 48_000_000

# Bytes for each number that is learned: its codes, its place, what Adam keeps of it, the sum of its gradients and
# those of the batches of a step, and it decoded, at the beginning and now. And for each token of a batch what is kept for
# the gradient, in activations of the widths of hidden states, heads, keys and the MLP, and what comes and goes beside it.
_LEARNED = 38
# Of these, those that come after a run has looked at what it takes, until it looks again: a step's.
_STEP = 10
_KEPT = (26, 8, 8, 12)

# Float32 copies of what each core casts at a time, of other dtypes than BF16.
_CAST = 24_000_000

# Freed memory that what comes next does not fit, as a share of it. Measured.
_HOLES = 0.3


class LayerShape(NamedTuple):
    """What memory depends on, of a model's largest decoder layer.

    Attributes:
        nbytes: in the checkpoint.
        copied: of these, bytes of tensors that are not of the dtype the layer computes in.
        largest: bytes of the largest group of tensors that is quantized and stored together.
        hidden: width of the hidden state.
        inner: width of the MLP.
        heads: width of all queries together.
        cached: width of all keys together.
        itemsize: bytes of an activation.
        fused: whether it computes with :mod:`octavo.fused`: in BF16, on a CPU.
        window: of sliding attention, in tokens; None without.
        widest: the most inputs a linear layer has, where their second moments are taken; else 0.
        learned: numbers whose codes are learned.
    """

    nbytes: int
    copied: int
    largest: int
    hidden: int
    inner: int
    heads: int
    cached: int
    itemsize: int
    fused: bool
    window: int | None
    widest: int = 0
    learned: int = 0

    @classmethod
    def of(
        cls,
        config: Any,
        nbytes: int,
        largest: int,
        itemsize: int,
        *,
        copied: int,
        fused: bool,
        widest: int,
        learned: int,
    ) -> LayerShape:
        """From a ``transformers`` configuration."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            nbytes,
            copied,
            largest,
            config.hidden_size,
            config.intermediate_size,
            heads * size,
            (config.num_key_value_heads or heads) * size,
            itemsize,
            fused,
            getattr(config, "sliding_window", None),
            widest,
            learned,
        )


class Settings(NamedTuple):
    """How a run uses memory.

    Attributes:
        batch_tokens: tokens computed at a time; part of what the result depends on, since matrix products
            of other shapes round otherwise.
        read_ahead: read the next layer while one computes.
        workers: batches computed at a time; results do not depend on it.
        threshold: bytes the process may take before it hands back what is free.
        held: layers in memory at a time, without reading ahead.
    """

    batch_tokens: int
    read_ahead: bool
    workers: int
    threshold: int
    held: int = 1


class _Need(NamedTuple):
    """Bytes of memory, by what they are for.

    Attributes:
        program: the process.
        layers: buffers that layers are read to, and copies in another dtype.
        waiting: quantized weights that wait or are being written.
        weight: one that is computed.
        moments: of a linear layer's inputs while they are factored, and a layer's quantized weights, which
            compute what the next linear layer sees; or those while they are learned.
        batches: those inside a layer, on all cores together.
    """

    program: int
    layers: int
    waiting: int
    weight: int
    moments: int
    batches: int

    @property
    def least(self) -> int:
        """What is there whatever is handed back: no threshold below makes sense."""
        return self.program + self.layers + self.waiting + self.moments

    @property
    def usual(self) -> int:
        """A threshold that is rarely reached."""
        return self.least + self.batches

    @property
    def growth(self) -> int:
        """What may come on top of the threshold until it is looked at again."""
        return int(max(self.weight, self.batches) * (1 + _HOLES))


def peak_memory(
    shape: LayerShape,
    settings: Settings,
    *,
    seq_len: int,
    cores: int,
    layers: int,
    samples: int | None = None,
    rows: int = 0,
    program: int = PROGRAM,
) -> int:
    """Bytes of memory a run on CPUs takes at most, tokenizing apart.

    Args:
        shape: of the largest decoder layer.
        settings: how it runs.
        seq_len: tokens of a sample, 0 without calibration.
        cores: batches computed at a time.
        layers: of the model.
        samples: of calibration; None for as many as make no batch smaller.
        rows: of the embedding that are read: different tokens among the samples.
        program: bytes of the process itself.
    """
    settings = settings._replace(workers=cores)
    need = _need(shape, settings, seq_len, samples, layers, program)
    return max(
        min(settings.threshold, need.usual) + need.growth, _embedding_memory(shape, rows, program)
    )


def batch_memory(
    shape: LayerShape, settings: Settings, seq_len: int, samples: int | None = None
) -> int:
    """Bytes of one batch inside a layer: the most that is alive at once, in attention or in the MLP."""
    tokens = max(settings.batch_tokens, seq_len)
    if samples is not None:
        tokens = batch_sizes(samples, seq_len, settings.batch_tokens)[0] * seq_len
    hidden, inner, heads, cached = shape.hidden, shape.inner, shape.heads, shape.cached
    if shape.learned:
        widths = zip(_KEPT, (hidden, heads, cached, inner), strict=True)
        return tokens * (shape.itemsize * sum(n * width for n, width in widths) + _PRODUCT)
    if shape.fused:
        attention, mlp = 2 * hidden + 3 * heads + 4 * cached, 3 * hidden + 2 * inner
    else:
        # Rotary embedding and activations in steps of their own, norms in float32.
        attention, mlp = 2 * hidden + 5 * heads + 4 * cached, 7 * hidden + 3 * inner
    if shape.window is not None and seq_len > shape.window:
        # A mask, and keys and values repeated for each head.
        attention += 2 * heads + 2 * seq_len
    return tokens * (shape.itemsize * max(attention, mlp) + _PRODUCT) + _PRODUCT_LEAST


def choose_settings(
    shape: LayerShape,
    limit: int | None,
    default_tokens: int,
    *,
    seq_len: int,
    cores: int,
    layers: int,
    samples: int | None = None,
    rows: int = 0,
    program: int = PROGRAM,
) -> Settings:
    """The fastest settings that stay below a limit.

    To fit, the next layer is no longer read ahead, then batches become smaller, down to a sample each, then
    fewer of them are computed at a time.

    Args:
        shape: of the largest decoder layer.
        limit: bytes; None for no limit.
        default_tokens: what a batch has without a limit.
        seq_len: tokens of a sample, 0 without calibration.
        cores: batches computed at a time, if memory allows.
        layers: of the model.
        samples: of calibration; None for as many as make no batch smaller.
        rows: of the embedding that are read: different tokens among the samples.
        program: bytes of the process itself.

    Raises:
        OctavoError: none do; says what it would take.
    """
    candidates = _candidates(default_tokens, seq_len, cores)
    for settings in candidates:
        need = _need(shape, settings, seq_len, samples, layers, program)
        threshold = need.usual if limit is None else min(need.usual, limit - need.growth)
        if threshold >= need.least:
            break
    else:
        raise OctavoError(
            f"--max-memory {format_bytes(limit or 0)} is too little: this run takes "
            # In full, since this is what will be passed.
            f"{math.ceil((need.least + need.growth) / 1e6)} MB at least, of which {format_bytes(program)} are the program, "
            f"{format_bytes(need.layers)} one decoder layer, and the rest quantized weights"
            + (f" and a batch of {settings.batch_tokens:,} tokens" if seq_len else "")
            + ". Allow as much"
            + (", or pass a shorter --seq-len." if need.batches > need.weight else ".")
        )
    embedding = _embedding_memory(shape, rows, program)
    if limit is not None and embedding > limit:
        raise OctavoError(
            f"--max-memory {format_bytes(limit)} is too little: the embedding of {rows:,} different tokens takes "
            f"{format_bytes(embedding)}, of which {format_bytes(program)} are the program. Allow as much, or pass "
            "fewer or shorter samples (--samples, --seq-len)."
        )
    return settings._replace(threshold=threshold)


def hold_more(
    shape: LayerShape,
    settings: Settings,
    limit: int,
    *,
    seq_len: int,
    layers: int,
    samples: int | None = None,
    program: int = PROGRAM,
) -> Settings:
    """The same settings, with as many layers in memory at a time as stay below ``limit`` bytes, rather than
    the next read ahead. For the rest see :func:`choose_settings`, which chose them."""
    fewest = settings._replace(read_ahead=False)
    need = _need(shape, fewest, seq_len, samples, layers, program)
    more = (limit - need.usual - need.growth) // (shape.nbytes + shape.copied)
    if more < 1 or layers == 1:
        return settings
    fewest = fewest._replace(held=min(1 + more, layers))
    return fewest._replace(threshold=_need(shape, fewest, seq_len, samples, layers, program).usual)


def check_text(limit: int | None, tokenizer: int, text: int) -> None:
    """Refuse a text that takes more than a limit to tokenize.

    Args:
        limit: bytes; None for no limit.
        tokenizer: bytes of the model's ``tokenizer.json``.
        text: bytes of the longest document.

    Raises:
        OctavoError: says what it would take.
    """
    # A character has four bytes at most.
    whole, pieces = _WHOLE * text, _TEXT * min(text, 4 * LONGEST)
    need = PROGRAM + _TOKENIZER * tokenizer + whole + pieces
    if limit is not None and need > limit:
        raise OctavoError(
            f"--max-memory {format_bytes(limit)} is too little to tokenize the calibration text: that takes "
            f"{format_bytes(need)}, of which {format_bytes(PROGRAM)} are the program, {format_bytes(_TOKENIZER * tokenizer)} "
            f"the tokenizer, and {format_bytes(whole + pieces)} a document of {format_bytes(text)}. Allow as much, or "
            "pass the text in shorter documents: a .jsonl file with one a line."
        )


def release(threshold: int = 0) -> None:
    """Hand what is free back to the system, if the process takes more than ``threshold`` bytes.

    Where the C library is not glibc, or the system has no ``/proc``, it does nothing.
    """
    if _resident() > threshold:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def program_memory() -> int:
    """Bytes the process itself takes in this environment, when the model is open and the text tokenized."""
    release()
    return max(PROGRAM, _resident() + _TO_COME)


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Rather than getrusage, whose peak begins with that of the process this one came from.
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident() -> int:
    """Resident memory of this process in bytes; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_bytes().split()[1]
    except FileNotFoundError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _candidates(default_tokens: int, seq_len: int, cores: int) -> list[Settings]:
    """All settings, the fastest first; their threshold is still to be chosen."""
    smallest = seq_len or default_tokens
    sizes = [default_tokens]
    while sizes[-1] > smallest:
        sizes.append(max(sizes[-1] // 2, smallest))
    counts = [cores]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return [
        Settings(size, ahead, count, threshold=0)
        for count in counts
        for size in sizes
        for ahead in (True, False)
    ]


def _need(
    shape: LayerShape,
    settings: Settings,
    seq_len: int,
    samples: int | None,
    layers: int,
    program: int,
) -> _Need:
    buffers = 2 if settings.read_ahead and layers > 1 else settings.held
    count = settings.workers
    if samples is not None and seq_len:
        count = min(count, len(batch_sizes(samples, seq_len, settings.batch_tokens)))
    return _Need(
        program=program,
        layers=buffers * shape.nbytes + (settings.held * shape.copied if seq_len else 0),
        waiting=WAITING * shape.largest,
        weight=shape.largest
        + (0 if shape.fused else settings.workers * _CAST)
        + (settings.workers * _STRIP if shape.widest else 0)
        + _STEP * shape.learned,
        moments=max(_MOMENTS * shape.widest**2 + shape.nbytes, _LEARNED * shape.learned)
        if shape.widest
        else 0,
        batches=count * batch_memory(shape, settings, seq_len, samples) if seq_len else 0,
    )


def _embedding_memory(shape: LayerShape, rows: int, program: int) -> int:
    """Bytes at most before the first layer, when the embedding rows of all tokens are there."""
    return program + _ROWS * rows * shape.hidden * shape.itemsize
