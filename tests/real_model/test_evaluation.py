"""SmolLM2-135M-Instruct on WikiText-2 and MMLU, against what other tools found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness_tasks import check_equal_to_hf, save_tasks
from octavo.engines import Engine, open_engine
from octavo.evaluation import PerplexityResult, evaluate, load_subjects
from octavo.evaluation.mmlu import PromptEncoder
from octavo.tokenizer import load_tokenizer

pytestmark = pytest.mark.real_model


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def engine(sample: Path) -> Iterator[Engine]:
    with closing(open_engine("transformers", sample)) as opened:
        yield opened


def test_perplexity_is_that_of_transformers(sample: Path, data: Path) -> None:
    """Which gave 19.283 with windows of 2048 tokens; vLLM gave 19.278 with 2047."""
    text = data / "wikitext-2" / "wiki.test.raw"
    result = evaluate(sample, task="perplexity", data=text, limit=8)
    assert isinstance(result, PerplexityResult)
    assert result.tokens == 8 * 2047
    assert result.perplexity == pytest.approx(19.283, abs=0.02)


def test_a_shared_prefix_gives_the_answers_of_full_prompts(
    engine: Engine, sample: Path, data: Path
) -> None:
    """The same products in other shapes round otherwise in BF16: log-probabilities of some -2 move by up
    to 0.3 here. This small model is close to guessing, so a few answers hang on less than that."""
    noise = 0.35
    encoder = PromptEncoder(load_tokenizer(sample), engine.max_positions)
    subjects = load_subjects(
        data / "mmlu", shots=5, limit=12, only=["anatomy", "professional_accounting"]
    )
    disagreements = 0
    for subject in subjects:
        for batch in encoder.batches(subject):
            assert len(batch.prefix) > 200
            shared = engine.choose(batch.prefix, batch.suffixes, encoder.choices)
            # The log-probability of a letter as one more token of the prompt, one at a time.
            alone = torch.tensor(
                [
                    [
                        score.logprobs.item()
                        for score in engine.score(
                            [[*batch.prefix, *suffix, choice] for choice in encoder.choices],
                            [len(batch.prefix) + len(suffix)] * len(encoder.choices),
                        )
                    ]
                    for suffix in batch.suffixes[:4]
                ]
            )
            assert (shared[:4] - alone).abs().max() < noise
            prompts = [batch.prefix + suffix for suffix in batch.suffixes]
            whole = engine.choose([], prompts, encoder.choices)
            assert (shared - whole).abs().max() < noise
            best, second = whole.topk(2).values.T
            differs = shared.argmax(dim=-1) != whole.argmax(dim=-1)
            assert not (differs & (best - second > 2 * noise)).any()
            disagreements += int(differs.sum())
    assert disagreements <= 2


def test_a_shared_prefix_is_as_near_to_float32_as_full_prompts(
    engine: Engine, sample: Path, data: Path
) -> None:
    """What the two differ by is BF16 rounding: neither is farther from the truth than the other."""
    auto: Any = AutoModelForCausalLM
    exact = auto.from_pretrained(sample, dtype=torch.float32).eval()
    encoder = PromptEncoder(load_tokenizer(sample), engine.max_positions)
    (subject,) = load_subjects(data / "mmlu", shots=5, limit=12, only=["anatomy"])
    for batch in encoder.batches(subject):
        prompts = [batch.prefix + suffix for suffix in batch.suffixes]
        shared = engine.choose(batch.prefix, batch.suffixes, encoder.choices)
        whole = engine.choose([], prompts, encoder.choices)
        with torch.inference_mode():
            truth = torch.cat(
                [exact(torch.tensor([ids]), logits_to_keep=1).logits[:, -1] for ids in prompts]
            ).log_softmax(-1)[:, encoder.choices]
        assert (shared - truth).abs().mean() < 1.5 * (whole - truth).abs().mean()
        assert (shared - truth).abs().max() < 0.2


@pytest.mark.lm_eval
def test_lm_eval_tasks_equal_its_own_model(sample: Path, tmp_path: Path) -> None:
    """In float32: in BF16, texts side by side round otherwise than one at a time."""
    pytest.importorskip("lm_eval")
    model = tmp_path / "float32"
    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(sample, dtype=torch.float32).save_pretrained(model)
    for path in sample.glob("tokenizer*"):
        shutil.copy(path, model)
    texts = [
        "The capital of France is Paris, and the capital of Italy is",
        "One, two, three, four,",
        "A large sheet of paper that is folded into eight leaves is called",
        "Water boils at one hundred degrees Celsius at sea level.",
    ]
    check_equal_to_hf(model, save_tasks(tmp_path / "tasks", texts))
