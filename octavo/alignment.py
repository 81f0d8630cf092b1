"""Keys moved onto the numbers of an FP8 cache, without a change to what the model computes.

Some models (of the Qwen2 architecture: Qwen2.5-Coder) give their keys biases a hundred times larger than what varies in them, in the
pairs of channels that rotary embedding hardly turns. E4M3 keeps four significant bits: around 450 its numbers are 32
apart, and keys that differ by 2 are rounded to one number or the next by chance, which attention scores then differ
by. Qwen2.5-Coder-1.5B's perplexity becomes 1.7 times what it was (``docs/benchmarks/``).

Rotary embedding turns each pair of channels as a complex number. So a pair of the keys may be multiplied by any complex
number t, if the same pair of the queries that meet it is divided by t's conjugate: every score stays what it was (up to
the rounding of the weights). Here t turns the bias onto the real axis and gives it a length in the middle of those that
E4M3 makes a power of two of, whether an engine rounds to the nearest number (as GPUs do) or cuts off (as vLLM does on
CPUs): then what varies no longer decides how the bias is rounded, and the imaginary part, without a bias, keeps its own
precision. The cache's scale has to be a power of two too (:func:`power_of_two`).

Only weights decide, so it takes no calibration. A model without such biases stays as it is to the bit.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

# A bias is moved if it is so many standard deviations of what varies, estimated from the weights: E4M3's numbers are a
# sixteenth to an eighth of it apart, so from there on about as far as keys are.
_RATIO = 8.0

# Tensors of an attention block that are moved; norms are only looked at.
MOVED = tuple(f"{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias"))

# Between 1 and the number halfway to E4M3's next, 1.125: rounded and cut off it is 1, up to a thirty-third of it away.
# Of all lengths these bear the most, since E4M3's numbers are widest apart above a power of two. Exact in BF16. Where keys
# are rounded, 1 is somewhat nearer to the model; cut off, it falls apart (docs/benchmarks/).
_MANTISSA = 1 + 1 / 32


def align_keys(tensors: MutableMapping[str, Tensor], block: str, head_dim: int) -> bool:
    """Align the keys of an attention block, in place.

    Args:
        tensors: those of its decoder layer, by the checkpoint's names, ``[out, in]`` and ``[out]``; overwritten. What does
            not have separate projections with ``transformers``' names, or norms its keys, stays as it is.
        block: name of the attention block.
        head_dim: channels of a head; channel ``i`` is turned with ``i + head_dim / 2``.

    Returns:
        Whether there was anything to move. The scale of the keys is then to be a :func:`power_of_two`.
    """
    weight, bias = (tensors.get(f"{block}.k_proj.{kind}") for kind in ("weight", "bias"))
    norm = tensors.get(input_norm(block))
    query = tensors.get(f"{block}.q_proj.weight")
    if weight is None or bias is None or norm is None or query is None:
        return False
    if f"{block}.k_norm.weight" in tensors:
        return False
    queries = [query, *(tensors[n] for n in [f"{block}.q_proj.bias"] if n in tensors)]
    heads = len(bias) // head_dim
    group = len(query) // head_dim // heads
    found = False
    for head in range(heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        pairs = _far(weight[rows], bias[rows], norm)
        if not len(pairs):
            continue
        found = True
        real, imaginary = (part[pairs].float() for part in bias[rows].chunk(2))
        length = (real * real + imaginary * imaginary).sqrt()
        target = _target(length)
        # To the real axis, and to that length.
        turn = real / length, -imaginary / length
        stretch = target / length
        _multiply(weight[rows], pairs, turn, stretch)
        bias[rows][pairs] = target.to(bias.dtype)
        bias[rows][pairs + head_dim // 2] = 0
        for tensor in queries:
            for own in range(head * group, (head + 1) * group):
                _multiply(tensor[own * head_dim :][:head_dim], pairs, turn, 1 / stretch)
    return found


def input_norm(block: str) -> str:
    """Name of the weight of the norm in front of an attention block."""
    return f"{block.rpartition('.')[0]}.input_layernorm.weight"


def power_of_two(scale: Tensor) -> Tensor:
    """The power of two that is ``scale`` or the next above it, float32; 2 instead of 1, which engines take for a scale
    that nobody measured."""
    mantissa, exponent = torch.frexp(scale)
    above = torch.where(mantissa == 0.5, scale, torch.ldexp(torch.ones_like(scale), exponent))
    return torch.where(above == 1, 2.0, above)


def _far(weight: Tensor, bias: Tensor, norm: Tensor) -> Tensor:
    """Numbers of a head's pairs whose bias is far from zero, by what its weights make of inputs whose elements, behind
    RMSNorm, have a square of one on average."""
    squares = bias.float().square()
    spread = (weight.float() * norm.float()).square_().sum(dim=1)
    size, varied = (real + imaginary for real, imaginary in (squares.chunk(2), spread.chunk(2)))
    # What is not finite is told of by whoever measures the tensors.
    return ((size > _RATIO**2 * varied) & size.isfinite()).nonzero().squeeze(1)


def _target(length: Tensor) -> Tensor:
    """The nearest power of two, as ratios go, times what is borne best."""
    mantissa, exponent = torch.frexp(length / _MANTISSA)
    return torch.ldexp(torch.full_like(length, _MANTISSA), exponent - (mantissa < 0.5**0.5).int())


def _multiply(rows: Tensor, pairs: Tensor, turn: tuple[Tensor, Tensor], stretch: Tensor) -> None:
    """Multiply pairs of a head's rows by complex numbers, in place: each operation rounds by itself, so that every
    machine finds the same."""
    cos, sin = ((part * stretch).view(-1, *(1,) * (rows.dim() - 1)) for part in turn)
    half = len(rows) // 2
    real, imaginary = rows[pairs].float(), rows[pairs + half].float()
    rows[pairs] = (real * cos - imaginary * sin).to(rows.dtype)
    rows[pairs + half] = (real * sin + imaginary * cos).to(rows.dtype)
