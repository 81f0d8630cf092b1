"""Many tokens through all decoder layers: matrix products by PyTorch, what lies between them compiled.

Each thread of the team has tokens of its own and computes everything for them, so that it waits for the others only where
it needs theirs: for keys and values, and for weights, which are decoded together, once, into memory that is used
again. An E4M3 number is a BF16 number, so products are PyTorch's BF16 products, with the scale applied to their float32
sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from octavo import kernels
from octavo.bits import JIT, to_bf16
from octavo.engines.torch import step
from octavo.engines.torch.batch import BLOCK
from octavo.engines.torch.step import Work
from octavo.engines.torch.team import Team
from octavo.engines.torch.vectors import E4M3_UNIT, decode_codes, decoded
from octavo.engines.torch.weights import (
    AS_IT_IS,
    BY_GROUP,
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    STATIC,
    Array,
    Weights,
)

# Queries of a sequence that are attended with at a time.
_SLICE = 128
# Products are of multiples of so many tokens: PyTorch compiles one for each number of them, and keeps it.
_ROWS = 32
# New tokens of a sequence for which its keys and values are not gathered: each attends to the blocks.
_FEW = 4


class _Slice(NamedTuple):
    """Queries of a sequence that go through attention together.

    Attributes:
        sequence: whose.
        first: of its tokens in the batch.
        last: the one behind them.
    """

    sequence: int
    first: int
    last: int


class _Gathered(NamedTuple):
    """A sequence's keys and values, BF16 ``[kv_heads, tokens, head_dim]``."""

    keys: Tensor
    values: Tensor


class _Pass(NamedTuple):
    """What the threads share while a batch goes through.

    Attributes:
        batch: the tokens.
        cache: where keys and values go.
        work: memory for all of the tokens.
        sequences: int64 ``[tokens]``: the sequence of each.
        slices: of sequences with many tokens.
        singles: tokens of the others.
        gathered: of the sequences with many tokens.
        turns: for each layer, whose turn it is at the slices.
        masks: what queries do not see, by their slice.
    """

    batch: Any
    cache: Any
    work: Work
    sequences: Array
    slices: list[_Slice]
    singles: list[int]
    gathered: dict[int, _Gathered]
    turns: list[Iterator[int]]
    masks: dict[tuple[int, int, int], Tensor]


class Prefill:
    """Ways of a decoder for batches of many tokens."""

    def __init__(self, weights: Weights, team: Team) -> None:
        self._weights, self._team = weights, team
        self._linears = [[_Linear(weights, row) for row in rows] for rows in weights.linears]
        self._head = _Linear(weights, weights.head[0])
        largest = max(one.decoded_bytes for rows in self._linears for one in (*rows, self._head))
        # One is used while the other is filled.
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]

    def forward(self, batch: Any, cache: Any, work: Work) -> Array:
        """Hidden states behind the last layer: BF16 ``[tokens, hidden]``.

        Args:
            batch: tokens, positions, starts and tables.
            cache: keys and values.
            work: memory for attention; what is for each token is made anew.
        """
        shape, tokens = self._weights.shape, len(batch.tokens)
        heads = shape.heads + 2 * shape.kv_heads
        work = work._replace(
            hidden=np.empty((tokens, shape.hidden), np.uint16),
            projected=np.empty((tokens, heads, shape.head_dim), np.uint16),
            attended=np.empty((tokens, shape.heads * shape.head_dim), np.uint16),
        )
        counts = np.diff(batch.starts)
        many = [int(one) for one in np.flatnonzero(counts > _FEW)]
        sequences = np.repeat(np.arange(len(counts)), counts)
        ends = {one: int(batch.positions[batch.starts[one + 1] - 1]) + 1 for one in many}

        def gathered(length: int) -> Tensor:
            return torch.empty(shape.kv_heads, length, shape.head_dim, dtype=torch.bfloat16)

        shared = _Pass(
            batch=batch,
            cache=cache,
            work=work,
            sequences=sequences,
            slices=[
                _Slice(one, first, min(first + _SLICE, int(batch.starts[one + 1])))
                for one in many
                for first in range(int(batch.starts[one]), int(batch.starts[one + 1]), _SLICE)
            ],
            singles=[int(one) for one in np.flatnonzero(counts[sequences] <= _FEW)],
            gathered={one: _Gathered(gathered(ends[one]), gathered(ends[one])) for one in many},
            turns=[itertools.count() for _ in range(shape.layers)],
            masks={},
        )
        self._team.run(lambda thread: self._run(thread, shared))
        return work.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """BF16 ``[tokens, vocab]``."""
        vocab = self._weights.shape.vocab
        logits = torch.empty(len(hidden), vocab, dtype=torch.bfloat16)

        def run(thread: int) -> None:
            own = self._own(len(hidden), thread)
            x = _round(self._head, hidden[own])
            product = self._multiply(self._head, x, itertools.count(), thread)
            logits[own] = product[:, :vocab]

        self._team.run(run)
        return logits

    def _own(self, tokens: int, thread: int) -> slice:
        return slice(tokens * thread // self._team.size, tokens * (thread + 1) // self._team.size)

    def _run(self, thread: int, shared: _Pass) -> None:
        """A thread's share of all layers."""
        weights, work, batch = self._weights, shared.work, shared.batch
        own = self._own(len(batch.tokens), thread)
        step.embed(weights, batch, work.hidden, own.start, own.stop)
        hidden, attended = _tensor(work.hidden[own]), _tensor(work.attended[own])
        projected = _tensor(work.projected[own]).view(len(hidden), -1)
        eps = weights.shape.eps
        turns = itertools.count()
        for layer, linears in enumerate(self._linears):
            before, behind = (_tensor(one) for one in weights.norms[layer])
            normed, _ = kernels.rms_norm(hidden, before, eps)
            parts = self._apply(linears, QKV, normed, turns, thread)
            torch.cat(parts, dim=1, out=projected)
            _enter(layer, own.start, own.stop, shared.sequences, weights, work, batch, shared.cache)
            self._team.wait()
            self._gather(layer, shared, thread)
            self._team.wait()
            self._attend(layer, shared, thread)
            self._team.wait()
            hidden += self._apply(linears, OUT, attended, turns, thread)[0]
            normed, _ = kernels.rms_norm(hidden, behind, eps)
            gate, up = self._apply(linears, GATE_UP, normed, turns, thread)
            step.silu_mul(_raw(gate).reshape(-1), _raw(up).reshape(-1))
            hidden += self._apply(linears, DOWN, up, turns, thread)[0]

    def _apply(
        self,
        linears: list[_Linear],
        group: tuple[int, int],
        x: Tensor,
        turns: Iterator[int],
        thread: int,
    ) -> list[Tensor]:
        """Linear layers that share an input ``[tokens, in]``."""
        rounded: dict[int, _Rounded] = {}
        results = []
        for linear in linears[group[0] : group[1]]:
            if linear.place not in rounded:
                rounded[linear.place] = _round(linear, x)
            results.append(self._multiply(linear, rounded[linear.place], turns, thread))
        return results

    def _multiply(self, linear: _Linear, x: _Rounded, turns: Iterator[int], thread: int) -> Tensor:
        if not linear.decoded_bytes:
            return linear.multiply(x, self._buffers[0])
        # The other threads may still read what was decoded before.
        buffer = self._buffers[next(turns) % 2]
        linear.decode(buffer, thread, self._team.size)
        self._team.wait()
        return linear.multiply(x, buffer)

    def _gather(self, layer: int, shared: _Pass, thread: int) -> None:
        """A thread's share of keys and values of the sequences with many tokens."""
        weights, cache = self._weights, shared.cache
        scales = np.ones(2, np.float32)
        if len(weights.cache_scales):
            scales = weights.cache_scales[layer]
        units = itertools.product(shared.gathered.items(), range(weights.shape.kv_heads))
        for (sequence, found), head in itertools.islice(units, thread, None, self._team.size):
            table = shared.batch.tables[sequence]
            _gather(cache.keys[layer], table, head, scales[0], _raw(found.keys[head]))
            _gather(cache.values[layer], table, head, scales[1], _raw(found.values[head]))

    def _attend(self, layer: int, shared: _Pass, thread: int) -> None:
        """Attention of single tokens, and of slices as long as there are some that nobody has taken."""
        weights, work, batch = self._weights, shared.work, shared.batch
        for token in shared.singles[thread :: self._team.size]:
            sequence = shared.sequences[token]
            for head in range(weights.shape.kv_heads):
                step.attend(
                    layer, token, sequence, head, weights, work, batch, shared.cache, thread
                )
        while (turn := next(shared.turns[layer])) < len(shared.slices):
            # The last ones have the most keys.
            self._attend_slice(layer, shared, shared.slices[-1 - turn])

    def _attend_slice(self, layer: int, shared: _Pass, one: _Slice) -> None:
        shape, found = self._weights.shape, shared.gathered[one.sequence]
        begin, end = (int(shared.batch.positions[at]) for at in (one.first, one.last - 1))
        queries = _tensor(shared.work.projected[one.first : one.last, : shape.heads])
        window = int(self._weights.windows[layer])
        mask = None
        if begin or window <= end:
            mask = _mask(shared.masks, begin, end + 1, window)
        result = torch.nn.functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            found.keys[None, :, : end + 1],
            found.values[None, :, : end + 1],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        attended = _tensor(shared.work.attended[one.first : one.last])
        attended.view(len(queries), shape.heads, shape.head_dim).copy_(result[0].transpose(0, 1))


class _Rounded(NamedTuple):
    """An input as linear layers see it.

    Attributes:
        values: BF16 ``[tokens, in]``, or float32 where groups of channels have scales of their own.
        factors: float32 ``[tokens, 1]`` or scalar that products are multiplied by.
    """

    values: Tensor
    factors: Tensor


class _Linear:
    """A linear layer's numbers, and how they become BF16.

    Attributes:
        place: which of the rounded inputs of its group is its own.
        decoded_bytes: memory for its decoded weights; 0 if they are BF16.
    """

    def __init__(self, weights: Weights, row: Any) -> None:
        self.place = int(row["place"])
        self._numbers = weights.numbers(row)
        self._blocks = row["inputs"] == BY_GROUP
        self.inputs, self.input_scale, self.row = int(row["inputs"]), float(row["input_scale"]), row
        rows, columns = self._numbers.shape
        wide = 4 if self._blocks else 2
        self.decoded_bytes = 0 if row["nbytes"] == 2 else rows * columns * wide
        width = int(row["width"])
        count = rows * -(-columns // width)
        first = int(row["scales"])
        scales = torch.from_numpy(weights.scales[first : first + count]).view(rows, -1) / E4M3_UNIT
        self._width, self._scales = width, scales
        self._scale = scales[0, 0].item() if (scales == scales[0, 0]).all() else None
        self._bias: Tensor | None = None
        if row["bias"] >= 0:
            bias = weights.biases[int(row["bias"]) : int(row["bias"]) + rows]
            self._bias = torch.from_numpy(bias)

    def decode(self, buffer: Tensor, thread: int, threads: int) -> None:
        """A thread's share of the weights into ``buffer``, uint8."""
        rows = len(self._numbers)
        own = slice(rows * thread // threads, rows * (thread + 1) // threads)
        codes = self._numbers[own]
        if self._blocks:
            scales = self._scales[own].repeat_interleave(self._width, dim=1)[:, : codes.shape[1]]
            self._decoded(buffer)[own] = codes.float() * scales
        else:
            target = self._decoded(buffer)[own]
            decode_codes(codes.data_ptr(), codes.numel(), target.data_ptr())

    def multiply(self, x: _Rounded, buffer: Tensor) -> Tensor:
        """``[tokens, out]`` in BF16, after :meth:`decode` of all threads."""
        rows = len(x.values)
        if missing := -rows % _ROWS:
            x = _Rounded(*(_padded(one, missing) for one in x))
        return self._product(x, buffer)[:rows]

    def _product(self, x: _Rounded, buffer: Tensor) -> Tensor:
        weight = (self._decoded(buffer) if self.decoded_bytes else self._numbers).t()
        weight = weight[: x.values.shape[1]]
        if not self.decoded_bytes:
            return torch.nn.functional.linear(x.values, weight.t(), self._bias_in(torch.bfloat16))
        if self._scale is not None and not x.factors.ndim and not self._blocks:
            # One scale: applied to the float32 sums.
            bias = self._bias_in(torch.bfloat16)
            return torch.addmm(
                x.values.new_zeros(()) if bias is None else bias,
                x.values,
                weight,
                beta=int(bias is not None),
                alpha=self._scale * x.factors.item(),
            )
        product = (x.values @ weight).float()
        if not self._blocks:
            product = product.mul_(x.factors).mul_(self._scales.view(1, -1))
        return (product if self._bias is None else product.add_(self._bias)).bfloat16()

    def _bias_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self._bias is None else self._bias.to(dtype)

    def _decoded(self, buffer: Tensor) -> Tensor:
        dtype = torch.float32 if self._blocks else torch.bfloat16
        return buffer[: self.decoded_bytes].view(dtype).view(self._numbers.shape)


def _padded(rows: Tensor, missing: int) -> Tensor:
    """``rows`` with further ones of zeros; a scalar as it is."""
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if rows.ndim else rows


def _round(linear: _Linear, x: Tensor) -> _Rounded:
    """``x`` ``[tokens, in]``, BF16, as a linear layer sees it."""
    one = torch.ones(())
    if linear.inputs == AS_IT_IS:
        return _Rounded(x, one)
    if linear.inputs == STATIC:
        values = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.round_to_e4m3(x.contiguous().view(-1), linear.input_scale, values.view(-1))
        return _Rounded(values, one * linear.input_scale)
    values, factors = torch.empty(x.shape), torch.empty(len(x), 1)
    _round_rows(linear.row, _raw(x), values.numpy(), factors.numpy())
    if linear.inputs == BY_GROUP:
        return _Rounded(values, one)
    return _Rounded(values.bfloat16(), factors)


@njit(**JIT)
def _round_rows(linear: Any, x: Any, out: Any, factors: Any) -> None:
    for row in range(x.shape[0]):
        factors[row, 0] = step.round_input(linear, x[row], out[row])


@njit(**JIT)
def _enter(
    layer: Any,
    first: Any,
    last: Any,
    sequences: Any,
    weights: Any,
    work: Any,
    batch: Any,
    cache: Any,
) -> None:
    """Put keys and values of tokens into the cache, rotated as their queries."""
    for token in range(first, last):
        for head in range(weights.shape.kv_heads):
            step.enter(layer, token, sequences[token], head, weights, work, batch, cache)


@njit(**JIT)
def _gather(stored: Any, table: Any, head: Any, scale: Any, out: Any) -> None:
    """Keys or values of a head out of the blocks, BF16 ``[tokens, head_dim]``, rounded after scaling."""
    factor = scale * np.float32(E4M3_UNIT)
    for token in range(out.shape[0]):
        row, target = stored[table[token // BLOCK], head, token % BLOCK], out[token]
        if stored.itemsize == 2:
            for i in range(row.shape[0]):
                target[i] = row[i]
        else:
            for i in range(row.shape[0]):
                target[i] = to_bf16(decoded(row[i]) * factor)


def _mask(masks: dict[tuple[int, int, int], Tensor], begin: int, end: int, window: int) -> Tensor:
    """What queries at positions ``begin`` to ``end`` add to their scores with keys 0 to ``end``."""
    key = (begin, end, window)
    if key not in masks:
        ahead = torch.arange(end) - torch.arange(begin, end)[:, None]
        hidden = (ahead > 0) | (ahead <= -window)
        masks[key] = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill_(
            hidden, -torch.inf
        )
    return masks[key]


def _tensor(array: Array) -> Tensor:
    """A BF16 tensor in the memory of an array of uint16."""
    return torch.from_numpy(array).view(torch.bfloat16)


def _raw(tensor: Tensor) -> Any:
    return tensor.view(torch.uint16).numpy()
