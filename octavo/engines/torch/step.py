"""A few tokens through all decoder layers, in one compiled function that every core runs on its share.

For few tokens the time goes into reading weights, and each is read once: cores take rows of every linear layer, heads of
attention, or tokens of what lies between, and wait for each other where one needs what the others made. Numbers are
rounded to BF16 where ``transformers`` rounds them; sums are in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from octavo.bits import JIT, code_of, exp, nearest_e4m3, to_bf16, widen
from octavo.engines.torch import tiles
from octavo.engines.torch.batch import BLOCK
from octavo.engines.torch.strips import STRIP, multiply
from octavo.engines.torch.vectors import (
    E4M3_UNIT,
    LINE,
    mix,
    prefetch,
    store,
    uncounted,
    wait,
)
from octavo.engines.torch.weights import (
    AS_IT_IS,
    BY_GROUP,
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    STATIC,
    Array,
    Shape,
)
from octavo.scheme import BLOCK as GROUP

_E4M3_MAX = 448.0
# Tokens from which on the matrix unit pays, where there is one. Numba takes all of these as constants.
_TILED = 7 if tiles.AVAILABLE else 1 << 30
_SIDE, _DEPTH = tiles.SIDE, tiles.DEPTH
# Bytes of weights that a thread fetches before it may compute with them.
_FETCHED = 16384
_Q, _OUT, _GATE, _DOWN, _END = QKV[0], OUT[0], GATE_UP[0], DOWN[0], DOWN[1]


def aligned(sizes: Sequence[int], dtype: type) -> Array:
    """Zeros that begin with a cache line: vectors and tiles that straddle two are read twice."""
    nbytes = math.prod(sizes) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + LINE, np.uint8)
    skipped = -raw.ctypes.data % LINE
    return raw[skipped : skipped + nbytes].view(dtype).reshape(sizes)


class Work(NamedTuple):
    """Memory for some tokens on their way; BF16 is uint16.

    Attributes:
        hidden: BF16 ``[tokens, hidden]``, the residual stream.
        normed: BF16 ``[tokens, hidden]``.
        inputs: float32 ``[places, tokens, widest]``: rounded inputs of linear layers.
        halves: BF16 ``[places, tokens, widest]``: the same for linear layers that take them so.
        factors: float32 ``[places, tokens]``: what their products are multiplied by.
        pairs: BF16 ``[places, sixteens of tokens, widest / 2, 16, 2]``: the same inputs as the matrix unit takes them.
        layout: uint8 ``[64]``: how that is set up.
        decoded: BF16 ``[threads, 16 * widest]``: sixteen rows of weights.
        products: float32 ``[threads, chains, 16, 16]``: of these, with sixteen tokens.
        projected: BF16 ``[tokens, heads + 2 kv_heads, head_dim]``: queries, keys and values.
        attended: BF16 ``[tokens, heads * head_dim]``.
        gated: BF16 ``[tokens, inner]``, the MLP's gates.
        activated: BF16 ``[tokens, inner]``.
        sums: float32 ``[threads, STRIP, tokens]``: of a strip of a linear layer.
        parts: float32 ``[threads, 2 * STRIP]``.
        queries: float32 ``[threads, heads of a group, head_dim]``.
        mixed: float32 ``[threads, heads of a group, head_dim]``.
        scores: float32 ``[threads, heads of a group, longest]``.
    """

    hidden: Array
    normed: Array
    inputs: Array
    halves: Array
    factors: Array
    pairs: Array
    layout: Array
    decoded: Array
    products: Array
    projected: Array
    attended: Array
    gated: Array
    activated: Array
    sums: Array
    parts: Array
    queries: Array
    mixed: Array
    scores: Array

    @classmethod
    def new(cls, shape: Shape, tokens: int, threads: int, longest: int) -> Work:
        """For ``tokens`` tokens of sequences of up to ``longest`` tokens."""
        widest = max(shape.hidden, shape.inner, shape.heads * shape.head_dim)
        widest += -widest % _DEPTH
        sixteens = -(-tokens // _SIDE)
        heads, group = shape.heads + 2 * shape.kv_heads, shape.heads // shape.kv_heads

        def bf16(*sizes: int) -> Array:
            return aligned(sizes, np.uint16)

        def float32(*sizes: int) -> Array:
            return aligned(sizes, np.float32)

        return cls(
            hidden=bf16(tokens, shape.hidden),
            normed=bf16(tokens, shape.hidden),
            inputs=float32(3, tokens, widest),
            halves=bf16(3, tokens, widest),
            factors=float32(3, tokens),
            pairs=bf16(3, sixteens, widest // 2, _SIDE, 2),
            layout=tiles.configuration(),
            decoded=bf16(threads, _SIDE * widest),
            products=float32(threads, tiles.CHAINS, _SIDE, _SIDE),
            projected=bf16(tokens, heads, shape.head_dim),
            attended=bf16(tokens, shape.heads * shape.head_dim),
            gated=bf16(tokens, shape.inner),
            activated=bf16(tokens, shape.inner),
            sums=float32(threads, STRIP, tokens),
            parts=float32(threads, 2 * STRIP),
            queries=float32(threads, group, shape.head_dim),
            mixed=float32(threads, group, shape.head_dim),
            scores=float32(threads, group, longest),
        )

    def own(self) -> Work:
        """The same, but for memory of one token's inputs that no other thread reads or writes."""
        return self._replace(
            normed=aligned((1, *self.normed.shape[1:]), np.uint16),
            inputs=aligned((3, 1, *self.inputs.shape[2:]), np.float32),
            halves=aligned((3, 1, *self.halves.shape[2:]), np.uint16),
            factors=aligned((3, 1), np.float32),
        )


@njit(**JIT)
def normalize(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """RMSNorm of a row of BF16."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        value = widen(x[i])
        total += value * value
    inverse = np.float32(1) / np.float32(math.sqrt(total / np.float32(x.shape[0]) + eps))
    for i in range(x.shape[0]):
        out[i] = to_bf16(widen(to_bf16(widen(x[i]) * inverse)) * widen(weight[i]))


@njit(**JIT)
def _largest(x: Any) -> Any:
    largest = np.uint16(0)
    for i in range(x.shape[0]):
        largest = max(largest, np.uint16(x[i] & np.uint16(0x7FFF)))
    return widen(largest)


@njit(**JIT)
def _scale_of(amax: Any) -> Any:
    return amax / np.float32(_E4M3_MAX) if amax > np.float32(0) else np.float32(1)


@njit(**JIT)
def round_input(linear: Any, x: Any, out: Any) -> Any:
    """A row of BF16 as a linear layer sees it, in float32.

    Returns:
        What the layer's products with it are multiplied by.
    """
    if linear.inputs == AS_IT_IS:
        for i in range(x.shape[0]):
            out[i] = widen(x[i])
        return np.float32(1)
    if linear.inputs == BY_GROUP:
        for begin in range(0, x.shape[0], GROUP):
            group, target = x[begin : begin + GROUP], out[begin : begin + GROUP]
            scale = _scale_of(_largest(group))
            for i in range(group.shape[0]):
                target[i] = nearest_e4m3(widen(group[i]) / scale) * scale
        return np.float32(1)
    scale = linear.input_scale if linear.inputs == STATIC else _scale_of(_largest(x))
    for i in range(x.shape[0]):
        out[i] = nearest_e4m3(widen(x[i]) / scale)
    return scale


@njit(**JIT)
def _halve(x: Any, out: Any) -> None:
    """Float32 that are BF16 numbers, as those."""
    for i in range(x.shape[0]):
        out[i] = to_bf16(x[i])


@njit(**JIT)
def _round_inputs(
    linears: Any, first: Any, last: Any, token: Any, tokens: Any, x: Any, work: Any
) -> None:
    """The row of a token for linear layers ``first`` to ``last``, once for those that see the same."""
    for index in range(first, last):
        if linears[index].place == index - first:
            place = index - first
            factor = round_input(linears[index], x, work.inputs[place, token])
            work.factors[place, token] = factor
            row = work.inputs[place, token, : x.shape[0]]
            if linears[index].halves:
                _halve(row, work.halves[place, token])
            if tokens >= _TILED:
                tiles.pair(row, token % _SIDE, work.pairs[place, token // _SIDE])


class Operands(NamedTuple):
    """Where a thread's products take things from and put them: addresses, and bytes from row to row."""

    arena: int
    scales: int
    inputs: int
    inputs_stride: int
    place_stride: int
    halves: int
    parts: int
    sums: int
    sums_stride: int


@njit(**JIT)
def _operands(weights: Any, work: Any, thread: Any) -> Any:
    return Operands(
        weights.arena.ctypes.data,
        weights.scales.ctypes.data,
        work.inputs.ctypes.data,
        work.inputs.strides[1],
        work.inputs.strides[0],
        work.halves.ctypes.data,
        work.parts.ctypes.data + thread * work.parts.strides[0],
        work.sums.ctypes.data + thread * work.sums.strides[0],
        work.sums.strides[1],
    )


@njit(**JIT)
def _strip(linear: Any, row: Any, at: Any, tokens: Any) -> None:
    """The sums of rows of a linear layer from ``row`` on for all tokens, without inputs' factors and bias."""
    for i in range(STRIP):
        for token in range(tokens):
            store(at.sums + i * at.sums_stride + token * 4, np.float32(0))
    blocks = (linear.columns + linear.width - 1) // linear.width
    stride = linear.columns * linear.nbytes
    # BF16 numbers that are needed once or twice are waited for, whatever is done with them.
    halved = linear.halves and (linear.nbytes == 1 or tokens > 2)
    # Of the same sizes, at half the bytes.
    x_nbytes = 2 if halved else 4
    x = (at.halves if halved else at.inputs) + linear.place * at.place_stride * x_nbytes // 4
    for block in range(blocks):
        begin = block * linear.width
        multiply(
            at.arena + linear.weight + row * stride + begin * linear.nbytes,
            stride,
            linear.nbytes,
            min(linear.width, linear.columns - begin),
            at.scales + (linear.scales + row * blocks + block) * 4,
            blocks * 4,
            x + begin * x_nbytes,
            at.inputs_stride * x_nbytes // 4,
            x_nbytes,
            tokens,
            at.parts,
            at.sums,
            at.sums_stride,
            4,
        )


@njit(**JIT)
def _share(rows: Any, thread: Any, threads: Any) -> Any:
    """A thread's rows of a linear layer: where they begin and end, in sixteens if there are such."""
    height = _SIDE if rows % _SIDE == 0 else STRIP
    parts = rows // height
    return parts * thread // threads * height, parts * (thread + 1) // threads * height


@njit(**JIT)
def _fetch(linear: Any, weights: Any, thread: Any, threads: Any) -> None:
    """Have a thread's first rows of a linear layer fetched while it waits for the others."""
    stride = linear.columns * linear.nbytes
    begin, end = _share(linear.rows, thread, threads)
    at = weights.arena.ctypes.data + linear.weight + begin * stride
    for line in range(0, min((end - begin) * stride, _FETCHED), LINE):
        prefetch(at + line)


@njit(**JIT)
def _put(
    linear: Any,
    row: Any,
    rows: Any,
    weights: Any,
    factors: Any,
    token: Any,
    sums: Any,
    out: Any,
    base: Any,
) -> None:
    """Sums of rows of a linear layer ``[rows, tokens]`` into ``out``, from token ``token`` on."""
    first = base + row
    rows = min(rows, out.shape[1] - first)
    for j in range(min(sums.shape[1], out.shape[0] - token)):
        factor = factors[token + j]
        if linear.bias < 0:
            for i in range(rows):
                out[token + j, first + i] = to_bf16(sums[i, j] * factor)
        else:
            for i in range(rows):
                bias = weights.biases[linear.bias + row + i]
                out[token + j, first + i] = to_bf16(sums[i, j] * factor + bias)


@njit(**JIT)
def _tile_rows(
    linear: Any,
    weights: Any,
    work: Any,
    tokens: Any,
    thread: Any,
    threads: Any,
    out: Any,
    base: Any,
) -> None:
    """:func:`multiply_rows` by the matrix unit."""
    begin, end = _share(linear.rows, thread, threads)
    products, decoded = work.products[thread], work.decoded[thread]
    columns, stride = linear.columns, linear.columns * linear.nbytes
    factors = work.factors[linear.place]
    for row in range(begin, end, _SIDE):
        at = weights.arena.ctypes.data + linear.weight + row * stride
        if linear.nbytes == 1:
            tiles.decode(at, _SIDE * columns, decoded.ctypes.data)
            at = decoded.ctypes.data
        for token in range(0, tokens, _SIDE):
            x = work.pairs.ctypes.data + linear.place * work.pairs.strides[0]
            x += token // _SIDE * work.pairs.strides[1]
            tiles.product(at, 2 * columns, columns, x, products.ctypes.data)
            for i in range(_SIDE):
                scale = weights.scales[linear.scales + row + i]
                for j in range(_SIDE):
                    total = products[0, i, j] + products[1, i, j]
                    total += products[2, i, j] + products[3, i, j]
                    products[0, i, j] = total * scale
            _put(linear, row, _SIDE, weights, factors, token, products[0], out, base)


@njit(**JIT)
def multiply_rows(
    linear: Any,
    weights: Any,
    work: Any,
    tokens: Any,
    thread: Any,
    threads: Any,
    out: Any,
    base: Any,
) -> None:
    """A thread's outputs of a linear layer for all tokens, BF16, from column ``base`` of ``out`` on."""
    tiled = linear.rows % _SIDE == 0 and linear.columns % _DEPTH == 0
    if tokens >= _TILED and tiled and linear.width == linear.columns:
        _tile_rows(linear, weights, work, tokens, thread, threads, out[:tokens], base)
        return
    begin, end = _share(linear.rows, thread, threads)
    at, sums = _operands(weights, work, thread), work.sums[thread, :, :tokens]
    factors = work.factors[linear.place]
    for row in range(begin, end, STRIP):
        _strip(linear, row, at, tokens)
        _put(linear, row, STRIP, weights, factors, 0, sums, out, base)


@njit(**JIT)
def _project(
    linears: Any, weights: Any, work: Any, tokens: Any, thread: Any, threads: Any, out: Any
) -> None:
    """Queries, keys and values, one behind the other in a row of ``out`` ``[tokens, all]``."""
    base = 0
    for index in range(_Q, _OUT):
        multiply_rows(linears[index], weights, work, tokens, thread, threads, out, base)
        base += linears[index].rows


@njit(**JIT)
def _add_to_hidden(
    linear: Any, weights: Any, work: Any, tokens: Any, thread: Any, threads: Any
) -> None:
    """What a linear layer gives, added to the residual stream."""
    multiply_rows(linear, weights, work, tokens, thread, threads, work.normed, 0)
    begin, end = _share(linear.rows, thread, threads)
    for token in range(tokens):
        hidden, added = work.hidden[token], work.normed[token]
        for i in range(begin, end):
            hidden[i] = to_bf16(widen(hidden[i]) + widen(added[i]))


@njit(**JIT)
def silu_mul(gates: Any, ups: Any) -> None:
    """SiLU(gate) · up in place of ups, rounded to BF16 on the way as ``transformers`` does."""
    for i in range(gates.shape[0]):
        value = widen(gates[i])
        activated = widen(to_bf16(value / (np.float32(1) + exp(-value))))
        ups[i] = to_bf16(activated * widen(ups[i]))


@njit(**JIT)
def _activate(
    linears: Any, weights: Any, work: Any, tokens: Any, thread: Any, threads: Any
) -> None:
    multiply_rows(linears[_GATE], weights, work, tokens, thread, threads, work.gated, 0)
    multiply_rows(linears[_GATE + 1], weights, work, tokens, thread, threads, work.activated, 0)
    begin, end = _share(linears[_GATE].rows, thread, threads)
    for token in range(tokens):
        silu_mul(work.gated[token, begin:end], work.activated[token, begin:end])


@njit(**JIT)
def _rotate(x: Any, cos: Any, sin: Any) -> None:
    """Rotary embedding of a head, BF16, in place."""
    half = x.shape[0] // 2
    for i in range(half):
        low, high = widen(x[i]), widen(x[half + i])
        a, b = widen(to_bf16(low * cos[i])), widen(to_bf16(-high * sin[i]))
        c, d = widen(to_bf16(high * cos[i])), widen(to_bf16(low * sin[i]))
        x[i], x[half + i] = to_bf16(a + b), to_bf16(c + d)


@njit(**JIT)
def _store(x: Any, scale: Any, out: Any) -> None:
    """A head's keys or values into the cache: BF16, or E4M3 codes."""
    if out.itemsize == 2:
        for i in range(x.shape[0]):
            out[i] = x[i]
    else:
        for i in range(x.shape[0]):
            out[i] = code_of(nearest_e4m3(widen(x[i]) / scale))


@njit(**JIT)
def enter(
    layer: Any,
    token: Any,
    sequence: Any,
    kv_head: Any,
    weights: Any,
    work: Any,
    batch: Any,
    cache: Any,
) -> None:
    """Rotate a token's key and the queries of its group, and put key and value into the cache."""
    shape, heads = weights.shape, work.projected[token]
    position, group = batch.positions[token], weights.shape.heads // weights.shape.kv_heads
    key, value = shape.heads + kv_head, shape.heads + shape.kv_heads + kv_head
    cos, sin = weights.cos[position], weights.sin[position]
    for head in range(kv_head * group, (kv_head + 1) * group):
        if weights.head_norms.shape[0]:
            normalize(heads[head], weights.head_norms[layer, 0], shape.eps, heads[head])
        _rotate(heads[head], cos, sin)
    if weights.head_norms.shape[0]:
        normalize(heads[key], weights.head_norms[layer, 1], shape.eps, heads[key])
    _rotate(heads[key], cos, sin)
    block, place = batch.tables[sequence, position // BLOCK], position % BLOCK
    k_scale = v_scale = np.float32(1)
    if weights.cache_scales.shape[0]:
        k_scale, v_scale = weights.cache_scales[layer, 0], weights.cache_scales[layer, 1]
    _store(heads[key], k_scale, cache.keys[layer, block, kv_head, place])
    _store(heads[value], v_scale, cache.values[layer, block, kv_head, place])


# Of finite numbers the largest is found in vectors; of a broken model's it is anything, and the logits tell.
@njit(**{**JIT, "fastmath": {"reassoc", "contract", "nnan", "nsz"}})
def _largest_score(x: Any) -> Any:
    largest = np.float32(-np.inf)
    for i in range(x.shape[0]):
        largest = max(largest, x[i])
    return largest


@njit(**JIT)
def _softmax(x: Any, factor: Any) -> None:
    """Softmax of a row, times a factor, in place."""
    largest, total = _largest_score(x), np.float32(0)
    for i in range(x.shape[0]):
        x[i] = exp(x[i] - largest)
        total += x[i]
    for i in range(x.shape[0]):
        x[i] *= factor / total


@njit(**JIT)
def attend(
    layer: Any,
    token: Any,
    sequence: Any,
    kv_head: Any,
    weights: Any,
    work: Any,
    batch: Any,
    cache: Any,
    thread: Any,
) -> None:
    """Attention of a token's queries of one group to the cache, which has its own key and value."""
    shape, table = weights.shape, batch.tables[sequence]
    group, width = shape.heads // shape.kv_heads, shape.head_dim
    end = batch.positions[token] + 1
    begin = max(0, end - weights.windows[layer])
    keys, values, nbytes = cache.keys[layer], cache.values[layer], cache.keys.itemsize
    k_scale = v_scale = np.float32(1)
    if nbytes == 1:
        k_scale = weights.cache_scales[layer, 0] * np.float32(E4M3_UNIT)
        v_scale = weights.cache_scales[layer, 1] * np.float32(E4M3_UNIT)
    queries, scores, mixed = work.queries[thread], work.scores[thread], work.mixed[thread]
    scale = np.array([k_scale / np.float32(math.sqrt(width))])
    for head in range(group):
        scores[head, : end + STRIP] = np.float32(0)
        mixed[head, :] = np.float32(0)
        for i in range(width):
            queries[head, i] = widen(work.projected[token, kv_head * group + head, i])
    for start in range(begin - begin % BLOCK, end, BLOCK):
        block = keys.ctypes.data + table[start // BLOCK] * keys.strides[0]
        for place in range(start, min(start + BLOCK, end), STRIP):
            multiply(
                block + kv_head * keys.strides[1] + (place - start) * keys.strides[2],
                keys.strides[2],
                nbytes,
                width,
                scale.ctypes.data,
                0,
                queries.ctypes.data,
                queries.strides[0],
                4,
                group,
                work.parts.ctypes.data + thread * work.parts.strides[0],
                scores.ctypes.data + place * 4,
                4,
                scores.strides[0],
            )
    for head in range(group):
        _softmax(scores[head, begin:end], v_scale)
    for start in range(begin - begin % BLOCK, end, BLOCK):
        first, last = max(start, begin), min(start + BLOCK, end)
        block = values.ctypes.data + table[start // BLOCK] * values.strides[0]
        mix(
            block + kv_head * values.strides[1] + (first - start) * values.strides[2],
            values.strides[2],
            nbytes,
            width,
            last - first,
            scores.ctypes.data + first * 4,
            scores.strides[0],
            group,
            mixed.ctypes.data,
            mixed.strides[0],
        )
    for head in range(group):
        first = (kv_head * group + head) * width
        for i in range(width):
            work.attended[token, first + i] = to_bf16(mixed[head, i])


@njit(**JIT)
def embed(weights: Any, batch: Any, hidden: Any, first: Any, last: Any) -> None:
    """Hidden states in front of the first layer."""
    for token in range(first, last):
        hidden[token] = weights.embedding[batch.tokens[token]]


@njit(**JIT)
def _own(tokens: Any, thread: Any, threads: Any) -> Any:
    """The tokens whose inputs a thread makes.

    Those of a single one each thread makes for itself (:meth:`Work.own`): sooner than one would wait for another's.
    """
    return range(0, 1) if tokens == 1 else range(thread, tokens, threads)


@njit(**JIT)
def _wait_for_inputs(tokens: Any, barrier: Any, threads: Any) -> None:
    """Wait for those that other threads make."""
    if tokens > 1:
        wait(barrier, threads)


@njit(**JIT)
def step(
    thread: Any, threads: Any, barrier: Any, weights: Any, work: Any, batch: Any, cache: Any
) -> None:
    """A thread's share of a batch: from token ids to the last hidden states, in ``work.hidden``."""
    weights, work, batch, cache = uncounted((weights, work, batch, cache))
    shape, tokens = weights.shape, batch.tokens.shape[0]
    projected = work.projected.reshape(work.projected.shape[0], -1)
    sequences, eps = batch.starts.shape[0] - 1, np.float32(shape.eps)
    own = _own(tokens, thread, threads)
    if tokens >= _TILED:
        tiles.configure(work.layout.ctypes.data)
    for token in own:
        embed(weights, batch, work.hidden, token, token + 1)
    for layer in range(shape.layers):
        linears = weights.linears[layer]
        for token in own:
            normalize(work.hidden[token], weights.norms[layer, 0], eps, work.normed[token])
            _round_inputs(linears, _Q, _OUT, token, tokens, work.normed[token], work)
        _fetch(linears[_Q], weights, thread, threads)
        _wait_for_inputs(tokens, barrier, threads)
        _project(linears, weights, work, tokens, thread, threads, projected)
        wait(barrier, threads)
        for unit in range(thread, sequences * shape.kv_heads, threads):
            sequence, kv_head = unit // shape.kv_heads, unit % shape.kv_heads
            first, last = batch.starts[sequence], batch.starts[sequence + 1]
            for token in range(first, last):
                enter(layer, token, sequence, kv_head, weights, work, batch, cache)
            for token in range(first, last):
                attend(layer, token, sequence, kv_head, weights, work, batch, cache, thread)
        wait(barrier, threads)
        for token in own:
            _round_inputs(linears, _OUT, _GATE, token, tokens, work.attended[token], work)
        _fetch(linears[_OUT], weights, thread, threads)
        _wait_for_inputs(tokens, barrier, threads)
        _add_to_hidden(linears[_OUT], weights, work, tokens, thread, threads)
        wait(barrier, threads)
        for token in own:
            normalize(work.hidden[token], weights.norms[layer, 1], eps, work.normed[token])
            _round_inputs(linears, _GATE, _DOWN, token, tokens, work.normed[token], work)
        _fetch(linears[_GATE], weights, thread, threads)
        _wait_for_inputs(tokens, barrier, threads)
        _activate(linears, weights, work, tokens, thread, threads)
        wait(barrier, threads)
        for token in own:
            _round_inputs(linears, _DOWN, _END, token, tokens, work.activated[token], work)
        _fetch(linears[_DOWN], weights, thread, threads)
        _wait_for_inputs(tokens, barrier, threads)
        _add_to_hidden(linears[_DOWN], weights, work, tokens, thread, threads)
        wait(barrier, threads)
    if tokens >= _TILED:
        tiles.release()


@njit(**JIT)
def head(
    thread: Any, threads: Any, barrier: Any, weights: Any, work: Any, hidden: Any, logits: Any
) -> None:
    """A thread's share of the logits, BF16 ``[tokens, vocab]``, of BF16 hidden states ``[tokens, hidden]``."""
    weights, work, hidden, logits = uncounted((weights, work, hidden, logits))
    tokens = hidden.shape[0]
    for token in _own(tokens, thread, threads):
        _round_inputs(weights.head, 0, 1, token, tokens, hidden[token], work)
    _wait_for_inputs(tokens, barrier, threads)
    if tokens >= _TILED:
        tiles.configure(work.layout.ctypes.data)
    multiply_rows(weights.head[0], weights, work, tokens, thread, threads, logits, 0)
    if tokens >= _TILED:
        tiles.release()
