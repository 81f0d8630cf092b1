"""Perplexity, KL, MMLU and lm-eval tasks on tiny random models, against plain computations."""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from octavo.engines import TokenIds, TokenScores
from octavo.errors import OctavoError
from octavo.evaluation import (
    MmluResult,
    PerplexityResult,
    Progress,
    as_json,
    evaluate,
    load_subjects,
    load_tokens,
    perplexity,
)
from octavo.evaluation.divergence import DivergenceResult
from octavo.evaluation.estimate import cluster_mean, proportion
from octavo.evaluation.journal import Journal, fingerprint, open_journal, state_directory
from octavo.evaluation.mmlu import PromptEncoder, prompt
from octavo.evaluation.questions import CATEGORIES, LETTERS, Question, Subject
from octavo.evaluation.windows import Window, cut
from octavo.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, so that a plain computation gives the same numbers; with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("evaluated") / "model"
    return tiny.save_tokenizer(
        tiny.build("llama", directory, dtype=torch.float32, max_position_embeddings=2048)
    )


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a deviation in every weight."""
    directory = tmp_path_factory.mktemp("evaluated") / "other"
    changed = copy.deepcopy(plain(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    changed.save_pretrained(directory)
    return tiny.save_tokenizer(directory)


@functools.cache
def plain(directory: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype="auto")


@torch.inference_mode()
def logprobs(directory: Path, tokens: Tensor) -> Tensor:
    """Log-probabilities after each of ``tokens``, ``[tokens, vocab]``, float64."""
    logits: Tensor = plain(directory)(tokens.unsqueeze(0)).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def ids_of(directory: Path, text: str) -> list[int]:
    tokenizer: Any = load_tokenizer(directory)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def random_tokens(count: int) -> Tensor:
    return torch.randint(tiny.VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(0))


def save_tokens(path: Path, count: int) -> Path:
    np.save(path, random_tokens(count).numpy())
    return path


class TestText:
    TEXT = "One sentence. \n\nAnother, with a ß.\n"

    @pytest.mark.parametrize("suffix", [".txt", ".raw"])
    def test_a_text_file_is_one_text(self, suffix: str, model: Path, tmp_path: Path) -> None:
        path = tmp_path / f"text{suffix}"
        path.write_text(self.TEXT, encoding="utf-8")
        tokens = load_tokens(path, model)
        assert tokens.dtype == torch.int64
        assert tokens.tolist() == ids_of(model, self.TEXT)

    def test_rows_are_joined_with_blank_lines(self, model: Path, tmp_path: Path) -> None:
        rows = ["first", "", "third ß"]
        jsonl, parquet = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
        jsonl.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        Dataset.from_dict({"text": rows}).to_parquet(parquet)
        for path in (jsonl, parquet):
            tokens = load_tokens(path, model)
            assert tokens.tolist() == ids_of(model, "first\n\n\n\nthird ß")

    def test_ids_of_any_shape(self, tiny_llama: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "ids.npy", np.arange(24, dtype=np.uint16).reshape(2, 3, 4))
        assert load_tokens(tmp_path / "ids.npy", tiny_llama).tolist() == list(range(24))

    REFUSED: ClassVar[dict[str, tuple[str, Callable[[Path], object], str]]] = {
        "absent": ("data.txt", lambda path: None, r"data\.txt does not exist"),
        "empty": ("data.txt", Path.touch, r"data\.txt holds no tokens"),
        "blank": ("data.raw", lambda path: path.write_text(" \n"), r"data\.raw holds no tokens"),
        "not UTF-8": ("data.txt", lambda path: path.write_bytes(b"\xff"), r"is not UTF-8"),
        "no text": ("a.jsonl", lambda path: path.write_text("{}"), r"a\.jsonl, line 1 has no text"),
        "unknown": ("data.csv", Path.touch, r"Unknown evaluation data .*wikitext2.*\.parquet"),
        "no ids": ("a.npy", lambda path: np.save(path, np.ones(0, int)), r"a\.npy holds no tokens"),
        "floats": ("a.npy", lambda path: np.save(path, np.ones(3)), r"float64 of shape \[3\]"),
        "ids absent": ("a.npy", lambda path: None, r"a\.npy does not exist"),
    }

    @pytest.mark.parametrize(("name", "make", "message"), REFUSED.values(), ids=REFUSED)
    def test_refused(
        self, name: str, make: Callable[[Path], object], message: str, model: Path, tmp_path: Path
    ) -> None:
        make(tmp_path / name)
        with pytest.raises(OctavoError, match=message):
            load_tokens(tmp_path / name, model)

    def test_the_hub_out_of_reach(self, model: Path) -> None:
        with pytest.raises(
            OctavoError, match=r"Salesforce/wikitext cannot be reached.*--data FILE"
        ):
            load_tokens("wikitext2", model)

    def test_no_tokenizer(self, tiny_llama: Path, tmp_path: Path) -> None:
        (tmp_path / "data.txt").write_text("text")
        with pytest.raises(OctavoError, match="no usable tokenizer"):
            load_tokens(tmp_path / "data.txt", tiny_llama)


class TestWindows:
    def cut(self, tokens: int, seq_len: int, stride: int | None = None, **options: Any) -> Any:
        return cut(tokens, seq_len, stride, **{"limit": None, "max_positions": 64, **options})

    def test_without_overlap(self) -> None:
        assert self.cut(11, 4) == [Window(0, 4, 1), Window(4, 8, 1)]
        assert self.cut(11, 4, 4) == self.cut(11, 4)

    def test_every_token_is_scored_once(self) -> None:
        for stride in range(1, 8):
            windows = self.cut(30, 8, stride)
            scored = [
                position
                for window in windows
                for position in range(window.begin + window.start, window.end)
            ]
            assert scored == list(range(1, windows[-1].end))
            assert sum(window.scored for window in windows) == len(scored)
            assert 30 - windows[-1].end < stride

    def test_limit(self) -> None:
        assert self.cut(30, 8, 2, limit=2) == [Window(0, 8, 1), Window(2, 10, 6)]

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((7, 8), {}, r"holds 7 tokens, fewer than one window of 8.*--seq-len 7"),
            ((100, 65), {}, r"--seq-len 65 is longer than the model's 64 positions"),
            ((100, 1), {}, r"--seq-len 1 leaves no token to predict"),
            ((100, 8, 9), {}, r"--stride 9 is not between 1 and --seq-len 8"),
            ((100, 8, 0), {}, r"--stride 0"),
            ((100, 8), {"limit": 0}, r"--limit 0"),
        ],
    )
    def test_refused(self, arguments: Any, options: Any, message: str) -> None:
        with pytest.raises(OctavoError, match=message):
            self.cut(*arguments, **options)


class TestEstimates:
    def test_clusters_of_one_size(self) -> None:
        """Then it is the mean of the clusters' means and its ordinary standard error."""
        values = np.random.default_rng(0).normal(size=(20, 50))
        found = cluster_mean(values.sum(axis=1).tolist(), [50] * 20)
        means = values.mean(axis=1)
        assert found.mean == pytest.approx(means.mean())
        assert found.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(20))

    def test_by_hand(self) -> None:
        found = cluster_mean([2.0, 9.0], [1, 3])
        # Mean 11/4; deviations 2 - 11/4 = -3/4 and 9 - 33/4 = 3/4; squares 9/8, times 2, root 3/2, over 4.
        assert found == (2.75, 0.375)

    def test_one_cluster(self) -> None:
        assert cluster_mean([6.0], [3]) == (2.0, None)
        assert proportion(1, 1) == (1.0, None)

    def test_proportion(self) -> None:
        hits = np.array([1] * 7 + [0] * 5)
        assert proportion(7, 12).standard_error == pytest.approx(hits.std(ddof=1) / math.sqrt(12))


class TestPerplexity:
    @pytest.mark.parametrize("stride", [None, 5])
    def test_float32(self, stride: int | None, model: Path, tmp_path: Path) -> None:
        tokens = random_tokens(100)
        data = save_tokens(tmp_path / "ids.npy", 100)
        result = evaluate(model, task="perplexity", data=data, seq_len=16, stride=stride, limit=5)
        assert isinstance(result, PerplexityResult)
        step, sums, counts = stride or 16, [], []
        for begin in range(0, 5 * step, step):
            window = tokens[begin : begin + 16]
            nll = -logprobs(model, window[:-1]).gather(1, window[1:, None])[:, 0]
            sums.append(nll[-step:].sum().item() if stride and begin else nll.sum().item())
            counts.append(step if stride and begin else 15)
        mean = sum(sums) / sum(counts)
        assert result.nll == pytest.approx(mean, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
        assert result.tokens == sum(counts)
        assert result[5:8] == (5, 16, step)
        assert result.tokens_per_second > 0
        if not stride:
            means = np.array(sums) / 15
            error = means.std(ddof=1) / math.sqrt(5)
            assert result.nll_standard_error == pytest.approx(error, rel=1e-4)
            assert result.standard_error == pytest.approx(math.exp(mean) * error, rel=1e-4)

    def test_one_window_gives_no_error(self, model: Path, tmp_path: Path) -> None:
        data = save_tokens(tmp_path / "ids.npy", 20)
        result: Any = evaluate(model, task="perplexity", data=data, seq_len=16)
        assert result.standard_error is result.nll_standard_error is None

    def test_ids_out_of_the_vocabulary(self, model: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "ids.npy", np.array([1, 256, 3, 4]))
        with pytest.raises(OctavoError, match=r"range from 1 to 256, expected 0 to 255"):
            evaluate(model, task="perplexity", data=tmp_path / "ids.npy", seq_len=4)

    def test_a_model_that_overflows(self) -> None:
        with pytest.raises(OctavoError, match=r"window that starts at token 8"):
            perplexity(FakeEngine(broken_at=8), torch.arange(24), seq_len=8)


class FakeEngine:
    """Finds every token equally likely, but in the window that begins with ``broken_at``."""

    name = "fake"
    vocab_size = 256
    max_positions = 64

    def __init__(self, broken_at: int) -> None:
        self.broken_at = broken_at
        self.scored: list[int] = []

    def score(self, sequences: Any, starts: Any = ()) -> Iterator[TokenScores]:
        for sequence, start in zip(sequences, starts, strict=True):
            self.scored.append(int(sequence[0]))
            broken = self.broken_at == int(sequence[0])
            logprobs = torch.full((len(sequence) - start,), math.nan if broken else -1.0)
            yield TokenScores(logprobs, logprobs > 0)

    def choose(
        self, prefix: TokenIds, suffixes: Sequence[TokenIds], choices: Sequence[int]
    ) -> Tensor:
        raise NotImplementedError

    def generate(self, prompts: Any, **_: Any) -> list[list[int]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


class TestDivergence:
    def test_float32(self, model: Path, other: Path, tmp_path: Path) -> None:
        tokens = random_tokens(100)
        data = save_tokens(tmp_path / "ids.npy", 100)
        result = evaluate(other, task="kl", reference=model, data=data, seq_len=16)
        assert isinstance(result, DivergenceResult)
        kl, agree, nll = [], [], []
        for begin in range(0, 96, 16):
            window = tokens[begin : begin + 16]
            p, q = (logprobs(one, window[:-1]) for one in (model, other))
            kl.append((p.exp() * (p - q)).sum(-1).numpy())
            agree.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
            nll.append([-one.gather(1, window[1:, None]).mean().item() for one in (q, p)])
        values, means = np.concatenate(kl), np.array([one.mean() for one in kl])
        assert 0.01 < result.kl < 5
        assert result.kl == pytest.approx(values.mean(), rel=1e-4)
        assert result.kl_standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(6), rel=1e-3)
        assert result.top1_agreement == pytest.approx(np.mean(agree))
        # One per cent of 90 tokens is one token.
        assert result.worst_mean == pytest.approx(values.max(), rel=1e-4)
        assert result.worst_threshold == pytest.approx(values.max(), rel=1e-4)
        ours, theirs = np.array(nll).T
        assert result.perplexity == pytest.approx(math.exp(ours.mean()), rel=1e-5)
        assert result.reference_perplexity == pytest.approx(math.exp(theirs.mean()), rel=1e-5)
        ratio = math.exp((ours - theirs).mean())
        assert result.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
        assert result.ratio_standard_error == pytest.approx(
            ratio * (ours - theirs).std(ddof=1) / math.sqrt(6), rel=1e-3
        )
        edges, counts = result.histogram
        assert counts == np.histogram(values, edges)[0].tolist()
        assert sum(counts) == result.tokens == 90

    def test_a_model_and_itself(self, tiny_llama: Path, tmp_path: Path) -> None:
        data = save_tokens(tmp_path / "ids.npy", 300)
        result: Any = evaluate(tiny_llama, task="kl", reference=tiny_llama, data=data, seq_len=128)
        assert result.kl == result.worst_mean == 0
        assert result.top1_agreement == result.perplexity_ratio == 1
        assert result.histogram.counts[0] == result.tokens

    def test_different_vocabularies(self, model: Path, tmp_path: Path) -> None:
        smaller = tiny.build("llama", tmp_path / "smaller", vocab_size=200)
        data = save_tokens(tmp_path / "ids.npy", 100)
        with pytest.raises(OctavoError, match=r"has 200 tokens, the reference's 256"):
            evaluate(smaller, task="kl", reference=model, data=data, seq_len=16)


QUESTIONS = {
    "abstract_algebra": [Question(f"What is {one} + 1?", ("1", "2", "3", "4"), "ABCD"[one % 4]) for one in range(9)],
    "virology": [Question("Which, if any?\nSay.", ('a "b"', "c, d", "e", "ß"), "C")] * 7,
}  # fmt: skip


def save_questions(directory: Path) -> Path:
    for split in ("dev", "test"):
        (directory / split).mkdir(parents=True)
        for subject, questions in QUESTIONS.items():
            with (directory / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([q.text, *q.choices, q.answer] for q in questions)
    return directory


class TestQuestions:
    def test_read(self, tmp_path: Path) -> None:
        algebra, virology = load_subjects(save_questions(tmp_path / "mmlu"), shots=5, limit=8)
        assert algebra == Subject(
            "abstract_algebra", QUESTIONS["abstract_algebra"][:5], QUESTIONS["abstract_algebra"][:8]
        )
        assert virology == Subject("virology", QUESTIONS["virology"][:5], QUESTIONS["virology"])
        assert (algebra.category, virology.category) == ("STEM", "other")

    def test_without_shots_no_dev_file_is_needed(self, tmp_path: Path) -> None:
        shutil.rmtree(save_questions(tmp_path / "mmlu") / "dev")
        (subject,) = load_subjects(tmp_path / "mmlu", shots=0, only=["virology"])
        assert not subject.shots
        assert len(subject.questions) == 7

    def test_the_table_of_categories(self) -> None:
        members = [subject for category in CATEGORIES.values() for subject in category]
        assert len(members) == len(set(members)) == 57
        assert Subject("my_own", [], []).category == "other"

    MALFORMED: ClassVar[dict[str, tuple[str, str]]] = {
        "too few fields": ("a,b\n", "line 3 has 2 fields, expected 6"),
        "too many fields": ("q,1,2,3,4,A,B\n", "line 3 has 7 fields, expected 6"),
        "a letter too far": ("q,1,2,3,4,E\n", "line 3 gives the answer 'E', expected A, B, C or D"),
        "an open quote": ('q,1,2,"3,4,A\n', "line 3 is not CSV"),
        "after a row of two lines": ('"q\nq",1,2,3,4,A\nx\n', "line 5 has 1 fields"),
    }

    @pytest.mark.parametrize(("rows", "message"), MALFORMED.values(), ids=MALFORMED)
    @pytest.mark.parametrize("split", ["dev", "test"])
    def test_malformed(self, split: str, rows: str, message: str, tmp_path: Path) -> None:
        path = save_questions(tmp_path / "mmlu") / split / f"abstract_algebra_{split}.csv"
        path.write_text("q,1,2,3,4,A\n\n" + rows)
        with pytest.raises(OctavoError, match=f"abstract_algebra_{split}.csv, {message}"):
            load_subjects(tmp_path / "mmlu", shots=1)

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = save_questions(tmp_path / "mmlu") / "test" / "virology_test.csv"
        path.write_bytes(b"\xff,1,2,3,4,A\n")
        with pytest.raises(OctavoError, match=r"virology_test.csv, line 1 is not CSV"):
            load_subjects(tmp_path / "mmlu", shots=1)

    REFUSED: ClassVar[dict[str, tuple[str | None, dict[str, Any], str]]] = {
        "no such subject": (None, {"only": ["law"]}, r"has no subject law.*virology"),
        "too many shots": (None, {"shots": 8}, r"virology_dev.csv holds 7 questions.*asks for 8"),
        "shots below zero": (None, {"shots": -1}, r"--shots -1"),
        "limit zero": (None, {"limit": 0}, r"--limit 0"),
        "no dev file": ("dev/virology_dev.csv", {}, r"virology_dev.csv does not exist"),
        "no test files": ("test", {}, r"has no file test/SUBJECT_test.csv"),
    }  # fmt: skip

    @pytest.mark.parametrize(("removed", "options", "message"), REFUSED.values(), ids=REFUSED)
    def test_refused(
        self, removed: str | None, options: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        directory = save_questions(tmp_path / "mmlu")
        if removed is not None:
            path = directory / removed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(OctavoError, match=message):
            load_subjects(directory, **{"shots": 5, **options})

    def test_an_empty_file(self, tmp_path: Path) -> None:
        (save_questions(tmp_path / "mmlu") / "test" / "virology_test.csv").write_text("\n")
        with pytest.raises(OctavoError, match=r"virology_test.csv holds no questions"):
            load_subjects(tmp_path / "mmlu", shots=5)


class TestMmlu:
    def test_the_prompt_is_the_original_s(self) -> None:
        question = Question("What?", ("one", "two", "three", "four"), "B")
        assert prompt("high_school_physics", [question], question) == (
            "The following are multiple choice questions (with answers) about  high school physics."
            "\n\nWhat?\nA. one\nB. two\nC. three\nD. four\nAnswer: B"
            "\n\nWhat?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
        )

    def test_float32(self, model: Path, tmp_path: Path) -> None:
        """Against each full prompt by itself, its next byte after the space."""
        data = save_questions(tmp_path / "mmlu")
        result = evaluate(model, task="mmlu", data=data, shots=3)
        assert isinstance(result, MmluResult)
        tokenizer: Any = load_tokenizer(model)
        letters = [tokenizer(letter)["input_ids"][0] for letter in LETTERS]
        right = {}
        for subject in load_subjects(data, shots=3):
            expected = ""
            for question in subject.questions:
                text = prompt(subject.name, subject.shots, question) + " "
                ids = torch.tensor(tokenizer(text)["input_ids"])
                expected += LETTERS[int(logprobs(model, ids)[-1, letters].argmax())]
            assert result.answers[subject.name] == expected
            right[subject.name] = sum(
                one == question.answer
                for one, question in zip(expected, subject.questions, strict=True)
            )
        correct = sum(right.values())
        assert result.overall.accuracy == correct / 16
        assert result.overall[2:] == (correct, 16)
        assert result.subjects["virology"].correct == right["virology"]
        assert result.categories.keys() == {"STEM", "other"}
        assert result.categories["STEM"] == result.subjects["abstract_algebra"]
        assert result.shots == 3
        assert json.loads(json.dumps(as_json(result)))["overall"]["questions"] == 16

    def test_fewer_shots_where_they_do_not_fit(self, model: Path, tmp_path: Path) -> None:
        long = Question("x" * 400, ("1", "2", "3", "4"), "A")
        short = Question("y", ("1", "2", "3", "4"), "A")
        endless = Question("z" * 1000, ("1", "2", "3", "4"), "A")
        subject = Subject("virology", [short] * 5, [short, long, endless, short])
        batches = list(PromptEncoder(load_tokenizer(model), 600).batches(subject))
        assert [batch.indices for batch in batches] == [[0, 3], [1], [2]]
        for batch in batches:
            for index, suffix in zip(batch.indices, batch.suffixes, strict=True):
                assert len(suffix) >= 1
                question = subject.questions[index]
                # As many shots as fit, and no more would.
                prompts = [
                    ids_of(model, prompt("virology", [short] * shots, question) + " ")
                    for shots in range(6)
                ]
                fitting = [ids for ids in prompts if len(ids) <= 600] or [prompts[0][-600:]]
                assert batch.prefix + suffix == fitting[-1]

    def test_letters_that_are_one_token(self, model: Path) -> None:
        tokenizer: Any = load_tokenizer(model)
        with pytest.raises(OctavoError, match="does not tell the answers A, B, C and D apart"):
            PromptEncoder(lambda texts, verbose: tokenizer([one[:-1] for one in texts]), 100)  # type: ignore[arg-type]


class TestJournal:
    def test_known_results_are_not_computed_again(self) -> None:
        asked: list[int] = []

        def compute(missing: list[int]) -> Iterator[int]:
            for index in missing:
                asked.append(index)
                yield index * 10

        journal = Journal(results={"b": 7})
        assert list(journal.run(["a", "b", "c", "a"], compute)) == [0, 7, 20, 0]
        assert asked == [0, 2]

    def test_a_stopped_run_is_taken_up(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "journal.jsonl"
        tokens = torch.arange(40)
        broken, whole = FakeEngine(broken_at=16), FakeEngine(broken_at=-1)
        with pytest.raises(OctavoError), open_journal(path, resume=False) as journal:
            perplexity(broken, tokens, seq_len=8, journal=journal)
        # Killed in the middle of a line.
        with path.open("a") as file:
            file.write('{"key": "16", "val')
        steps: list[Progress] = []
        with open_journal(path, resume=True) as journal:
            result = perplexity(whole, tokens, seq_len=8, journal=journal, on_progress=steps.append)
        assert whole.scored == [16, 24, 32]
        assert result.perplexity == pytest.approx(math.e)
        assert result[1:3] == (0, 1)
        assert steps == [Progress(done, 35, "tokens") for done in (7, 14, 21, 28, 35)]
        assert not path.exists()

    def test_without_resume_it_starts_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        path.write_text('{"key": "0", "value": 1e9}\n')
        engine = FakeEngine(broken_at=-1)
        with open_journal(path, resume=False) as journal:
            perplexity(engine, torch.arange(16), seq_len=8, journal=journal)
        assert engine.scored == [0, 8]

    @pytest.mark.parametrize("line", [b"\xff\n", b"[1]\n", b"{}\n", b"5\n", b'{"key": "0"}\n'])
    def test_other_lines_are_passed_over(self, line: bytes, tmp_path: Path) -> None:
        path = tmp_path / "journal.jsonl"
        path.write_bytes(line + b'{"key": "a", "value": 3}\n')
        with open_journal(path, resume=True) as journal:
            assert list(journal.run(["a"], lambda _: iter([]))) == [3]

    def test_a_directory_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (
            pytest.raises(OctavoError, match=r"cannot be written: .*XDG_CACHE_HOME"),
            open_journal(tmp_path / "file" / "journal.jsonl", resume=False),
        ):
            pass

    def test_the_fingerprint_knows_what_results_depend_on(
        self, model: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(model, tmp_path / "copy"))

        def name(options: dict[str, Any] | None = None, data: bytes = b"x") -> str:
            return fingerprint(options or {"seq_len": 8}, data, [copy])

        names = [name(), name({"seq_len": 9}), name(data=b"y")]
        names.append(fingerprint({"seq_len": 8}, b"x", [model]))
        (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
        names.append(name())
        with (copy / "model.safetensors").open("ab") as file:
            file.write(b" ")
        names.append(name())
        assert len(set(names)) == len(names)
        assert name() == names[-1]

    def test_evaluate_resumes(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped by the user after the second window, then resumed with another limit."""
        data = save_tokens(tmp_path / "ids.npy", 100)
        whole: Any = evaluate(model, task="perplexity", data=data, seq_len=16)
        seen: list[Progress] = []

        def stop(step: Progress) -> None:
            seen.append(step)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, task="perplexity", data=data, seq_len=16, limit=3, on_progress=stop)
        (kept,) = state_directory().iterdir()
        lines = kept.read_text().splitlines()
        assert [json.loads(line)["key"] for line in lines] == ["0", "16"]
        # So that it shows whether they are used.
        kept.write_text("".join(line.replace(": 8", ": 9") + "\n" for line in lines))
        resumed: Any = evaluate(model, task="perplexity", data=data, seq_len=16, resume=True)
        values = [json.loads(line)["value"] for line in lines]
        changed = [json.loads(line.replace(": 8", ": 9"))["value"] for line in lines]
        assert resumed.nll * 90 == pytest.approx(whole.nll * 90 - sum(values) + sum(changed))
        assert list(state_directory().iterdir()) == []

    @pytest.mark.parametrize("task", ["kl", "mmlu"])
    def test_the_other_tasks_resume(
        self, task: str, model: Path, other: Path, tmp_path: Path
    ) -> None:
        every: dict[str, dict[str, Any]] = {
            "kl": {"reference": model, "data": save_tokens(tmp_path / "a.npy", 64), "seq_len": 16},
            "mmlu": {"data": save_questions(tmp_path / "mmlu")},
        }
        options = every[task]

        def stop(_: Progress) -> None:
            raise KeyboardInterrupt

        whole = as_json(evaluate(other, task=task, **options))
        with pytest.raises(KeyboardInterrupt):
            evaluate(other, task=task, on_progress=stop, **options)
        (kept,) = state_directory().iterdir()
        assert len(kept.read_text().splitlines()) == 1
        resumed = as_json(evaluate(other, task=task, resume=True, **options))
        speed = "questions_per_second" if task == "mmlu" else "tokens_per_second"
        assert resumed.pop(speed) > 0
        whole.pop(speed)
        assert resumed == whole


class TestEvaluate:
    REFUSED: ClassVar[dict[str, tuple[dict[str, Any], str]]] = {
        "unknown task": ({"task": "bleu"}, r"Unknown task 'bleu'.*perplexity, kl, mmlu, or lm-eval"),
        "lm-eval without a task": ({"task": "lm-eval:"}, r"Unknown task 'lm-eval:'"),
        "a task with arguments": ({"task": "mmlu:anatomy"}, r"Unknown task"),
        "no data": ({"task": "perplexity"}, r"--data FILE or wikitext2"),
        "no questions": ({"task": "mmlu"}, r"--data DIR"),
        "no reference": ({"task": "kl", "data": "x.txt"}, r"--reference"),
        "no such model": ({"task": "mmlu", "model": "/no/such"}, r"/no/such is not a directory"),
        "unknown engine": ({"task": "perplexity", "engine": "onnx"}, r"Unknown engine 'onnx'"),
    }  # fmt: skip

    @pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
    def test_refused(
        self, options: dict[str, Any], message: str, model: Path, tmp_path: Path
    ) -> None:
        if "engine" in options:
            options = {**options, "data": save_tokens(tmp_path / "ids.npy", 4096)}
        with pytest.raises(OctavoError, match=message):
            evaluate(
                options.get("model", model), **{k: v for k, v in options.items() if k != "model"}
            )

    def test_kl_on_an_engine_without_distributions(self, model: Path) -> None:
        with pytest.raises(OctavoError, match=r"does not give.*--engine transformers"):
            evaluate(model, task="kl", reference=model, data="x.npy", engine="vllm")


def test_the_harness_absent(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OctavoError, match=r"pip install 'octavo\[eval\]'"):
        evaluate(model, task="lm-eval:hellaswag")
