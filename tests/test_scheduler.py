"""The embedded engine's blocks, scheduler and runner, on a model whose every token depends on all that it reads
back from the cache: a wrong table, a shared block that is overwritten or a prefix that is not one changes the tokens.
"""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.engines.torch.batch import BLOCK, Batch, Cache
from octavo.engines.torch.blocks import ROOT, Blocks
from octavo.engines.torch.request import Output, Request, Sampling
from octavo.engines.torch.runner import DrainingError, QueueFullError, Runner, Ticket
from octavo.engines.torch.sampling import Choices, sample
from octavo.engines.torch.scheduler import Scheduler, SequenceState
from octavo.errors import OctavoError

VOCAB = 23
GREEDY = Sampling(temperature=0)

# Seconds that nothing here takes.
LONG = 30


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small operations on many threads mostly wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of(digest: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(digest).standard_normal(VOCAB, np.float32))


def digest_of(context: Sequence[int]) -> int:
    return zlib.crc32(bytes(context))


class FakeCache:
    """Which token each slot holds, and its position."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.nbytes = 0
        self.slots = np.full((blocks * BLOCK, 2), -1)


class FakeModel:
    """Its last hidden state is a digest of all tokens up to there, as the cache has them."""

    vocab_size = VOCAB
    max_positions = 300

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.before: Callable[[Batch], None] = lambda _: None
        self.closed = False

    def new_cache(self, blocks: int) -> FakeCache:
        return FakeCache(blocks)

    def forward(self, batch: Batch, cache: Cache) -> Tensor:
        assert isinstance(cache, FakeCache)
        self.before(batch)
        assert all(one.dtype == torch.int64 for one in batch)
        tokens, positions, starts, tables, wanted = (one.numpy() for one in batch)
        counts = np.diff(starts)
        assert starts[0] == 0
        assert starts[-1] == len(tokens) == len(positions)
        assert (counts > 0).all()
        self.computed.append(len(tokens))
        tables = tables.repeat(counts, axis=0)
        written = tables[range(len(tokens)), positions // BLOCK] * BLOCK + positions % BLOCK
        assert len(set(written.tolist())) == len(written)
        cache.slots[written, 0], cache.slots[written, 1] = tokens, positions
        digests = []
        for index in wanted.tolist():
            places = np.arange(positions[index] + 1)
            read = cache.slots[tables[index, places // BLOCK] * BLOCK + places % BLOCK]
            assert (read[:, 1] == places).all()
            digests.append(digest_of(read[:, 0].tolist()))
        return torch.tensor(digests, dtype=torch.int64)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.stack([logits_of(int(digest)) for digest in hidden])

    def close(self) -> None:
        self.closed = True


def reference(request: Request) -> list[int]:
    """The tokens of a request on its own, from its whole context each time."""
    context = list(request.prompt)
    choices = Choices(request.sampling, request.prompt)
    while len(context) < len(request.prompt) + request.max_tokens:
        (output,) = sample(logits_of(digest_of(context))[None], [choices])
        assert isinstance(output, Output)
        choices.add(output.token)
        context.append(output.token)
        if output.token in request.stop:
            break
    return context[len(request.prompt) :]


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def check(scheduler: Scheduler) -> None:
    """Blocks are held by those that run, as often as they are in their tables; the others are free or known."""
    blocks = scheduler.blocks
    held = Counter(block for sequence in scheduler.running for block in sequence.table)
    assert blocks._holders == [held[block] for block in range(blocks.total)]
    assert blocks.used == len(held)
    assert sorted([*blocks._free, *blocks._idle, *held]) == list(range(blocks.total))
    assert {block: key for key, block in blocks._known.items()} == blocks._keys
    assert all(parent in {ROOT, *blocks._keys} for parent, _ in blocks._known)
    assert not any(sequence.table or sequence.computed for sequence in scheduler.waiting)


def run(scheduler: Scheduler) -> dict[SequenceState, list[Output | Exception]]:
    """Step until nothing is left."""
    results: dict[SequenceState, list[Output | Exception]] = {}
    while scheduler.busy:
        for sequence, output in scheduler.step():
            results.setdefault(sequence, []).append(output)
        check(scheduler)
    return results


def tokens_of(outputs: Sequence[Output | Exception]) -> list[int]:
    assert all(isinstance(output, Output) for output in outputs), outputs
    return [output.token for output in outputs if isinstance(output, Output)]


class Visit(NamedTuple):
    """A request, the step before which it comes, and the one before which it is cancelled."""

    request: Request
    comes: int
    leaves: int | None


@st.composite
def visits(draw: st.DrawFn) -> Visit:
    shared = draw(st.integers(0, 4)) * 12
    own = draw(st.integers(0 if shared else 1, 30))
    sampling = draw(
        st.sampled_from(
            [GREEDY, Sampling(seed=1), Sampling(0.7, 5, 0.9, repetition_penalty=1.3, seed=2)]
        )
    )
    request = Request(
        prompt(shared) + prompt(own, draw(st.integers(1, 3))),
        draw(st.integers(1, 10) | st.integers(30, 60)),
        sampling,
        draw(st.frozensets(st.integers(0, VOCAB - 1), max_size=2)),
    )
    leaves = draw(st.none() | st.none() | st.integers(0, 60))
    return Visit(request, draw(st.integers(0, 10)), leaves)


class TestTraffic:
    @given(
        st.lists(visits(), min_size=1, max_size=10),
        st.sampled_from([0, 1, 2, 4, 16]),
        st.integers(1, 6),
        st.integers(0, 40),
    )
    @settings(max_examples=80)
    def test_every_request_gets_its_own_tokens(
        self, guests: list[Visit], more_blocks: int, max_running: int, more: int
    ) -> None:
        longest = max(len(one.request.prompt) + one.request.max_tokens for one in guests)
        blocks = -(-longest // BLOCK) + more_blocks
        scheduler = Scheduler(
            FakeModel(), blocks=blocks, max_running=max_running, max_tokens=max_running + more
        )
        # In every step the one that has been here longest goes on, so there cannot be more steps.
        most = 20 + sum(len(one.request.prompt) + one.request.max_tokens for one in guests)
        states: dict[int, SequenceState] = {}
        outputs: dict[SequenceState, list[Output | Exception]] = {}
        for step in range(most + 1):
            for index, guest in enumerate(guests):
                if guest.comes == step:
                    states[index] = scheduler.add(guest.request)
                    outputs[states[index]] = []
                if guest.leaves == step and index in states:
                    scheduler.cancel(states[index])
            check(scheduler)
            line = [*scheduler.running, *scheduler.waiting]
            assert line == [sequence for sequence in outputs if sequence in line]
            oldest = next(iter(line), None)
            computed = oldest.computed if oldest else 0
            for sequence, output in scheduler.step():
                outputs[sequence].append(output)
            check(scheduler)
            if oldest in scheduler.running:
                assert oldest is scheduler.running[0]
                assert oldest.computed > computed
            else:
                assert oldest not in scheduler.waiting
        assert not scheduler.busy
        assert scheduler.blocks.used == 0
        for index, state in states.items():
            expected = reference(guests[index].request)
            told = outputs[state]
            assert tokens_of(told) == expected[: len(told)]
            if guests[index].leaves is None:
                assert len(told) == len(expected)
            finishes = [output.finish for output in told if isinstance(output, Output)]
            assert not any(finishes[:-1])
            if len(told) == len(expected):
                stopped = expected[-1] in guests[index].request.stop
                assert finishes[-1] == ("stop" if stopped else "length")
        assert scheduler.finished + scheduler.cancelled == len(states)


class TestScheduler:
    def test_a_long_prompt_holds_up_nobody(self) -> None:
        model = FakeModel()
        scheduler = Scheduler(model, blocks=40, max_tokens=8, max_running=4)
        short = scheduler.add(Request(prompt(3), 30, GREEDY))
        scheduler.step()
        long = scheduler.add(Request(prompt(100, 1), 5, GREEDY))
        for _ in range(14):
            told = dict(scheduler.step())
            assert set(told) == {short}
        assert long.computed == 14 * 7
        assert set(dict(scheduler.step())) == {short, long}
        assert set(model.computed) == {3, 8, 1 + 2}

    def test_first_come_first_served(self) -> None:
        scheduler = Scheduler(FakeModel(), blocks=40, max_tokens=16, max_running=2)
        sequences = [scheduler.add(Request(prompt(20, seed), 4, GREEDY)) for seed in range(5)]
        assert list(run(scheduler)) == sequences

    def test_a_prefix_is_computed_once(self) -> None:
        model = FakeModel()
        scheduler = Scheduler(model, blocks=40)
        first = Request(prompt(100), 10, GREEDY)
        run(scheduler_with(scheduler, first))
        assert sum(model.computed) == 109
        assert (scheduler.blocks.cached, scheduler.blocks.used) == (6, 0)
        # What was generated is known as well as the prompt.
        again = Request([*first.prompt, *reference(first), 1], 1, GREEDY)
        (outputs,) = run(scheduler_with(scheduler, again)).values()
        assert tokens_of(outputs) == reference(again)
        assert sum(model.computed) == 109 + 111 - 96
        assert scheduler.prefix_hit_tokens == 96

    def test_the_last_token_of_a_known_prompt_is_computed(self) -> None:
        model = FakeModel()
        scheduler = Scheduler(model, blocks=40)
        request = Request(prompt(2 * BLOCK), 1, GREEDY)
        for _ in range(2):
            (outputs,) = run(scheduler_with(scheduler, request)).values()
            assert tokens_of(outputs) == reference(request)
        assert model.computed == [2 * BLOCK, BLOCK]

    def test_prompts_alike_that_come_together_share(self) -> None:
        model = FakeModel()
        scheduler = Scheduler(model, blocks=40, max_tokens=30, max_running=4)
        request = Request(prompt(200), 3, GREEDY)
        results = run(scheduler_with(scheduler, *[request] * 4))
        assert [tokens_of(outputs) for outputs in results.values()] == [reference(request)] * 4
        assert scheduler.preemptions == 0
        assert sum(model.computed) < 2 * 200

    def test_without_blocks_the_last_to_come_waits(self) -> None:
        scheduler = Scheduler(FakeModel(), blocks=8, max_running=4)
        requests = [Request(prompt(20, seed), 60, GREEDY) for seed in range(3)]
        sequences = [scheduler.add(request) for request in requests]
        results = run(scheduler)
        assert scheduler.preemptions > 0
        for sequence, request in zip(sequences, requests, strict=True):
            assert tokens_of(results[sequence]) == reference(request)
        ends = [sequence for sequence in results if sequence not in scheduler.running]
        assert ends == sequences

    def test_prefixes_go_before_a_sequence_is_preempted(self) -> None:
        scheduler = Scheduler(FakeModel(), blocks=8)
        run(scheduler_with(scheduler, Request(prompt(120), 8, GREEDY)))
        assert scheduler.blocks.cached == 7
        run(scheduler_with(scheduler, Request(prompt(40, 1), 80, GREEDY)))
        assert scheduler.preemptions == 0

    @pytest.mark.parametrize(
        ("request_", "says"),
        [
            (Request(prompt(290), 11), "together 301; the model has 300 positions"),
            (Request(prompt(100), 61), "the cache room for 160 tokens.*give the cache more memory"),
            (Request([], 1), "a prompt of 0 tokens"),
            (Request([1], 0), "asks for 0 new ones"),
            (Request([1, VOCAB], 1), "the token 23; the model knows 0 to 22"),
            (Request([-1], 1), "the token -1"),
            (Request([1], 1, Sampling(top_p=1.5)), "top_p is 1.5; expected a number from 0 to 1"),
            (Request([1], 1, Sampling(temperature=float("nan"))), "temperature is nan"),
            (Request([1], 1, Sampling(logprobs=-1)), "logprobs is -1"),
        ],
    )
    def test_what_can_never_be_served_is_refused(self, request_: Request, says: str) -> None:
        blocks = 40 if len(request_.prompt) == 290 else 10
        scheduler = Scheduler(FakeModel(), blocks=blocks)
        with pytest.raises(OctavoError, match=says):
            scheduler.add(request_)
        assert not scheduler.busy

    def test_a_batch_has_room_for_all_that_run(self) -> None:
        with pytest.raises(OctavoError, match="65 sequences are to run at a time in batches of 64"):
            Scheduler(FakeModel(), blocks=8, max_running=65, max_tokens=64)

    def test_cancelled_at_once(self) -> None:
        scheduler = Scheduler(FakeModel(), blocks=40, max_running=1)
        running, waiting = (scheduler.add(Request(prompt(50, seed), 9)) for seed in range(2))
        scheduler.step()
        for sequence in (waiting, running, running):
            scheduler.cancel(sequence)
            check(scheduler)
        assert not scheduler.busy
        assert (scheduler.cancelled, scheduler.finished, scheduler.blocks.used) == (2, 0, 0)

    def test_the_batch_of_a_model_that_fails_ends(self) -> None:
        model = FakeModel()
        scheduler = Scheduler(model, blocks=40, max_running=2)
        requests = [Request(prompt(50, seed), 5, GREEDY) for seed in range(3)]
        first, second, third = (scheduler.add(request) for request in requests)
        scheduler.step()
        failure = MemoryError("no more")

        def fail(_: Batch) -> None:
            raise failure

        model.before = fail
        assert scheduler.step() == [(first, failure), (second, failure)]
        check(scheduler)
        model.before = lambda _: None
        assert tokens_of(run(scheduler)[third]) == reference(requests[2])
        assert scheduler.finished == 3

    def test_logits_that_are_not_finite_end_their_request(self) -> None:
        model = FakeModel()
        scheduler = Scheduler(model, blocks=40)
        requests = [Request(prompt(5, seed), 5, GREEDY) for seed in range(2)]
        spoilt, good = (scheduler.add(request) for request in requests)
        plain = model.logits

        def spoil(hidden: Tensor) -> Tensor:
            result = plain(hidden)
            if spoilt in scheduler.running:
                result[0, 3] = torch.nan
            return result

        model.logits = spoil  # type: ignore[method-assign]
        results = run(scheduler)
        (error,) = results[spoilt]
        assert isinstance(error, OctavoError)
        assert tokens_of(results[good]) == reference(requests[1])


def scheduler_with(scheduler: Scheduler, *requests: Request) -> Scheduler:
    for request in requests:
        scheduler.add(request)
    return scheduler


class TestBlocks:
    def test_the_ends_of_prefixes_are_forgotten_first(self) -> None:
        blocks = Blocks(6)
        tokens = prompt(4 * BLOCK)
        other = tokens[: 2 * BLOCK] + prompt(2 * BLOCK, 1)
        self.compute(blocks, tokens, 4)
        self.compute(blocks, other, 4)
        assert (blocks.free, blocks.cached, blocks.used) == (0, 6, 0)
        # Least recently used: the first one's own end.
        for left in [(3, 4), (2, 4), (2, 3), (2, 2), (1, 1), (0, 0)]:
            taken = blocks.take(1)
            blocks._holders[taken[0]] = 0
            found = [len(blocks.known([*one, 0])) for one in (tokens, other)]
            assert tuple(found) == left
        assert blocks.cached == 0

    def test_equal_blocks_become_one(self) -> None:
        blocks = Blocks(4)
        tokens = prompt(BLOCK)
        one, two = blocks.take(2)
        assert blocks.remember(one, tokens, 0, ROOT) == one
        assert blocks.remember(two, tokens, 0, ROOT) == one
        assert (blocks.free, blocks.cached, blocks.used) == (3, 0, 1)
        blocks.release([one])
        assert (blocks.free, blocks.cached, blocks.used) == (3, 0, 1)
        blocks.release([one])
        assert (blocks.free, blocks.cached, blocks.used) == (3, 1, 0)
        assert blocks.available([one]) == 3

    def compute(self, blocks: Blocks, tokens: list[int], count: int) -> None:
        table = blocks.known([*tokens, 0])
        blocks.hold(table)
        known = len(table)
        table += blocks.take(count - known)
        for index in range(known, count):
            table[index] = blocks.remember(
                table[index], tokens, index, table[index - 1] if index else ROOT
            )
        blocks.release(table)


class Caller:
    """Who waits for a request's outputs."""

    def __init__(self) -> None:
        self.outputs: list[Output | Exception] = []
        self.ended = threading.Event()

    def __call__(self, output: Output | Exception) -> None:
        self.outputs.append(output)
        if isinstance(output, Exception) or output.finish:
            self.ended.set()

    def tokens(self) -> list[int]:
        assert self.ended.wait(LONG)
        return tokens_of(self.outputs)

    def error(self) -> Exception:
        assert self.ended.wait(LONG)
        error = self.outputs[-1]
        assert isinstance(error, Exception)
        return error


class Gate:
    """Holds a model's batches up."""

    def __init__(self, model: FakeModel) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        model.before = self.wait

    def wait(self, _: Batch) -> None:
        self.entered.set()
        assert self.opened.wait(LONG)


@contextmanager
def running(model: FakeModel | None = None, **options: Any) -> Iterator[Runner]:
    runner = Runner(model or FakeModel(), **{"blocks": 40, **options})
    try:
        yield runner
    finally:
        runner.close()
    assert runner.stats().blocks_used == 0


class TestRunner:
    def test_generate_feeds_as_there_is_room(self) -> None:
        requests = [
            Request(prompt(1 + seed % 40, seed), 1 + seed % 7, GREEDY) for seed in range(40)
        ]
        with running(max_waiting=3, max_running=4) as runner:
            outputs = runner.generate(requests)
            assert [tokens_of(some) for some in outputs] == [reference(one) for one in requests]
            stats = runner.stats()
        assert stats.running == stats.waiting == stats.cancelled == 0
        assert stats.finished == 40
        assert stats.prompt_tokens == sum(len(one.prompt) for one in requests)
        assert stats.generated_tokens == sum(map(len, outputs))
        assert stats.blocks_total == 40

    def test_generate_ends_with_the_first_error(self) -> None:
        with running() as runner:
            with pytest.raises(OctavoError, match="the token 99"):
                runner.generate([Request([1], 200), Request([99], 1)])
            assert runner.drain(LONG)
            assert runner.stats().cancelled == 1

    def test_many_threads_that_cancel(self) -> None:
        def visit(seed: int) -> None:
            chance = random.Random(seed)
            for number in range(6):
                request = Request(
                    prompt(chance.randint(1, 60), seed % 3), 30, Sampling(seed=number)
                )
                caller = Caller()
                ticket = runner.submit(request, caller)
                if chance.random() < 0.5:
                    time.sleep(chance.random() * 0.02)
                    runner.cancel(ticket)
                    seen = list(caller.outputs)
                    assert tokens_of(seen) == reference(request)[: len(seen)]
                    time.sleep(0.005)
                    assert caller.outputs == seen
                else:
                    assert caller.tokens() == reference(request)
                    runner.cancel(ticket)
            ended.append(seed)

        ended: list[int] = []
        with running(blocks=12, max_running=4, max_tokens=32) as runner:
            threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LONG)
            assert sorted(ended) == list(range(6))
            assert runner.drain(LONG)
            stats = runner.stats()
        assert stats.finished + stats.cancelled == 36
        assert stats.blocks_used == 0

    def test_a_full_queue(self) -> None:
        gate = Gate(model := FakeModel())
        with running(model, max_running=1, max_waiting=2) as runner:
            callers = [Caller() for _ in range(3)]
            request = Request([1], 2, GREEDY)
            runner.submit(request, callers[0])
            assert gate.entered.wait(LONG)
            tickets = [runner.submit(request, caller) for caller in callers[1:]]
            with pytest.raises(QueueFullError, match="2 requests are waiting"):
                runner.submit(request, Caller())
            assert runner.stats()[:2] == (1, 2)
            runner.cancel(tickets[0])
            gate.opened.set()
            assert callers[0].tokens() == callers[2].tokens() == reference(request)
            assert not callers[1].outputs

    def test_drain(self) -> None:
        gate = Gate(model := FakeModel())
        with running(model) as runner:
            runner.submit(Request([1], 5, GREEDY), caller := Caller())
            assert not runner.drain(0.01)
            with pytest.raises(DrainingError, match="shutting down"):
                runner.submit(Request([1], 5, GREEDY), Caller())
            with pytest.raises(DrainingError):
                runner.generate([Request([1], 5, GREEDY)])
            gate.opened.set()
            assert runner.drain(None)
            assert caller.ended.is_set()
            assert not model.closed

    def test_close_ends_what_is_on_its_way(self) -> None:
        gate = Gate(model := FakeModel())
        runner = Runner(model, blocks=40, max_running=1)
        callers = [Caller(), Caller()]
        tickets = [runner.submit(Request([1], 200, GREEDY), caller) for caller in callers]
        assert gate.entered.wait(LONG)
        closing = threading.Thread(target=runner.close)
        closing.start()
        gate.opened.set()
        closing.join(LONG)
        assert model.closed
        for caller, ticket in zip(callers, tickets, strict=True):
            assert "shut down" in str(caller.error())
            runner.cancel(ticket)
        runner.close()
        with pytest.raises(DrainingError):
            runner.submit(Request([1], 1), Caller())
        assert runner.drain(0)

    def test_a_caller_that_raises_ends_its_own_request(self) -> None:
        calls = []

        def fail(output: Output | Exception) -> None:
            calls.append(output)
            raise ValueError("the caller's own")

        request = Request(prompt(5), 20, GREEDY)
        with running() as runner:
            runner.submit(request, fail)
            runner.submit(request, caller := Caller())
            assert caller.tokens() == reference(request)
            assert runner.drain(LONG)
            assert len(calls) == 1
            assert runner.stats().cancelled == 1

    def test_a_caller_may_cancel_and_submit(self) -> None:
        request = Request(prompt(5), 20, GREEDY)
        second = Caller()
        tickets: list[Ticket] = []
        calls = []

        def once(output: Output | Exception) -> None:
            calls.append(output)
            runner.cancel(tickets[0])
            runner.submit(request, second)

        with running() as runner, runner._changed:
            tickets.append(runner.submit(request, once))
            runner._changed.wait_for(second.ended.is_set, LONG)
            assert second.tokens() == reference(request)
            assert len(calls) == 1

    def test_a_model_that_fails(self) -> None:
        failures = iter([RuntimeError("out of memory")])

        def fail(_: Batch) -> None:
            for failure in failures:
                raise failure

        model = FakeModel()
        model.before = fail
        request = Request(prompt(5), 3, GREEDY)
        with running(model) as runner:
            with pytest.raises(RuntimeError, match="out of memory"):
                runner.generate([request])
            assert tokens_of(runner.generate([request])[0]) == reference(request)

    def test_nobody_waits_for_a_thread_that_died(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        with running() as runner:

            def fail() -> None:
                raise AssertionError("a mistake of ours")

            monkeypatch.setattr(runner._scheduler, "step", fail)
            runner.submit(Request([1], 1), caller := Caller())
            assert "a mistake of ours" in str(caller.error())
            with pytest.raises(DrainingError, match="a mistake of ours"):
                runner.submit(Request([1], 1), Caller())
            assert isinstance(runner.failure, AssertionError)
            assert runner.drain(LONG)
