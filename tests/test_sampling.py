"""The embedded engine's sampling, against the logits processors of `transformers` and a plain sort."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from octavo.engines.torch import sampling
from octavo.engines.torch.request import Output, Sampling
from octavo.engines.torch.sampling import Choices, sample
from octavo.errors import OctavoError

# Numbers that tokens are drawn with to see a whole distribution.
DRAWS = 2000

GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small operations on many threads mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def after(asked: Sampling, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> Choices:
    result = Choices(asked, prompt)
    for token in output:
        result.add(token)
    return result


def outputs(logits: Tensor, rows: Sequence[Choices]) -> list[Output]:
    results = sample(logits, rows)
    assert all(isinstance(result, Output) for result in results), results
    return [result for result in results if isinstance(result, Output)]


def tokens(logits: Tensor, *asked: Sampling) -> list[int]:
    return [one.token for one in outputs(logits, [Choices(one, ()) for one in asked])]


class Drawn(Choices):
    """Draws with the number that it is given."""

    def __init__(self, asked: Sampling, prompt: Sequence[int], drawn_with: float) -> None:
        super().__init__(asked, prompt)
        self.drawn_with = drawn_with

    def number(self, attempt: int = 0) -> float:
        # What is drawn again is drawn by chance.
        return (
            random.Random(f"{self.drawn_with} {attempt}").random() if attempt else self.drawn_with
        )


def frequencies(
    logits: Tensor, asked: Sampling, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> Tensor:
    """How often each token is drawn with evenly spread numbers: its probability, to ``1 / DRAWS``."""
    rows = [Drawn(asked, prompt, (draw + 0.5) / DRAWS) for draw in range(DRAWS)]
    for row in rows:
        for token in output:
            row.add(token)
    drawn = [one.token for one in outputs(logits.expand(DRAWS, -1), rows)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / DRAWS


def expected(
    logits: Tensor, asked: Sampling, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> Tensor:
    """The probabilities as `transformers` has them."""
    ids: Any = torch.tensor([[*prompt, *output]])
    scores: Any = logits.float()[None]
    if asked.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)(ids, scores)
    for token, count in Counter(output).items():
        scores[0, token] -= asked.presence_penalty + asked.frequency_penalty * count
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(asked.temperature))])
    if asked.top_k:
        warpers.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        warpers.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        warpers.append(MinPLogitsWarper(asked.min_p))
    return torch.softmax(warpers(ids, scores)[0], dim=-1)


def close(seen: Tensor, wanted: Tensor, asked: Sampling) -> bool:
    """Whether frequencies are probabilities: as exactly as can be, or by chance where a token may be drawn again."""
    assert not seen[wanted == 0].any()
    again = asked.top_p < 1 and not 0 < asked.top_k < len(wanted)
    errors = 5 * (wanted / DRAWS).sqrt() + 10 / DRAWS if again else 0
    return bool(((seen - wanted).abs() <= 1.01 / DRAWS + errors).all())


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("vocab", [2, 40, 5000])
    def test_the_likeliest_and_of_those_the_first(self, dtype: torch.dtype, vocab: int) -> None:
        logits = random_logits(9, vocab).round().to(dtype)
        expected = [row.index(max(row)) for row in logits.tolist()]
        assert logits.argmax(dim=-1).tolist() == expected
        assert sample(logits, [Choices(GREEDY, ())] * 9) == [Output(token) for token in expected]

    @pytest.mark.parametrize(
        "asked",
        [
            Sampling(temperature=1e-6),
            Sampling(top_k=1),
            Sampling(top_p=0),
            Sampling(min_p=1, top_p=0.01),
            Sampling(temperature=1e-4),
            Sampling(temperature=0, top_k=5, top_p=0.5),
        ],
    )
    def test_what_leaves_one_token(self, asked: Sampling) -> None:
        logits = random_logits(5, 3000)
        assert tokens(logits, *[asked] * 5) == logits.argmax(dim=-1).tolist()


class TestProbabilities:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(
        "asked",
        [
            Sampling(),
            Sampling(temperature=0.5),
            Sampling(temperature=3),
            Sampling(top_k=5),
            Sampling(top_k=39, temperature=2),
            Sampling(top_k=1000, temperature=2),
            Sampling(top_p=0.3),
            Sampling(top_p=0.95, temperature=2),
            Sampling(min_p=0.1),
            Sampling(min_p=0.02, temperature=1.5, top_p=0.9),
            Sampling(top_k=7, top_p=0.8, min_p=0.05, temperature=1.7),
        ],
    )
    def test_those_of_transformers(self, asked: Sampling, dtype: torch.dtype) -> None:
        # Nowhere equal, in BF16 neither: which of equal ones are cut, transformers decides otherwise.
        order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
        logits = (torch.linspace(-5, 5, 40)[order]).to(dtype)
        seen, wanted = frequencies(logits, asked), expected(logits, asked)
        assert close(seen, wanted, asked)

    @pytest.mark.parametrize(
        "asked",
        [
            Sampling(repetition_penalty=1.5),
            Sampling(repetition_penalty=0.7),
            Sampling(presence_penalty=1.2),
            Sampling(frequency_penalty=-0.4),
            Sampling(1.3, 10, 0.9, 0.01, 1.2, 0.5, 0.3),
        ],
    )
    def test_penalties(self, asked: Sampling) -> None:
        logits = random_logits(40, seed=3)
        history = [1, 2, 3, 3, 30], [3, 4, 4, 4, 39, 1]
        seen, wanted = frequencies(logits, asked, *history), expected(logits, asked, *history)
        assert close(seen, wanted, asked)

    def test_penalties_of_a_greedy_request(self) -> None:
        asked = Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
        logits = torch.tensor([[1.0, 1.8, 0.0]])
        results = [after(asked, [1], [1] * count) for count in range(4)]
        assert [one.token for one in outputs(logits.expand(4, -1), results)] == [1, 1, 0, 0]

    @example([0] * 8 + [1, 1], 8, 0.5, 0)  # the share is of more than the first few
    @given(
        st.lists(st.integers(0, 2), min_size=10, max_size=40),
        st.integers(0, 41),
        st.just(1.0) | st.floats(0, 1),
        st.sampled_from([0, 0.2, 0.5]),
    )
    @settings(max_examples=60)
    def test_among_equals_the_first(
        self, logits: list[int], top_k: int, top_p: float, min_p: float
    ) -> None:
        """A plain sort agrees, though candidates are first looked for among few."""
        order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
        order = order[: top_k or None]
        total = sum(math.exp(logits[token]) for token in order)
        wanted, before = torch.zeros(len(logits)), 0.0
        for token in order:
            assume(not math.isclose(before, top_p * total, rel_tol=1e-6))
            share = math.exp(logits[token] - max(logits))
            if token == order[0] or (before < top_p * total and share >= min_p):
                wanted[token] = share
            before += math.exp(logits[token])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_WIDTHS", (4, 16))
            asked = Sampling(1, top_k, top_p, min_p)
            seen = frequencies(torch.tensor(logits).float(), asked)
        assert close(seen, wanted / wanted.sum(), asked)

    def test_a_nucleus_of_thousands(self) -> None:
        logits = torch.zeros(100, 30000)
        logits[:, [7, 29999]] = 2
        rows = [Drawn(Sampling(top_p=0.5), (), (draw + 0.5) / 100) for draw in range(100)]
        seen = {one.token for one in outputs(logits, rows)} - {29999}
        assert 14000 < max(seen) < 15000 - math.exp(2)


class TestDraws:
    @pytest.mark.parametrize("asked", [Sampling(), Sampling(top_k=20), Sampling(1.5, 0, 0.7)])
    def test_chi_square(self, asked: Sampling) -> None:
        """Of the numbers too: tokens of one request after another, and of requests with other seeds."""
        logits, draws = random_logits(50, seed=5) / 2, 10000
        wanted = expected(logits, asked)
        rows = [Choices(asked._replace(seed=seed), ()) for seed in range(100)]
        drawn: list[int] = []
        while len(drawn) < draws:
            drawn += [one.token for one in outputs(logits.expand(100, -1), rows)]
            for row in rows:
                row.add(drawn[-1])
        seen = torch.bincount(torch.tensor(drawn), minlength=50)
        some = wanted * draws > 5
        rest = wanted[~some].sum() * draws
        deviations = (seen[some] - wanted[some] * draws).square() / (wanted[some] * draws)
        freedom = int(some.sum()) - 1
        assert deviations.sum() < freedom + 4 * math.sqrt(2 * freedom)
        assert abs(seen[~some].sum() - rest) < 5 * math.sqrt(float(rest) + 1)

    def test_numbers(self) -> None:
        row = Choices(Sampling(seed=3), ())
        numbers = []
        for _ in range(20000):
            numbers.append(row.number())
            row.add(0)
        seen = torch.tensor(numbers, dtype=torch.float64)
        assert 0 <= seen.min() < seen.max() < 1
        assert abs(seen.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20000)
        pairs = torch.stack([seen[:-1], seen[1:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(20000)

    def test_seeds(self) -> None:
        def continuation(seed: int | None) -> list[int]:
            row = Choices(Sampling(temperature=2, seed=seed), ())
            result = []
            for step in range(30):
                result.append(outputs(random_logits(1, 100, seed=step), [row])[0].token)
                row.add(result[-1])
            return result

        assert continuation(5) == continuation(5)
        assert continuation(-1) == continuation(-1)
        different = [continuation(seed) for seed in (5, 6, -1, 2**63, None, None)]
        assert len(set(map(tuple, different))) == 6

    def test_nothing_else_in_the_batch_matters(self) -> None:
        asked = [
            GREEDY,
            Sampling(seed=1),
            Sampling(seed=2, top_k=40),
            Sampling(seed=3, top_p=0.9, temperature=2),
            Sampling(seed=4, top_p=0.99, top_k=200, repetition_penalty=1.2),
            Sampling(seed=5, min_p=0.01, logprobs=3),
            Sampling(temperature=0, frequency_penalty=1, logprobs=200),
            Sampling(seed=6, logprobs=0, presence_penalty=0.5),
        ]
        logits = random_logits(8, 5000, seed=1).to(torch.bfloat16)

        def rows() -> list[Choices]:
            return [after(one, range(50), range(20, 90)) for one in asked]

        alone = [outputs(logits[i : i + 1], [row])[0] for i, row in enumerate(rows())]
        assert outputs(logits, rows()) == alone
        order = random.Random(0).sample(range(8), 8)
        shuffled = rows()
        results = outputs(logits[order], [shuffled[index] for index in order])
        assert results == [alone[index] for index in order]


class TestLogprobs:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_those_of_the_model(self, dtype: torch.dtype) -> None:
        logits = random_logits(4, 3000).to(dtype)
        asked = [
            Sampling(temperature=0, logprobs=5),
            Sampling(temperature=4, top_k=10, logprobs=0, seed=1),
            Sampling(presence_penalty=2, logprobs=300, seed=1),
            Sampling(),
        ]
        results = outputs(logits, [after(one, [], [5, 6]) for one in asked])
        reference = torch.log_softmax(logits.float(), dim=-1)
        for row, (one, result) in enumerate(zip(asked, results, strict=True)):
            if one.logprobs is None:
                assert result.logprob is None
                assert result.top == ()
                continue
            assert result.logprob == float(reference[row, result.token])
            order = sorted(range(3000), key=lambda token: (-float(logits[row, token]), token))
            assert [token for token, _ in result.top] == order[: one.logprobs]
            assert all(value == float(reference[row, token]) for token, value in result.top)
        assert results[0].top[0] == (results[0].token, results[0].logprob)

    def test_no_more_than_there_are(self) -> None:
        (result,) = outputs(torch.zeros(1, 6), [Choices(Sampling(0, logprobs=10), ())])
        assert [token for token, _ in result.top] == list(range(6))


class TestNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_ends_one_row_only(self, value: float, dtype: torch.dtype) -> None:
        logits = random_logits(6, 300).to(dtype)
        asked = [GREEDY, Sampling(), Sampling(top_k=5), Sampling(top_p=0.9, logprobs=2)]
        for one in asked:
            rows = [Choices(one, ()) for _ in range(6)]
            spoilt = logits.clone()
            spoilt[3] = value
            results = sample(spoilt, rows)
            assert isinstance(results[3], OctavoError)
            assert "octavo verify" in str(results[3])
            assert sum(isinstance(result, Output) for result in results) == 5

    def test_one_nan_is_enough(self) -> None:
        logits = random_logits(2, 300)
        logits[1, 299] = math.nan
        good, bad = sample(logits, [Choices(GREEDY, ())] * 2)
        assert isinstance(good, Output)
        assert isinstance(bad, OctavoError)

    @pytest.mark.parametrize(
        "asked", [GREEDY, Sampling(), Sampling(top_k=9), Sampling(5, 0, 0.999), Sampling(min_p=0)]
    )
    def test_minus_infinity_is_never_drawn(self, asked: Sampling) -> None:
        logits = torch.full((40,), -math.inf)
        logits[[4, 30]] = torch.tensor([0.0, -1.0])
        seen = frequencies(logits, asked._replace(repetition_penalty=1.01), [4, 5])
        assert set(seen.nonzero()[:, 0].tolist()) <= {4, 30}
        (first,) = outputs(logits[None], [Drawn(asked, (), 0)])
        assert first.token == 4
