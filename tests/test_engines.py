"""Engines: token ids in, log-probabilities or tokens out, against `transformers` called plainly."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import closing
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from octavo import Calibration, quantize
from octavo.engines import ENGINES, open_engine
from octavo.engines.transformers import TransformersEngine
from octavo.engines.transformers.batches import packed, padded
from octavo.errors import OctavoError
from octavo.loading import load

# Log-probabilities of a random BF16 model, computed with other shapes of the same products.
BF16_NOISE = 0.05


def tokens(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.VOCAB_SIZE, (count,), generator=generator)


def plain(directory: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype="auto")


@torch.inference_mode()
def reference(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of every next token, ``[tokens, vocab]``."""
    return torch.log_softmax(model(ids.unsqueeze(0)).logits[0].float(), dim=-1)


@pytest.fixture(scope="module", params=tiny.KINDS)
def float32_model(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    directory: Path = tmp_path_factory.mktemp("float32") / request.param
    return tiny.build(request.param, directory, dtype=torch.float32)


@pytest.fixture
def engine(tiny_llama: Path) -> Iterator[TransformersEngine]:
    with closing(open_engine("transformers", tiny_llama, "cpu")) as opened:
        assert isinstance(opened, TransformersEngine)
        yield opened


class TestScore:
    def test_float32(self, float32_model: Path) -> None:
        sequences = [tokens(count, seed=count) for count in (128, 2, 17, 129)]
        model = plain(float32_model)
        with closing(open_engine("transformers", float32_model, "cpu")) as engine:
            scores = list(engine.score(sequences))
        for ids, score in zip(sequences, scores, strict=True):
            expected = reference(model, ids[:-1])
            assert score.logprobs.dtype == torch.float32
            torch.testing.assert_close(
                score.logprobs, expected.gather(1, ids[1:, None])[:, 0], atol=1e-4, rtol=1e-4
            )
            assert torch.equal(score.greedy, expected.argmax(-1) == ids[1:])

    def test_bfloat16(self, engine: TransformersEngine, tiny_llama: Path) -> None:
        ids = tokens(100)
        expected = reference(plain(tiny_llama), ids[:-1]).gather(1, ids[1:, None])[:, 0]
        (score,) = engine.score([ids.tolist()])
        assert (score.logprobs - expected).abs().max() < BF16_NOISE

    def test_from_a_position_on(self, engine: TransformersEngine) -> None:
        ids = tokens(60)
        whole, part, last = engine.score([ids, ids, ids], [1, 50, 59])
        torch.testing.assert_close(part.logprobs, whole.logprobs[49:])
        torch.testing.assert_close(last.logprobs, whole.logprobs[58:])
        assert torch.equal(part.greedy, whole.greedy[49:])

    def test_lazily(self, engine: TransformersEngine) -> None:
        taken = []

        def endless() -> Iterator[Tensor]:
            while True:
                taken.append(1)
                yield tokens(8)

        scores: Any = engine.score(endless())
        next(scores)
        assert len(taken) <= torch.get_num_threads() + 1
        scores.close()

    def test_two_at_a_time_leave_the_library_as_it_was(
        self, engine: TransformersEngine, tiny_llama: Path
    ) -> None:
        from transformers.models.llama import modeling_llama

        original = modeling_llama.apply_rotary_pos_emb
        with closing(open_engine("transformers", tiny_llama, "cpu")) as other:
            first, second = (one.score([tokens(8)] * 3) for one in (engine, other))
            next(first), next(second)
            assert modeling_llama.apply_rotary_pos_emb is not original
            # In the order they began, which is not the order contexts nest in.
            list(first)
            list(second)
        assert modeling_llama.apply_rotary_pos_emb is original
        assert not any("forward" in vars(module) for module in plain(tiny_llama).modules())

    def test_close_gives_the_threads_back(self, tiny_llama: Path) -> None:
        threads = torch.get_num_threads()
        with closing(open_engine("transformers", tiny_llama, "cpu")) as engine:
            list(engine.score([tokens(8)]))
        assert torch.get_num_threads() == threads


class TestChoose:
    CHOICES = (3, 200, 77)

    @pytest.mark.parametrize("prefix", [0, 1, 40])
    def test_float32(self, prefix: int, float32_model: Path) -> None:
        self.check(float32_model, prefix)

    @pytest.mark.parametrize("window", [4, 16, 60])
    @pytest.mark.parametrize("kind", ["mistral", "qwen2"])
    def test_sliding_attention(self, kind: str, window: int, tmp_path: Path) -> None:
        """The window ends inside a suffix, inside the prefix, or for the short ones nowhere."""
        sliding = {"use_sliding_window": True, "max_window_layers": 1} if kind == "qwen2" else {}
        model = tiny.build(
            kind, tmp_path / kind, dtype=torch.float32, sliding_window=window, **sliding
        )
        self.check(model, 40)

    def check(self, directory: Path, count: int) -> None:
        prefix = tokens(count)
        suffixes = [tokens(length, seed=length) for length in (5, 1, 30, 5, 12)]
        model = plain(directory)
        with closing(open_engine("transformers", directory, "cpu")) as engine:
            found = engine.choose(prefix, suffixes, self.CHOICES)
        expected = [
            reference(model, torch.cat([prefix, one]))[-1, list(self.CHOICES)] for one in suffixes
        ]
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)

    def test_an_edition_with_an_fp8_cache(self, tmp_path: Path) -> None:
        """Prefix and suffixes both pass through the cache's scales, which matters on this model."""
        source = tiny.build("llama", tmp_path / "source", dtype=torch.float32)
        calibration = Calibration(source=str(tiny.save_ids(tmp_path / "ids.npy")))
        quantize(source, tmp_path / "edition", calibration=calibration)
        prefix, suffixes = tokens(40), [tokens(length, seed=length) for length in (5, 1, 30)]
        model, _ = load(tmp_path / "edition", "cpu")
        expected = torch.stack([reference(model, torch.cat([prefix, one]))[-1] for one in suffixes])
        engine: Any = open_engine("transformers", tmp_path / "edition", "cpu")
        with closing(engine):
            found = engine.choose(prefix, suffixes, range(tiny.VOCAB_SIZE))
            for module in engine.model.modules():
                if hasattr(module, "v_scale"):
                    # Now most values round to zero.
                    module.v_scale.mul_(4096)
            other = engine.choose(prefix, suffixes, range(tiny.VOCAB_SIZE))
        error, without = ((one - expected).abs().mean() for one in (found, other))
        assert error < 0.01 < 0.03 < without

    def test_the_prefix_is_read_once(
        self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules[TransformersEngine.__module__]._PACKED_TOKENS, "cpu", 20)
        base, read = engine.model.base_model, []
        base.embed_tokens.register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))
        engine.choose(tokens(40), [tokens(10), tokens(10, 1), tokens(9)], self.CHOICES)
        assert sorted(read) == [9, 20, 40]

    def test_no_suffixes(self, engine: TransformersEngine) -> None:
        assert engine.choose(tokens(4), [], self.CHOICES).shape == (0, 3)


class TestGenerate:
    def test_float32_alone_and_in_a_batch(self, float32_model: Path) -> None:
        model = plain(float32_model)
        prompts = [tokens(count, seed=count) for count in (3, 20, 7)]
        expected = []
        for prompt in prompts:
            ids = prompt
            for _ in range(8):
                ids = torch.cat([ids, reference(model, ids)[-1].argmax()[None]])
            expected.append(ids[len(prompt) :].tolist())
        with closing(open_engine("transformers", float32_model, "cpu")) as engine:
            assert engine.generate(prompts, max_tokens=8) == expected
            stop = expected[1][4]
            stopped = engine.generate(prompts, max_tokens=8, stop=[stop])
        assert stopped == [row[: row.index(stop)] if stop in row else row for row in expected]

    def test_the_checkpoint_s_own_advice_is_not_taken(
        self, tiny_llama: Path, engine: TransformersEngine, tmp_path: Path
    ) -> None:
        advised = tiny.build("llama", tmp_path / "advised")
        (advised / "generation_config.json").write_text(
            '{"do_sample": true, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": '
            + f"{list(range(tiny.VOCAB_SIZE))}}}"
        )
        with closing(open_engine("transformers", advised, "cpu")) as other:
            generated = other.generate([tokens(5)], max_tokens=8)
        assert generated == engine.generate([tokens(5)], max_tokens=8)
        assert len(generated[0]) == 8

    def test_drawn_tokens_are_the_same_in_every_run(self, engine: TransformersEngine) -> None:
        drawn = [engine.generate([tokens(5)], max_tokens=16, temperature=1.5) for _ in range(2)]
        assert drawn[0] == drawn[1] != engine.generate([tokens(5)], max_tokens=16)


LENGTHS: list[list[int]] = [[], [1], [5, 1, 30, 5, 12], [9] * 20, [50, 3, 50]]


@pytest.mark.parametrize("lengths", LENGTHS)
class TestBatches:
    def test_padded(self, lengths: list[int]) -> None:
        batches = list(padded(lengths, extra=3, budget=40))
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        longest = [max(lengths[index] for index in batch) for batch in batches]
        assert longest == sorted(longest, reverse=True)
        for batch, most in zip(batches, longest, strict=True):
            assert len(batch) == 1 or len(batch) * (most + 3) <= 40

    def test_packed(self, lengths: list[int]) -> None:
        batches = list(packed(lengths, budget=40))
        assert [index for batch in batches for index in batch] == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or sum(lengths[index] for index in batch) <= 40


def test_an_unknown_engine(tiny_llama: Path) -> None:
    with pytest.raises(OctavoError, match=r"Unknown engine 'onnx'.*transformers, torch, vllm"):
        open_engine("onnx", tiny_llama)


class FakeLlm:
    """What the engine sees of ``vllm.LLM``: every token's log-probability is minus its id."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        config = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 100)
        self.running = True
        core = SimpleNamespace(shutdown=lambda: setattr(self, "running", False))
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=core)

    def generate(self, prompts: list[Any], params: Any, *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        return [self.answer(prompt["prompt_token_ids"], params) for prompt in prompts]

    def answer(self, ids: list[int], params: Any) -> Any:
        assert not params.detokenize
        logprobs = {one: self.logprob(one) for one in getattr(params, "logprob_token_ids", [])}
        made = [(ids[-1] + step) % 100 for step in range(1, params.max_tokens + 1)]
        return SimpleNamespace(
            # The likeliest token, and the prompt's own where it is another.
            prompt_logprobs=[None]
            + [{0: self.logprob(0), one: self.logprob(one)} for one in ids[1:]],
            outputs=[SimpleNamespace(token_ids=made, logprobs=[logprobs])],
        )

    def logprob(self, token: int) -> Any:
        # Its ranks are no use: the likeliest token comes second where another is as likely.
        return SimpleNamespace(logprob=-float(token), rank=token + 2)


class TestVllm:
    @pytest.fixture
    def vllm(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        module: Any = types.ModuleType("vllm")
        module.__spec__ = ModuleSpec("vllm", None)
        module.LLM = FakeLlm
        module.SamplingParams = SimpleNamespace
        monkeypatch.setitem(sys.modules, "vllm", module)
        # What the engine sets is gone after the test.
        monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "INFO"})
        return module

    def test_score(self, vllm: Any, tiny_llama: Path) -> None:
        with closing(open_engine("vllm", tiny_llama)) as engine:
            scores = list(engine.score([torch.tensor([5, 7, 0, 9]), [1, 2]], [2, 1]))
        assert [score.logprobs.tolist() for score in scores] == [[0, -9], [-2]]
        assert [score.greedy.tolist() for score in scores] == [[True, False], [False]]

    def test_choose(self, vllm: Any, tiny_llama: Path) -> None:
        with closing(open_engine("vllm", tiny_llama)) as engine:
            assert engine.choose([1, 2], [[3], [4, 5]], [8, 6]).tolist() == [[-8, -6]] * 2
            assert engine.choose([1, 2], [], [8, 6]).shape == (0, 2)

    def test_generate(self, vllm: Any, tiny_llama: Path) -> None:
        with closing(open_engine("vllm", tiny_llama)) as engine:
            generated = engine.generate([[1, 2], [20]], max_tokens=4, stop=[5])
        assert generated == [[3, 4], [21, 22, 23, 24]]

    def test_what_it_is_told(self, vllm: Any, tiny_llama: Path) -> None:
        engine: Any = open_engine("vllm", tiny_llama)
        assert engine._llm.options["model"] == str(tiny_llama)
        assert engine._llm.options["skip_tokenizer_init"] is True
        assert engine._llm.options["enable_prefix_caching"] is True
        assert (engine.vocab_size, engine.max_positions) == (100, 62)
        # It logs to standard error, and as much as the user wants.
        assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"

    def test_close(self, vllm: Any, tiny_llama: Path) -> None:
        engine: Any = open_engine("vllm", tiny_llama)
        assert engine._llm.running
        engine.close()
        assert not engine._llm.running

    def test_absent(self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(OctavoError, match=r"pip install vllm.*--engine transformers"):
            open_engine("vllm", tiny_llama)

    def test_a_device_of_one_s_own(self, vllm: Any, tiny_llama: Path) -> None:
        with pytest.raises(OctavoError, match=r"--device cpu does not go with the engine vllm"):
            open_engine("vllm", tiny_llama, "cpu")

    def test_a_refusal(self, vllm: Any, tiny_llama: Path) -> None:
        def refuse(**_: Any) -> None:
            raise ValueError("no such\narchitecture")

        vllm.LLM = refuse
        with pytest.raises(OctavoError, match=r"vLLM cannot load .*no such architecture"):
            open_engine("vllm", tiny_llama)

    def test_a_failure(self, vllm: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of\nmemory")

        monkeypatch.setattr(FakeLlm, "generate", fail)
        with (
            closing(open_engine("vllm", tiny_llama)) as engine,
            pytest.raises(
                OctavoError, match=r"vLLM cannot run .*out of memory.*--engine transformers"
            ),
        ):
            engine.generate([[1]], max_tokens=1)


def test_every_engine_is_tested_here() -> None:
    assert set(ENGINES) == {"transformers", "torch", "vllm"}
