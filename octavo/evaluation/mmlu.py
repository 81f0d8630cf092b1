"""MMLU: multiple-choice questions on 57 subjects, a few solved ones shown first.

Hendrycks et al., *Measuring Massive Multitask Language Understanding*, ICLR 2021
(https://arxiv.org/abs/2009.03300); prompts are those of the authors' ``evaluate.py``, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from octavo.engines import Engine
from octavo.errors import OctavoError
from octavo.evaluation.estimate import proportion
from octavo.evaluation.journal import Journal
from octavo.evaluation.progress import OnProgress, Progress, silent
from octavo.evaluation.questions import LETTERS, Question, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Accuracy(NamedTuple):
    """A share of right answers.

    Attributes:
        accuracy: between 0 and 1.
        standard_error: binomial; None for a single question.
        correct: right answers.
        questions: asked.
    """

    accuracy: float
    standard_error: float | None
    correct: int
    questions: int


class MmluResult(NamedTuple):
    """How a model answers.

    Attributes:
        overall: over all questions (micro average).
        categories: by category, those that were asked about.
        subjects: by subject.
        answers: the letters chosen, one string a subject, in the order of its file.
        shots: solved questions shown first, at most.
        questions_per_second: of the subjects answered in this run (not resumed ones).
    """

    overall: Accuracy
    categories: dict[str, Accuracy]
    subjects: dict[str, Accuracy]
    answers: dict[str, str]
    shots: int
    questions_per_second: float


class Batch(NamedTuple):
    """Questions whose prompts begin with the same tokens.

    Attributes:
        indices: of the questions in their subject.
        prefix: token ids that all their prompts begin with.
        suffixes: what follows, at least one token each.
    """

    indices: list[int]
    prefix: list[int]
    suffixes: list[list[int]]


def mmlu(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[Subject],
    *,
    on_progress: OnProgress = silent,
    journal: Journal | None = None,
) -> MmluResult:
    """Answer the questions: the likeliest of the four letters after ``Answer:``.

    What the prompts of a subject have in common, the solved questions, is read once. Where a prompt
    would not fit the model's positions it shows fewer of them.

    Args:
        engine: the model.
        tokenizer: its tokenizer.
        subjects: as :func:`octavo.evaluation.load_subjects` returns them.
        on_progress: called after each subject.
        journal: where subjects' answers are kept.

    Raises:
        OctavoError: the tokenizer does not tell the four letters apart.
    """
    journal = journal or Journal()
    encoder = PromptEncoder(tokenizer, engine.max_positions)
    names = [subject.name for subject in subjects]
    fresh = sum(len(subject.questions) for subject in subjects if subject.name not in journal)
    total = sum(len(subject.questions) for subject in subjects)

    def compute(missing: list[int]) -> Iterator[str]:
        return (_answer(engine, encoder, subjects[index]) for index in missing)

    begin, done, answers = time.perf_counter(), 0, {}
    for subject, letters in zip(subjects, journal.run(names, compute), strict=True):
        answers[subject.name] = letters
        done += len(letters)
        on_progress(Progress(done, total, "questions"))

    categories: dict[str, list[Subject]] = {}
    for subject in subjects:
        categories.setdefault(subject.category, []).append(subject)
    return MmluResult(
        overall=_accuracy(subjects, answers),
        categories={name: _accuracy(members, answers) for name, members in categories.items()},
        subjects={subject.name: _accuracy([subject], answers) for subject in subjects},
        answers=answers,
        shots=max(len(subject.shots) for subject in subjects),
        questions_per_second=fresh / (time.perf_counter() - begin),
    )


class PromptEncoder:
    """Prompts as token ids, cut where the answer's letter would come.

    A tokenizer may merge across any boundary between two texts, so whole prompts are tokenized, each
    with a letter in the place of the answer. The four letters' tokens are where four such prompts begin to
    differ, and what a subject's prompts share is whatever their ids have in common.

    Attributes:
        choices: the token ids of the four letters in that place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> None:
        """
        Args:
            tokenizer: the model's; the special tokens it adds are kept.
            max_positions: tokens in a prompt, at most.

        Raises:
            OctavoError: the tokenizer does not tell the four letters apart.
        """
        self._tokenizer: Any = tokenizer
        self._positions = max_positions
        probe = Question("?", ("1", "2", "3", "4"), "A")
        variants = self._encode([prompt("a", [], probe) + f" {letter}" for letter in LETTERS])
        stem = _shared(variants)
        self.choices = [ids[stem] for ids in variants if len(ids) > stem]
        # From the letter to the end, where a tokenizer may put a special token.
        self._tail = len(variants[0]) - stem
        if len(set(self.choices)) < len(LETTERS):
            raise OctavoError(
                f"The tokenizer does not tell the answers A, B, C and D apart: after 'Answer:' they "
                f"become the tokens {self.choices}. Expected four different ones; is it the model's?"
            )

    def batches(self, subject: Subject) -> Iterator[Batch]:
        """A subject's questions, by how many of its shots fit."""
        waiting = list(range(len(subject.questions)))
        for shots in range(len(subject.shots), -1, -1):
            if not waiting:
                break
            texts = [
                prompt(subject.name, subject.shots[:shots], subject.questions[index]) + " A"
                for index in waiting
            ]
            encoded = [ids[: -self._tail] for ids in self._encode(texts)]
            if not shots:
                # A question that is too long by itself loses its beginning.
                encoded = [ids[-self._positions :] for ids in encoded]
            fits = [len(ids) <= self._positions for ids in encoded]
            prompts = [ids for ids, fit in zip(encoded, fits, strict=True) if fit]
            if prompts:
                indices = [index for index, fit in zip(waiting, fits, strict=True) if fit]
                # At least one token of each prompt is its own.
                shared = min(_shared(prompts), min(len(ids) for ids in prompts) - 1)
                yield Batch(indices, prompts[0][:shared], [ids[shared:] for ids in prompts])
            waiting = [index for index, fit in zip(waiting, fits, strict=True) if not fit]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: what is longer than the model's context is dealt with here.
        ids: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"]
        return ids


def prompt(subject: str, shots: Sequence[Question], question: Question) -> str:
    """The text a model is asked to continue, up to ``Answer:``."""
    # Two spaces before the subject, as the original has.
    title = " ".join(["", *subject.split("_")])
    solved = "".join(f"{_ask(shot)} {shot.answer}\n\n" for shot in shots)
    return (
        f"The following are multiple choice questions (with answers) about {title}.\n\n"
        f"{solved}{_ask(question)}"
    )


def _ask(question: Question) -> str:
    choices = zip(LETTERS, question.choices, strict=True)
    return "\n".join([question.text, *(f"{letter}. {text}" for letter, text in choices), "Answer:"])


def _shared(sequences: list[list[int]]) -> int:
    """How many first tokens all sequences have in common."""
    # In lexicographic order, the first and the last differ wherever any two do.
    first, last = min(sequences), max(sequences)
    same = (one == other for one, other in zip(first, last, strict=False))
    return next(
        (index for index, equal in enumerate(same) if not equal), min(len(first), len(last))
    )


def _answer(engine: Engine, encoder: PromptEncoder, subject: Subject) -> str:
    """The letters chosen, one a question."""
    letters = [""] * len(subject.questions)
    for batch in encoder.batches(subject):
        chosen = engine.choose(batch.prefix, batch.suffixes, encoder.choices).argmax(dim=-1)
        for index, choice in zip(batch.indices, chosen.tolist(), strict=True):
            letters[index] = LETTERS[choice]
    return "".join(letters)


def _accuracy(subjects: Sequence[Subject], answers: dict[str, str]) -> Accuracy:
    right = [
        letter == question.answer
        for subject in subjects
        for letter, question in zip(answers[subject.name], subject.questions, strict=True)
    ]
    share = proportion(sum(right), len(right))
    return Accuracy(share.mean, share.standard_error, sum(right), len(right))
