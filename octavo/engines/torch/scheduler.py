"""Which tokens are computed next: continuous batching, with prompts in chunks.

Each step is one batch: a token of every sequence that generates and, with what is left of the batch, prompts in order
of arrival, so that a long one holds up nobody. Whoever came first is served first: what runs has arrived before what
waits. When the cache is full, the sequence that arrived last goes back to the head of the line without its blocks, and
its tokens so far are computed again later.
"""

from __future__ import annotations

from array import array
from collections import deque

import torch

from octavo.engines.torch.batch import BLOCK, Batch, Model
from octavo.engines.torch.blocks import ROOT, Blocks
from octavo.engines.torch.request import Finish, Output, Request
from octavo.engines.torch.sampling import Choices, sample
from octavo.errors import OctavoError


class SequenceState:
    """A request on its way.

    Attributes:
        request: what is asked.
        choices: how its tokens are chosen.
        tokens: prompt and output so far.
        table: its cache blocks in order, int64.
        computed: how many of its tokens are in the cache.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.choices = Choices(request.sampling, request.prompt)
        self.tokens = list(request.prompt)
        self.table = array("q")
        self.computed = 0

    @property
    def left(self) -> int:
        """How many tokens are to be computed before the next one is known."""
        return len(self.tokens) - self.computed


# Some of a sequence's next tokens: those of one batch.
_Chunk = tuple[SequenceState, int]


class Scheduler:
    """Sequences, the cache they share, and the model.

    One thread calls everything but :meth:`add`, which another may call during a step.

    Attributes:
        waiting: sequences without blocks, in order of arrival.
        running: those with blocks, likewise.
        blocks: of the cache.
        prompt_tokens: of the sequences that have come to generate.
        prefix_hit_tokens: found in the cache instead of computed.
        generated_tokens: chosen.
        preemptions: sequences that went back to the line.
        finished: sequences that ended, but for those cancelled.
        cancelled: those.
        steps: batches computed.
    """

    def __init__(
        self, model: Model, *, blocks: int, max_running: int = 64, max_tokens: int = 512
    ) -> None:
        """
        Args:
            model: computes the batches.
            blocks: of the cache to make.
            max_running: sequences that have blocks, at most.
            max_tokens: tokens of a batch, at most.

        Raises:
            OctavoError: A batch has no room for all that run.
        """
        if not 1 <= max_running <= max_tokens:
            raise OctavoError(
                f"{max_running} sequences are to run at a time in batches of {max_tokens} tokens; "
                "expected at least one sequence, and a token for each. Change one of the two."
            )
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.blocks = Blocks(blocks)
        self.prompt_tokens = self.prefix_hit_tokens = self.generated_tokens = 0
        self.preemptions = self.finished = self.cancelled = self.steps = 0
        self._model = model
        self._cache = model.new_cache(blocks)
        self._max_running = max_running
        self._max_tokens = max_tokens

    @property
    def busy(self) -> bool:
        """Whether there is a step to make."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> SequenceState:
        """Put a request into the line.

        Raises:
            OctavoError: It can never be served.
        """
        self._check(request)
        sequence = SequenceState(request)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: SequenceState) -> None:
        """End a sequence and free its blocks; nothing if it has ended."""
        if sequence in self.running:
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            return
        self.cancelled += 1

    @torch.inference_mode()
    def step(self) -> list[tuple[SequenceState, Output | Exception]]:
        """Compute one batch.

        Returns:
            The new tokens; or what went wrong, for a sequence that it ended: what the model raises ends all
            of the batch.
        """
        chunks = self._plan()
        if not chunks:
            return []
        self.steps += 1
        try:
            hidden = self._model.forward(_batch(chunks), self._cache)
            choosing = self._advance(chunks)
            if not choosing:
                return []
            rows = [sequence.choices for sequence in choosing]
            outputs = sample(self._model.logits(hidden), rows)
        except Exception as error:
            for sequence, _ in chunks:
                self._end(sequence)
            return [(sequence, error) for sequence, _ in chunks]
        return [
            (sequence, self._take(sequence, output))
            for sequence, output in zip(choosing, outputs, strict=True)
        ]

    def _plan(self) -> list[_Chunk]:
        """The next batch; its sequences have the blocks for it."""
        self._grow()
        chunks = [(sequence, 1) for sequence in self.running if sequence.left == 1]
        budget = self._max_tokens - len(chunks)
        prompts = [sequence for sequence in self.running if sequence.left > 1]
        for sequence in prompts:
            if not budget:
                break
            # Meanwhile another may have computed what it begins with.
            self._share(sequence, self._known(sequence))
            chunks.append((sequence, min(budget, sequence.left)))
            budget -= chunks[-1][1]
        while budget and self._admit():
            sequence = self.running[-1]
            chunks.append((sequence, min(budget, sequence.left)))
            budget -= chunks[-1][1]
        return chunks

    def _grow(self) -> None:
        """See that all that run have a block for their next token, first those that arrived first."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.computed == len(sequence.table) * BLOCK:
                if not self.blocks.available():
                    self._preempt()
                    continue
                sequence.table.extend(self.blocks.take(1))
            index += 1

    def _preempt(self) -> None:
        sequence = self.running[-1]
        self._release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> bool:
        """Let the first that waits run, with blocks for all of its tokens, if there is room."""
        if not self.waiting or len(self.running) == self._max_running:
            return False
        sequence = self.waiting[0]
        known = self._known(sequence)
        missing = -(-len(sequence.tokens) // BLOCK) - len(known)
        # A block more for each that runs: or else one would soon be preempted.
        if missing + len(self.running) > self.blocks.available(known):
            return False
        self.running.append(self.waiting.popleft())
        self._share(sequence, known)
        sequence.table.extend(self.blocks.take(missing))
        return True

    def _known(self, sequence: SequenceState) -> list[int]:
        """The known blocks that come next in a sequence."""
        start = sequence.computed // BLOCK
        parent = sequence.table[start - 1] if start else ROOT
        return self.blocks.known(sequence.tokens, start, parent)

    def _share(self, sequence: SequenceState, known: list[int]) -> None:
        """Let a sequence go on with known blocks, in the place of those that it has for the same tokens."""
        if not known:
            return
        start = sequence.computed // BLOCK
        end = start + len(known)
        self.blocks.hold(known)
        self.blocks.release(sequence.table[start:end])
        sequence.table[start:end] = array("q", known)
        self.prefix_hit_tokens += end * BLOCK - sequence.computed
        sequence.computed = end * BLOCK

    def _advance(self, chunks: list[_Chunk]) -> list[SequenceState]:
        """Note that a batch is computed.

        Returns:
            The sequences whose next token is to be chosen.
        """
        for sequence, count in chunks:
            full = sequence.computed // BLOCK
            sequence.computed += count
            for index in range(full, sequence.computed // BLOCK):
                parent = sequence.table[index - 1] if index else ROOT
                sequence.table[index] = self.blocks.remember(
                    sequence.table[index], sequence.tokens, index, parent
                )
        return [sequence for sequence, _ in chunks if not sequence.left]

    def _take(self, sequence: SequenceState, output: Output | OctavoError) -> Output | OctavoError:
        """Add a token to its sequence, and end that if it was the last."""
        if isinstance(output, OctavoError):
            self._end(sequence)
            return output
        request, token = sequence.request, output.token
        if len(sequence.tokens) == len(request.prompt):
            self.prompt_tokens += len(request.prompt)
        self.generated_tokens += 1
        sequence.tokens.append(token)
        sequence.choices.add(token)
        finish: Finish | None = None
        if token in request.stop:
            finish = "stop"
        elif len(sequence.tokens) == len(request.prompt) + request.max_tokens:
            finish = "length"
        if finish is None:
            return output
        self._end(sequence)
        return output._replace(finish=finish)

    def _end(self, sequence: SequenceState) -> None:
        self._release(sequence)
        self.finished += 1

    def _release(self, sequence: SequenceState) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.table = array("q")

    def _check(self, request: Request) -> None:
        prompt, new = len(request.prompt), request.max_tokens
        if not prompt or new < 1:
            raise OctavoError(
                f"a request has a prompt of {prompt} tokens and asks for {new} new ones; expected "
                "at least one of each. Send a prompt, and ask for a token."
            )
        vocab = self._model.vocab_size
        if min(request.prompt) < 0 or max(request.prompt) >= vocab:
            wrong = next(token for token in request.prompt if not 0 <= token < vocab)
            raise OctavoError(
                f"a prompt has the token {wrong}; the model knows 0 to {vocab - 1}. Use the "
                "tokenizer of this checkpoint."
            )
        positions, cached = self._model.max_positions, self.blocks.total * BLOCK
        if prompt + new > min(positions, cached):
            raise OctavoError(
                f"a request has a prompt of {prompt} tokens and asks for {new} new ones, together "
                f"{prompt + new}; the model has {positions} positions and the cache room for "
                f"{cached} tokens. Shorten the prompt or ask for fewer tokens"
                f"{'.' if positions <= cached else ', or give the cache more memory.'}"
            )


def _batch(chunks: list[_Chunk]) -> Batch:
    """Each chunk's tokens behind those that its sequence has in the cache."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, wanted = [0], []
    rows: list[array[int]] = []
    for sequence, count in chunks:
        end = sequence.computed + count
        tokens += sequence.tokens[sequence.computed : end]
        positions += range(sequence.computed, end)
        starts.append(len(tokens))
        if count == sequence.left:
            wanted.append(len(tokens) - 1)
        rows.append(sequence.table[: -(-end // BLOCK)])
    most = max(map(len, rows))
    # As bytes: a list of all blocks of long sequences takes a thousand times as long.
    tables = bytearray().join(row.tobytes() + bytes(8 * (most - len(row))) for row in rows)
    return Batch(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(starts),
        torch.frombuffer(tables, dtype=torch.int64).view(len(rows), most),
        torch.tensor(wanted, dtype=torch.int64),
    )
