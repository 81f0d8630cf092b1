"""The decoder of the GPU path, here on a CPU: against `transformers`, and against the CPU decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_engine, random_models
from decoders import (
    MODELS,
    SCHEMES,
    by_transformers,
    divergence,
    exact,
    log_probabilities,
    one_sequence,
    tokens,
)
from octavo import OctavoError
from octavo.engines import open_engine
from octavo.engines.torch import open_model
from octavo.engines.torch.batch import BLOCK, Batch
from octavo.engines.torch.decoder import open_decoder as open_cpu_decoder
from octavo.engines.torch.engine import TorchEngine
from octavo.engines.torch.gpu.decoder import GpuDecoder, open_decoder
from octavo.engines.torch.gpu.steps import MOST, filled, size_for
from octavo.shapes import shape_called

CPU = torch.device("cpu")

Checkpoints = Callable[[str, str], Path]

# Each family and each scheme; the CPU decoder's tests make all of both.
PAIRS = sorted({(model, "fp8") for model in MODELS} | {("llama3", scheme) for scheme in SCHEMES})


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoints) -> GpuDecoder:
    return open_decoder(checkpoint("llama", "fp8"), CPU)


class TestDecoder:
    @pytest.mark.parametrize(("model", "scheme"), PAIRS)
    def test_is_as_near_to_the_format_as_transformers(
        self, model: str, scheme: str, checkpoint: Checkpoints
    ) -> None:
        source, path, ids = checkpoint(model, "bf16"), checkpoint(model, scheme), tokens(60)
        expected = exact(source, path, ids)
        limit = 1e-4 + 2 * divergence(expected, by_transformers(path, ids))
        decoder = open_decoder(path, CPU)
        for chunk in (len(ids), 20, 1):
            assert divergence(expected, log_probabilities(decoder, ids, chunk)) < limit

    @pytest.mark.parametrize("counts", [(1, 1, 1), (1, 40, 3, 1, 20), (17, 2), (6, 6, 6)])
    def test_sequences_beside_others(
        self, counts: tuple[int, ...], decoder: GpuDecoder, checkpoint: Checkpoints
    ) -> None:
        """Each at a position of its own, some of them with a past; the same batch on the CPU decoder."""
        with closing(open_cpu_decoder(checkpoint("llama", "fp8"), threads=1)) as other:
            found, expected = (beside_others(one, counts) for one in (decoder, other))
        # An input that falls to the next E4M3 number is the most that may happen.
        assert divergence(expected, found) < 1e-2

    def test_in_any_blocks(self, decoder: GpuDecoder) -> None:
        ids = tokens(60)
        for chunk in (60, 7, 1):
            usual = log_probabilities(decoder, ids, chunk)
            scattered = log_probabilities(decoder, ids, chunk, table=torch.tensor([9, 2, 31, 4]))
            assert torch.equal(usual, scattered)

    def test_shared_blocks(self, decoder: GpuDecoder) -> None:
        ids, cache = tokens(2 * BLOCK + 2), decoder.new_cache(4)
        decoder.forward(one_sequence(ids[: 2 * BLOCK], 0, torch.tensor([2, 0])), cache)
        tables = torch.tensor([[2, 0, 1], [2, 0, 3]])
        places = torch.full((2,), 2 * BLOCK)
        batch = Batch(ids[-2:], places, torch.arange(3), tables, torch.arange(2))
        found = torch.log_softmax(decoder.logits(decoder.forward(batch, cache)).float(), dim=-1)
        for row in range(2):
            alone = torch.cat([ids[: 2 * BLOCK], ids[-2:][row : row + 1]])
            expected = log_probabilities(decoder, alone, 2 * BLOCK)[-1]
            assert divergence(expected[None], found[row : row + 1]) < 1e-3

    def test_what_blocks_held_before_does_not_matter(self, decoder: GpuDecoder) -> None:
        ids, spoiled = tokens(20), decoder.new_cache(2)
        for stored in (spoiled.keys, spoiled.values):
            stored.view(torch.uint8).fill_(0x7F)
        for first, count in ((0, 18), (18, 1), (19, 1)):
            batch = one_sequence(ids[first : first + count], first, torch.tensor([1, 0]))
            hidden = decoder.forward(batch, spoiled)
        assert hidden.isfinite().all()

    def test_an_fp8_cache_takes_half_the_memory(self, checkpoint: Checkpoints) -> None:
        sizes = {}
        for scheme in ("bf16", "fp8", "fp8-kept"):
            decoder = open_decoder(checkpoint("llama", scheme), CPU)
            sizes[scheme] = decoder.new_cache(10).nbytes
            # And a block for rows that only fill a batch.
            assert sizes[scheme] == 11 * BLOCK * decoder.cached_bytes
        assert sizes["bf16"] == sizes["fp8-kept"] == 2 * sizes["fp8"]


class TestSteps:
    def test_sizes(self) -> None:
        sizes = [size_for(count) for count in (1, 2, 3, 8, 9, 31, 32, 33, 64, 250, MOST)]
        assert sizes == [1, 2, 4, 8, 16, 32, 32, 64, 64, 256, MOST]

    def test_rows_that_fill_a_batch_touch_no_block(self, decoder: GpuDecoder) -> None:
        cache, ids = decoder.new_cache(3), tokens(3)
        tables = torch.arange(3).unsqueeze(1)
        batch = Batch(ids, torch.zeros(3, dtype=torch.int64), torch.arange(4), tables, ids[:0])
        assert len(filled(batch, size_for(3), cache.blocks).tokens) == 4
        assert decoder.forward(batch, cache).shape == (0, 64)
        codes = cache.keys.view(torch.uint8)
        assert codes[:, :, :, 1:].max() == 0
        assert (codes[:, :, :, 0].amax(dim=(0, 2, 3)) > 0).all()

    def test_filled_up_or_not(self, decoder: GpuDecoder) -> None:
        ids = tokens(5)
        found = []
        for rows in (1, 5):
            batch = Batch(
                ids[:rows],
                torch.zeros(rows, dtype=torch.int64),
                torch.arange(rows + 1),
                torch.arange(rows).unsqueeze(1),
                torch.arange(rows),
            )
            found.append(decoder.forward(batch, decoder.new_cache(5))[0].float())
        torch.testing.assert_close(found[0], found[1], rtol=0.1, atol=0.1)


class TestEngine:
    def test_scores_and_choices(self, checkpoint: Checkpoints) -> None:
        path = checkpoint("qwen2", "bf16")
        ours, suffixes = TorchEngine(open_decoder(path, CPU)), [tokens(n) for n in (1, 20, 3)]
        with closing(open_engine("transformers", path, "cpu")) as theirs:
            ids = [tokens(50)]
            for one, other in zip(ours.score(ids), theirs.score(ids), strict=True):
                assert (one.logprobs - other.logprobs).abs().max() < 0.1
            found, expected = (
                engine.choose(tokens(37), suffixes, [3, 200, 7]) for engine in (ours, theirs)
            )
            assert (found - expected).abs().max() < 0.1

    def test_continuations(self, decoder: GpuDecoder, checkpoint: Checkpoints) -> None:
        """As likely, token for token, as those of the CPU decoder: scored by that one."""
        prompts = [tokens(count, seed=count) for count in (1, 30, 9)]
        texts = TorchEngine(decoder).generate(prompts, max_tokens=12)
        with closing(open_engine("torch", checkpoint("llama", "fp8"), "cpu")) as judge:
            whole = [
                torch.cat([prompt, torch.tensor(text)])
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            starts = [len(prompt) for prompt in prompts]
            for scores in judge.score(whole, starts):
                assert scores.greedy.float().mean() > 0.7

    def test_no_gpu(self, checkpoint: Checkpoints) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(OctavoError, match=r"0 CUDA devices.*--device cpu"):
            open_model(checkpoint("llama", "bf16"), "cuda")


class TestBenchmark:
    """What ``benchmarks/gpu_engine.py`` does on a GPU, on a tiny model."""

    CONFIG: ClassVar = {
        **shape_called("llama-3.1-8b"),
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    }

    @pytest.mark.parametrize("quantized", [False, True])
    def test_measures(self, quantized: bool) -> None:
        network = random_models.random_network(self.CONFIG, CPU, quantized=quantized)
        assert (network.cache_dtype == torch.bfloat16) is not quantized
        point = gpu_engine.measure(GpuDecoder(network), gpu_engine.Load(3, 20, 4), rounds=2)
        assert len(point["all_tokens_s"]) == 2
        assert 0 < point["decode_step_seconds"] < 3 * 4 / point["tokens_s"]
        per_layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
        expected = 2 * per_layer * (1 if quantized else 2) + 256 * 64 * 2
        assert gpu_engine.step_bytes(network) == expected

    def test_moved_to_another_device(self) -> None:
        network = random_models.random_network(self.CONFIG, CPU, quantized=False)
        moved = gpu_engine.moved(network, torch.device("meta"))
        assert {one.device.type for one in moved.layers[0].gate_up.weights} == {"meta"}


def beside_others(decoder: Any, counts: tuple[int, ...]) -> Tensor:
    """Log-probabilities of the next token of sequences with so many new tokens, ``[sequences, vocab]``."""
    cache, before = decoder.new_cache(64), [3 * place for place in range(len(counts))]
    sequences = [tokens(b + n, seed=b) for b, n in zip(before, counts, strict=True)]
    tables = torch.arange(4 * len(counts)).view(-1, 4)
    for ids, past, table in zip(sequences, before, tables, strict=True):
        if past:
            decoder.forward(one_sequence(ids[:past], 0, table), cache)
    starts = torch.tensor([0, *counts]).cumsum(0)
    batch = Batch(
        torch.cat([ids[past:] for ids, past in zip(sequences, before, strict=True)]),
        torch.cat([past + torch.arange(n) for past, n in zip(before, counts, strict=True)]),
        starts,
        tables,
        starts[1:] - 1,
    )
    logits = decoder.logits(decoder.forward(batch, cache))
    return torch.log_softmax(logits.float(), dim=-1)
