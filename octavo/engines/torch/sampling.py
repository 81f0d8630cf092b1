"""From logits to tokens, the rows of a batch together.

A row's token depends on its logits, its request and that one's tokens so far, and on nothing else in the batch: it is
drawn with numbers that are hashes of the seed and the count of these tokens, and candidates are ordered by logit and,
where logits are equal (in BF16 they often are), by token id.
"""

from __future__ import annotations

import itertools
import math
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
import xxhash
from torch import Tensor

from octavo.engines.torch.request import Output, Sampling
from octavo.errors import OctavoError

# Below this temperature, the likeliest token is taken: float32 could not tell any other apart.
_GREEDY = 1e-5

# Beyond any use. Logits that are this large are an overflow, and no number of a request makes others overflow.
_MOST = 1e6
_MOST_LOGIT = 1e30

_RANGES = {
    "temperature": (0.0, _MOST),
    "top_k": (0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1 / _MOST, _MOST),
    "presence_penalty": (-_MOST, _MOST),
    "frequency_penalty": (-_MOST, _MOST),
}

# How many of the likeliest tokens are sorted first. Top-k mostly falls among these; a row where it does not is taken
# again with more, in the end with all.
_WIDTHS = (128, 2048)

# How tokens of a kind of rows are chosen; from scores, which may be overwritten.
_Kind: TypeAlias = "Callable[[Tensor, Sequence[Choices]], Tensor]"


class Choices:
    """What a request asks for, and what was chosen for it so far.

    Attributes:
        sampling: as asked for.
        greedy: the likeliest token is taken.
        penalized: logits depend on the tokens so far.
        plain: greedy, and nothing else is asked for.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        """
        Args:
            sampling: how tokens are chosen.
            prompt: token ids.

        Raises:
            OctavoError: A number is out of its range.
        """
        _check(sampling)
        self.sampling = sampling
        self.greedy = sampling.temperature < _GREEDY or sampling.top_k == 1
        penalties = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        self.penalized = penalties != (1.0, 0.0, 0.0)
        self.plain = self.greedy and not self.penalized and sampling.logprobs is None
        self._seed = secrets.randbits(64) if sampling.seed is None else sampling.seed % (1 << 64)
        self._count = 0
        # The different tokens so far, and how often each is in the output; where each is in these.
        self.ids = array("q", dict.fromkeys(prompt) if self.penalized else ())
        self.times = array("f", bytes(4 * len(self.ids)))
        self._places = {token: place for place, token in enumerate(self.ids)}

    def add(self, token: int) -> None:
        """Tell what was chosen."""
        self._count += 1
        if self.penalized:
            place = self._places.setdefault(token, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token)
                self.times.append(0)
            self.times[place] += 1

    def number(self, attempt: int = 0) -> float:
        """The number in [0, 1), uniformly distributed, that the next token is drawn with in an attempt."""
        place = struct.pack("<QQ", self._count, attempt)
        # 48 bits: a product with it is below the other factor, in float64.
        return (xxhash.xxh3_64_intdigest(place, self._seed) >> 16) / (1 << 48)


def sample(logits: Tensor, rows: Sequence[Choices]) -> list[Output | OctavoError]:
    """Choose a token for each row.

    Args:
        logits: ``[rows, vocab]``, BF16 or float32.
        rows: what each row's token is chosen by; to be told of it (:meth:`Choices.add`).

    Returns:
        Tokens, with log-probabilities where asked for; an error for a row whose logits are not finite
        (a token that cannot be may have minus infinity).
    """
    # torch.argmax gives the same tokens (of equal ones the first, and NaN before all), but takes three times as long.
    highest, likeliest = logits.max(dim=-1)
    finite = [abs(value) < _MOST_LOGIT for value in highest.tolist()]
    tokens: list[int] = likeliest.tolist()
    outputs: list[Output | OctavoError]
    outputs = [
        Output(token) if good else _not_finite() for token, good in zip(tokens, finite, strict=True)
    ]
    if all(row.plain for row in rows):
        return outputs
    asking = [index for index, row in enumerate(rows) if finite[index] and not row.plain]
    drawn = [index for index in asking if not rows[index].greedy or rows[index].penalized]
    if drawn:
        chosen = _draw(_float32(logits, drawn), [rows[index] for index in drawn])
        for index, token in zip(drawn, chosen, strict=True):
            tokens[index] = token
            outputs[index] = Output(token)
    told = [index for index in asking if rows[index].sampling.logprobs is not None]
    if told:
        counts = [rows[index].sampling.logprobs or 0 for index in told]
        telling = _tell(_float32(logits, told), [tokens[index] for index in told], counts)
        for index, output in zip(told, telling, strict=True):
            outputs[index] = output
    return outputs


def _draw(scores: Tensor, rows: Sequence[Choices]) -> list[int]:
    """Tokens of rows that are penalized or not greedy; the logits are overwritten."""
    if any(row.penalized for row in rows):
        _penalize(scores, rows)
    kinds: dict[_Kind, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(_kind(row, scores.shape[1]), []).append(index)
    tokens = [0] * len(rows)
    for kind, indices in kinds.items():
        part = scores if len(indices) == len(rows) else scores[indices]
        chosen = kind(part, [rows[index] for index in indices]).tolist()
        for index, token in zip(indices, chosen, strict=True):
            tokens[index] = token
    return tokens


def _kind(row: Choices, vocab: int) -> _Kind:
    if row.greedy:
        return _likeliest
    if 0 < row.sampling.top_k < vocab:
        return _draw_of_best
    return _draw_of_nucleus if row.sampling.top_p < 1 else _draw_of_all


def _penalize(scores: Tensor, rows: Sequence[Choices]) -> None:
    """Repetition, then presence and frequency penalties: on the tokens so far, all rows' at once."""
    ids = torch.frombuffer(bytearray().join(row.ids for row in rows), dtype=torch.int64)
    times = torch.frombuffer(bytearray().join(row.times for row in rows), dtype=torch.float32)
    row_of = torch.repeat_interleave(torch.tensor([len(row.ids) for row in rows]))
    ids, times, row_of = (one.to(scores.device) for one in (ids, times, row_of))
    asked = [row.sampling for row in rows]
    repetition = _column(scores, (one.repetition_penalty for one in asked))[row_of, 0]
    presence = _column(scores, (one.presence_penalty for one in asked))[row_of, 0]
    frequency = _column(scores, (one.frequency_penalty for one in asked))[row_of, 0]
    before = scores[row_of, ids]
    after = torch.where(before > 0, before / repetition, before * repetition)
    scores[row_of, ids] = after - presence * (times > 0) - frequency * times


def _likeliest(scores: Tensor, _: Sequence[Choices]) -> Tensor:
    return scores.max(dim=-1).indices


def _draw_of_all(scores: Tensor, rows: Sequence[Choices]) -> Tensor:
    """Min-p, which needs no order."""
    weights = _heat(scores, rows).exp_()
    return _pick(_without_small(weights, rows), rows)


def _draw_of_nucleus(scores: Tensor, rows: Sequence[Choices]) -> Tensor:
    """Top-p and min-p, without sorting the vocabulary.

    A token is drawn of all. If those before it reach top-p it is not in the nucleus, nor are those behind it: then
    another is drawn of those before it, and so on (the rejection sampling of FlashInfer).
    """
    weights = _heat(scores, rows).exp_()
    limits = weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    limits *= _column(limits, (row.sampling.top_p for row in rows))
    candidates = _without_small(weights, rows)
    ids = torch.arange(weights.shape[1], device=weights.device)
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=weights.device)
    left = torch.arange(len(rows), device=weights.device)
    for attempt in itertools.count():
        picked = _pick(candidates, [rows[index] for index in left.tolist()], attempt).unsqueeze(1)
        tokens[left] = picked.squeeze(1)
        weight = weights.gather(1, picked)
        before = (weights > weight) | ((weights == weight) & (ids < picked))
        mass = torch.where(before, weights, 0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        # Nothing is before the first token, which is always in the nucleus.
        outside = ((mass >= limits) & (mass > 0)).squeeze(1)
        if not outside.any():
            break
        candidates = candidates[outside].masked_fill_(~before[outside], 0)
        left, weights, limits = left[outside], weights[outside], limits[outside]
    return tokens


def _draw_of_best(scores: Tensor, rows: Sequence[Choices]) -> Tensor:
    """Top-k, then top-p of what that leaves, and min-p."""
    tokens = torch.zeros(len(rows), dtype=torch.int64, device=scores.device)
    left = list(range(len(rows)))
    for width in (*_WIDTHS, scores.shape[1]):
        part = scores if len(left) == len(rows) else scores[left]
        asking = [rows[index] for index in left]
        values, ids = _ranked(part, width)
        weights = _heat(values.clone(), asking).exp_()
        _cut(weights, asking)
        tokens[left] = ids.gather(1, _pick(weights, asking).unsqueeze(1)).squeeze(1)
        if width >= scores.shape[1]:
            break
        # Tokens that are equal to the last one may be missing, and some of those that top-p is a share of.
        lowest = values.masked_fill(weights == 0, math.inf).amin(dim=-1)
        unsure = lowest <= values[:, -1]
        unsure |= _column(unsure, (one.sampling.top_k > width for one in asking)).squeeze(1)
        left = [index for index, again in zip(left, unsure.tolist(), strict=True) if again]
        if not left:
            break
    return tokens


def _heat(scores: Tensor, rows: Sequence[Choices]) -> Tensor:
    """Logits over temperature, in place, the highest 0."""
    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= _column(scores, (row.sampling.temperature for row in rows))
    return scores


def _without_small(weights: Tensor, rows: Sequence[Choices]) -> Tensor:
    """Weights, of which the highest is 1, with min-p applied."""
    if not any(row.sampling.min_p for row in rows):
        return weights
    return weights.masked_fill(weights < _column(weights, (row.sampling.min_p for row in rows)), 0)


def _ranked(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The highest ``width`` of each row and their indices: highest first, of equal ones the lower index first.

    Equal ones at the end may lack some that have a lower index, unless ``width`` is everything.
    """
    if width >= scores.shape[1]:
        values, ids = scores.sort(dim=-1, stable=True, descending=True)
        return values, ids
    values, ids = scores.topk(width)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, stable=True, descending=True)
    return values, ids.gather(1, order)


def _cut(weights: Tensor, rows: Sequence[Choices]) -> None:
    """Make the weights of ranked tokens 0 that top-k, top-p and min-p leave out."""
    asked = [row.sampling for row in rows]
    ranks = torch.arange(weights.shape[1], device=weights.device)
    weights.masked_fill_(ranks >= _column(ranks, (one.top_k for one in asked)), 0)
    # A token stays if those before it do not reach top-p. Nothing is cut by 1, whatever the rounding.
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    top_p = _column(sums, (one.top_p if one.top_p < 1 else math.inf for one in asked))
    cut = sums - weights >= top_p * sums[:, -1:]
    cut |= weights < _column(weights, (one.min_p for one in asked))
    cut[:, 0] = False
    weights.masked_fill_(cut, 0)


def _pick(weights: Tensor, rows: Sequence[Choices], attempt: int = 0) -> Tensor:
    """Draw a column of each row: int64 ``[rows]``."""
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    numbers = _column(sums, (row.number(attempt) for row in rows))
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True).squeeze(1)


def _tell(scores: Tensor, tokens: list[int], counts: list[int]) -> list[Output]:
    """Tokens with their log-probabilities, and as many of the likeliest as each row asks for."""
    logprobs = torch.log_softmax(scores, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=scores.device).unsqueeze(1))
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if any(counts):
        ids = _highest(scores, max(counts))
        pairs = zip(ids.tolist(), logprobs.gather(1, ids).tolist(), strict=True)
        tops = [
            tuple(zip(some, their, strict=True))[:count]
            for (some, their), count in zip(pairs, counts, strict=True)
        ]
    return [
        Output(token, None, logprob, top)
        for token, logprob, top in zip(tokens, chosen.squeeze(1).tolist(), tops, strict=True)
    ]


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of each row's highest, in the order of :func:`_ranked`: int64 ``[rows, count]``."""
    for width in _WIDTHS:
        if count < width < scores.shape[1]:
            values, ids = _ranked(scores, width)
            if bool((values[:, count - 1] > values[:, -1]).all()):
                return ids[:, :count]
    return _ranked(scores, scores.shape[1])[1][:, :count]


def _float32(logits: Tensor, rows: list[int]) -> Tensor:
    """A copy of some rows."""
    if len(rows) == len(logits):
        return logits.to(torch.float32, copy=True)
    return logits[rows].float()


def _column(like: Tensor, numbers: Iterable[float]) -> Tensor:
    """Numbers as ``[rows, 1]``, with the dtype and device of a tensor."""
    return torch.tensor(list(numbers), dtype=like.dtype, device=like.device).unsqueeze(1)


def _check(sampling: Sampling) -> None:
    for name, (least, most) in _RANGES.items():
        value = getattr(sampling, name)
        if not least <= value <= most:
            raise OctavoError(
                f"{name} is {value}; expected a number from {least:g} to {most:g}. Ask for one."
            )
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise OctavoError(
            f"logprobs is {sampling.logprobs}; expected a count of tokens from 0, or none. Ask for one."
        )


def _not_finite() -> OctavoError:
    return OctavoError(
        "the model's logits hold NaN or infinity; expected finite numbers. The checkpoint is "
        "damaged, or its activations overflow: check it with `octavo verify`."
    )
