"""SmolLM2-135M-Instruct on WikiText-2 and MMLU, against what other tools found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

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
    with closing(open_engine("torch", sample)) as opened:
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
    """Other shapes of the same products round otherwise, so a close call may go the other way."""
    encoder = PromptEncoder(load_tokenizer(sample), engine.max_positions)
    subjects = load_subjects(
        data / "mmlu", shots=5, limit=10, only=["anatomy", "professional_accounting"]
    )
    disagreements = 0
    for subject in subjects:
        for batch in encoder.batches(subject):
            assert len(batch.prefix) > 200
            shared = engine.choose(batch.prefix, batch.suffixes, encoder.choices)
            prompts = [batch.prefix + suffix for suffix in batch.suffixes]
            # The whole vocabulary after each prompt, as the score of one more token: the choice.
            separate = torch.tensor(
                [
                    [
                        next(engine.score([[*prompt, choice]], [len(prompt)])).logprobs.item()
                        for choice in encoder.choices
                    ]
                    for prompt in prompts[:2]
                ]
            )
            assert (shared[:2] - separate).abs().max() < 0.25
            alone = engine.choose([], prompts, encoder.choices)
            assert (shared - alone).abs().max() < 0.25
            close = alone.topk(2).values.diff().abs().squeeze(1) < 0.25
            differs = shared.argmax(dim=-1) != alone.argmax(dim=-1)
            assert not (differs & ~close).any()
            disagreements += int(differs.sum())
    assert disagreements <= 2


@pytest.mark.lm_eval
def test_lm_eval_tasks_equal_its_own_model(sample: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    texts = [
        "The capital of France is Paris, and the capital of Italy is",
        "One, two, three, four,",
        "A large sheet of paper that is folded into eight leaves is called",
        "Water boils at one hundred degrees Celsius at sea level.",
    ]
    check_equal_to_hf(sample, save_tasks(tmp_path / "tasks", texts), "bfloat16")
