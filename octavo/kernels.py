"""BF16 elementwise work as single passes over memory, for CPUs.

PyTorch runs RMSNorm, rotary embedding and SiLU·mul as chains of whole-tensor operations, most of
them through float32 temporaries: on a CPU they take as long as the matrix products. Each kernel
here reads its input once and writes its output once, rounds to BF16 wherever the chain in
``transformers`` does, and takes the maximum of what it writes on the way, which is the statistic
calibration wants. The cast to E4M3 is here for the same reason.

A kernel runs on the calling thread without the interpreter lock; callers run several threads on
different batches. Numba compiles on first use and caches the machine code on disk.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from octavo.bits import JIT, bits_of, code_of, exp, float_of, nearest_e4m3, to_bf16, widen


@njit(**JIT)
def _rms_norm(x: Any, weight: Any, out: Any, eps: Any) -> Any:
    rows, width = x.shape
    largest = np.uint16(0)
    for row in range(rows):
        total = np.float32(0)
        for i in range(width):
            value = widen(x[row, i])
            total += value * value
        inverse = np.float32(1) / np.float32(math.sqrt(total / np.float32(width) + eps))
        for i in range(width):
            normal = widen(to_bf16(widen(x[row, i]) * inverse))
            result = to_bf16(normal * widen(weight[i]))
            out[row, i] = result
            largest = max(largest, np.uint16(result & np.uint16(0x7FFF)))
    return largest


@njit(**JIT)
def _silu_mul(gate: Any, up: Any) -> Any:
    largest = np.uint16(0)
    for i in range(gate.shape[0]):
        value = widen(gate[i])
        activated = widen(to_bf16(value / (np.float32(1) + exp(-value))))
        result = to_bf16(activated * widen(up[i]))
        gate[i] = result
        largest = max(largest, np.uint16(result & np.uint16(0x7FFF)))
    return largest


@njit(**JIT)
def _rotary(x: Any, cos: Any, sin: Any) -> Any:
    batch, tokens, heads, width = x.shape
    half = width // 2
    largest = np.uint16(0)
    for sample in range(batch):
        for token in range(tokens):
            for head in range(heads):
                for i in range(half):
                    low = widen(x[sample, token, head, i])
                    high = widen(x[sample, token, head, i + half])
                    a = widen(to_bf16(low * widen(cos[token, i])))
                    b = widen(to_bf16(-high * widen(sin[token, i])))
                    c = widen(to_bf16(high * widen(cos[token, i + half])))
                    d = widen(to_bf16(low * widen(sin[token, i + half])))
                    first, second = to_bf16(a + b), to_bf16(c + d)
                    x[sample, token, head, i] = first
                    x[sample, token, head, i + half] = second
                    largest = max(largest, np.uint16(first & np.uint16(0x7FFF)))
                    largest = max(largest, np.uint16(second & np.uint16(0x7FFF)))
    return largest


@njit(**JIT)
def _largest(x: Any) -> Any:
    largest = np.uint16(0)
    for i in range(x.shape[0]):
        largest = max(largest, np.uint16(x[i] & np.uint16(0x7FFF)))
    return largest


@njit(**JIT)
def _count_magnitudes(x: Any, counts: Any) -> None:
    for i in range(x.shape[0]):
        counts[x[i] & np.uint16(0x7FFF)] += 1


@njit(**JIT)
def _largest_of_tiles(x: Any, tile_rows: Any, tile_columns: Any, out: Any) -> None:
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], tile_columns):
            run = x[row, start : start + tile_columns]
            largest = out[row // tile_rows, start // tile_columns]
            for i in range(run.shape[0]):
                largest = max(largest, np.uint16(run[i] & np.uint16(0x7FFF)))
            out[row // tile_rows, start // tile_columns] = largest


@njit(**JIT)
def _score(logits: Any, targets: Any, logprobs: Any, greedy: Any) -> None:
    for row in range(logits.shape[0]):
        values = logits[row]
        # As integers in the order of the numbers, which vectorizes; NaN is above infinity.
        top = np.int16(-0x8000)
        for i in range(values.shape[0]):
            bits = np.int16(values[i])
            top = max(top, np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF))))
        top = np.int16(top ^ ((top >> np.int16(15)) & np.int16(0x7FFF)))
        largest = widen(np.uint16(top))
        total = np.float32(0)
        for i in range(values.shape[0]):
            total += exp(widen(values[i]) - largest)
        chosen = widen(values[targets[row]])
        logprobs[row] = chosen - largest - np.float32(math.log(total))
        greedy[row] = chosen >= largest


@njit(**JIT)
def _to_e4m3(x: Any, scales: Any, tile_rows: Any, tile_columns: Any, codes: Any) -> Any:
    noise, signal, underflows = np.float64(0), np.float64(0), np.int64(0)
    # In runs: the sums of one are precise enough in float32, and those of all are in float64.
    step = min(4096, tile_columns)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], step):
            scale = scales[row // tile_rows, start // tile_columns]
            run_noise, run_signal, lost = np.float32(0), np.float32(0), np.float32(0)
            run, target = x[row, start : start + step], codes[row, start : start + step]
            for i in range(run.shape[0]):
                value = widen(run[i]) / scale
                nearest = nearest_e4m3(value)
                target[i] = code_of(nearest)
                run_noise += (nearest - value) * (nearest - value)
                run_signal += value * value
                zeroed = nearest == np.float32(0) and value != np.float32(0)
                lost += np.float32(1) if zeroed else np.float32(0)
            squared = np.float64(scale) * np.float64(scale)
            noise += np.float64(run_noise) * squared
            signal += np.float64(run_signal) * squared
            underflows += np.int64(lost)
    return noise, signal, underflows


@njit(**JIT)
def _round_with_feedback(weight: Any, factor: Any, scales: Any, codes: Any, errors: Any) -> None:
    width = factor.shape[0]
    for row in range(weight.shape[0]):
        values = weight[row]
        for i in range(width):
            scale = scales[row, i]
            nearest = nearest_e4m3(values[i] / scale)
            codes[row, i] = code_of(nearest)
            error = (values[i] - nearest * scale) / factor[i, i]
            errors[row, i] = error
            for j in range(i + 1, width):
                values[j] -= error * factor[i, j]


@njit(**JIT)
def _descend(
    weight: Any, moments: Any, scales: Any, slopes: Any, moved: Any, codes: Any, changes: Any
) -> None:
    width = moments.shape[0]
    for row in range(weight.shape[0]):
        slope = slopes[row]
        for i in range(width):
            scale, curvature = scales[row, i], moments[i, i]
            now = weight[row, i] + moved[row, i]
            nearest = nearest_e4m3((now - slope[i] / curvature) / scale)
            step = nearest * scale - now
            change = step * (np.float32(2) * slope[i] + curvature * step)
            if change < np.float32(0):
                changes[row] += change
                moved[row, i] += step
                codes[row, i] = code_of(nearest)
                for j in range(i + 1, width):
                    slope[j] += step * moments[i, j]


@njit(**JIT)
def _round_to_e4m3(x: Any, scale: Any, out: Any) -> Any:
    for i in range(x.shape[0]):
        # Exact: an E4M3 number has fewer bits than a BF16 one.
        out[i] = np.uint16(bits_of(nearest_e4m3(widen(x[i]) / scale)) >> np.uint32(16))


@njit(**JIT)
def _through_e4m3(x: Any, scale: Any, out: Any) -> Any:
    for i in range(x.shape[0]):
        out[i] = to_bf16(nearest_e4m3(widen(x[i]) / scale) * scale)


@njit(**JIT)
def _from_e4m3(codes: Any, out: Any) -> Any:
    for i in range(codes.shape[0]):
        code = np.uint32(codes[i])
        sign = np.uint32((code & np.uint32(0x80)) << np.uint32(24))
        magnitude = np.uint32(code & np.uint32(0x7F))
        # Normal numbers: the seven bits in their place, and the bias from 7 to 127.
        normal = np.uint32((magnitude << np.uint32(20)) + np.uint32(120 << 23))
        # Below 2^-6: mantissa bits behind a leading one, which is taken away again.
        shifted = np.uint32((magnitude << np.uint32(20)) | np.uint32(0x3C800000))
        subnormal = bits_of(float_of(shifted) - np.float32(2**-6))
        bits = normal if magnitude >= np.uint32(8) else subnormal
        bits = bits if magnitude < np.uint32(0x7F) else np.uint32(0x7FC00000)
        out[i] = np.uint16((sign | bits) >> np.uint32(16))


def round_to_e4m3(x: Tensor, scale: float, out: Tensor) -> None:
    """Write ``x / scale``, saturated at ±448 and rounded to E4M3, as the BF16 numbers these are.

    Args:
        x: bfloat16, one-dimensional, contiguous, on the CPU.
        scale: a float32 value, positive.
        out: bfloat16 of the same length, written; may be ``x``.
    """
    _round_to_e4m3(_raw(x), np.float32(scale), _raw(out))


def through_e4m3(x: Tensor, scale: float, out: Tensor) -> None:
    """Write what is left of ``x`` after E4M3 storage: quantized with ``scale`` and dequantized to BF16.

    Args:
        x: bfloat16, one-dimensional, contiguous, on the CPU.
        scale: a float32 value, positive.
        out: bfloat16 of the same length, written; may be ``x``.
    """
    _through_e4m3(_raw(x), np.float32(scale), _raw(out))


def from_e4m3(codes: Tensor, out: Tensor) -> None:
    """Write E4M3 codes as the BF16 numbers they are, exactly.

    Args:
        codes: ``float8_e4m3fn``, one-dimensional, contiguous, on the CPU.
        out: bfloat16 of the same length, written.
    """
    _from_e4m3(codes.view(torch.uint8).numpy(), _raw(out))


def to_e4m3(
    x: Tensor, scales: Tensor, tile: tuple[int, int], codes: Tensor
) -> tuple[float, float, int]:
    """Write ``x / scale``, saturated at ±448 and rounded to nearest even, as E4M3 codes.

    Args:
        x: bfloat16 ``[rows, columns]``, contiguous, finite, on the CPU.
        scales: float32 ``[⌈rows / tile rows⌉, ⌈columns / tile columns⌉]``, positive.
        tile: rows and columns that share a scale; the columns divide 4096, or are all there are.
        codes: ``float8_e4m3fn`` of the shape of ``x``, written.

    Returns:
        The sums of squares of rounding errors and of values, and how many values other than zero
        became zero.
    """
    noise, signal, underflows = _to_e4m3(
        _raw(x), scales.numpy(), *tile, codes.view(torch.uint8).numpy()
    )
    return noise, signal, underflows


def round_with_feedback(
    weight: Tensor, factor: Tensor, scales: Tensor, codes: Tensor, errors: Tensor
) -> None:
    """Round the columns of ``weight`` one after another, the later ones moved to make up for the error of each.

    Args:
        weight: float32 ``[rows, columns]``, columns contiguous, on the CPU; overwritten.
        factor: float32 ``[columns, columns]``, upper triangular with a positive diagonal: the Cholesky
            factor of the inverse of the inputs' second moments.
        scales: float32 ``[rows, columns]``, positive.
        codes: ``float8_e4m3fn`` ``[rows, columns]``, written.
        errors: float32 of the same shape, written: of each weight, over its diagonal element of ``factor``.
    """
    _round_with_feedback(
        weight.numpy(),
        factor.numpy(),
        scales.numpy(),
        codes.view(torch.uint8).numpy(),
        errors.numpy(),
    )


def descend(
    weight: Tensor,
    moments: Tensor,
    scales: Tensor,
    slopes: Tensor,
    moved: Tensor,
    codes: Tensor,
    changes: Tensor,
) -> None:
    """Give each column in turn the codes that are best given all others', where those are better.

    Args:
        weight: float32 ``[rows, columns]``, columns contiguous, on the CPU, like all others.
        moments: of these columns' inputs, float32 ``[columns, columns]``, with a positive diagonal.
        scales: float32 ``[rows, columns]``, positive.
        slopes: half the derivative of each row's squared error of outputs by each element, float32
            ``[rows, columns]``; overwritten.
        moved: what the codes stand for less ``weight``, float32 ``[rows, columns]``; changed with the codes.
        codes: ``float8_e4m3fn`` ``[rows, columns]``, changed.
        changes: float32 ``[rows]``; how much the rows' errors change is added.
    """
    _descend(
        weight.numpy(),
        moments.numpy(),
        scales.numpy(),
        slopes.numpy(),
        moved.numpy(),
        codes.view(torch.uint8).numpy(),
        changes.numpy(),
    )


def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax at one place of each row, in float32.

    Args:
        logits: bfloat16 ``[rows, vocabulary]``, contiguous, on the CPU.
        targets: int64 ``[rows]``, on the CPU.

    Returns:
        The targets' log-probabilities, float32 ``[rows]`` (NaN where a logit is NaN), and whether no
        other logit of the row is larger, bool ``[rows]``.
    """
    logprobs, greedy = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.bool)
    _score(_raw(logits), targets.numpy(), logprobs.numpy(), greedy.numpy())
    return logprobs, greedy


def amax(x: Tensor) -> Tensor:
    """Largest absolute value of ``x``.

    Args:
        x: bfloat16, any shape, contiguous, on the CPU.

    Returns:
        A float32 scalar; NaN if any element is NaN.
    """
    return _amax(_largest(_raw(x).reshape(-1)))


def count_magnitudes(x: Tensor, counts: Tensor) -> None:
    """Count how often each absolute value occurs.

    Args:
        x: bfloat16, any shape, contiguous, on the CPU.
        counts: int64 ``[32768]``, indexed by the bits of the absolute value; added to.
    """
    _count_magnitudes(_raw(x).reshape(-1), counts.numpy())


def amax_of_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """Largest absolute value of each tile of ``x``.

    Args:
        x: bfloat16 ``[rows, columns]``, contiguous, on the CPU.
        tile: its rows and columns; tiles at the edges may be smaller.

    Returns:
        float32 ``[⌈rows / tile rows⌉, ⌈columns / tile columns⌉]``; NaN where an element is NaN.
    """
    shape = [-(-size // step) for size, step in zip(x.shape, tile, strict=True)]
    bits = torch.zeros(shape, dtype=torch.uint16)
    _largest_of_tiles(_raw(x), *tile, bits.numpy())
    return bits.view(torch.bfloat16).float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square norm (Zhang and Sennrich, 2019) as the Llama family rounds it.

    Args:
        x: bfloat16 ``[..., width]``, contiguous, on the CPU.
        weight: bfloat16 ``[width]``.
        eps: added to the mean square.

    Returns:
        bfloat16 of the shape of ``x``, and its amax as a float32 scalar.
    """
    out = torch.empty_like(x)
    width = x.shape[-1]
    largest = _rms_norm(
        _raw(x).reshape(-1, width), _raw(weight), _raw(out).reshape(-1, width), np.float32(eps)
    )
    return out, _amax(largest)


def silu_mul_(gate: Tensor, up: Tensor) -> Tensor:
    """Replace ``gate`` by ``silu(gate) · up``.

    Args:
        gate: bfloat16, any shape, contiguous, on the CPU.
        up: likewise.

    Returns:
        The result's amax as a float32 scalar.
    """
    return _amax(_silu_mul(_raw(gate).reshape(-1), _raw(up).reshape(-1)))


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al., 2021) to ``x``, the halves of a head rotated, as in Llama.

    Args:
        x: bfloat16 ``[batch, heads, tokens, head_dim]``, a transposed view of contiguous
            ``[batch, tokens, heads, head_dim]``, on the CPU.
        cos: bfloat16 ``[tokens, head_dim]``, contiguous.
        sin: likewise.

    Returns:
        The result's amax as a float32 scalar.
    """
    return _amax(_rotary(_raw(x.transpose(1, 2)), _raw(cos), _raw(sin)))


def _raw(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(torch.uint16).numpy()


def _amax(largest: int) -> Tensor:
    """From the largest absolute value's BF16 bits. NaN and infinity have larger bits than any
    number, so they are what the maximum of the bits finds."""
    return torch.tensor(int(largest), dtype=torch.uint16).view(torch.bfloat16).float()
