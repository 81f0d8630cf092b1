"""The embedded engine's decoder: its kernels against float64, its models against `transformers`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import reference
import tiny
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
from octavo.engines.torch import dots, open_model, open_runner
from octavo.engines.torch.batch import BLOCK, Batch
from octavo.engines.torch.decoder import FEW, CpuDecoder, open_decoder
from octavo.engines.torch.step import round_input
from octavo.engines.torch.strips import STRIP, multiply
from octavo.engines.torch.team import Team
from octavo.engines.torch.vectors import E4M3_UNIT
from octavo.engines.torch.weights import AS_IT_IS, BY_GROUP, BY_TOKEN, LINEAR, STATIC
from spoiling import edit_json, edit_tensors


@pytest.fixture
def decoder(checkpoint: Callable[[str, str], Path]) -> Iterator[CpuDecoder]:
    with closing(open_decoder(checkpoint("llama", "fp8"), threads=2)) as opened:
        yield opened


# What inputs are multiplied as, where this machine can.
INPUTS = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not dots.AVAILABLE, reason="no AVX512-BF16 and AVX512-VBMI"),
    ),
]


@pytest.mark.parametrize("inputs", INPUTS)
class TestMultiply:
    @pytest.mark.parametrize("rows", [*range(1, 9), 13, 32])
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
    def test_against_float64(self, rows: int, dtype: torch.dtype, inputs: torch.dtype) -> None:
        columns, generator = 192, torch.Generator().manual_seed(rows)
        stored = (torch.randn(STRIP, columns + 16, generator=generator) * 100).to(dtype)
        x = torch.randn(rows, columns + 16, generator=generator).to(inputs)
        scales = torch.rand(STRIP, generator=generator)
        factors = scales * (E4M3_UNIT if dtype.itemsize == 1 else 1)
        part, sums = torch.empty(2 * STRIP), torch.ones(STRIP, rows + 3)
        multiply(
            stored.data_ptr(),
            stored.stride(0) * dtype.itemsize,
            dtype.itemsize,
            columns,
            factors.data_ptr(),
            4,
            x.data_ptr(),
            x.stride(0) * x.itemsize,
            x.itemsize,
            rows,
            part.data_ptr(),
            sums.data_ptr(),
            sums.stride(0) * 4,
            4,
        )
        product = stored.double()[:, :columns] @ x.double()[:, :columns].T
        expected = 1 + product * scales.double()[:, None]
        torch.testing.assert_close(sums[:, :rows].double(), expected, rtol=1e-4, atol=1e-3)
        assert (sums[:, rows:] == 1).all()

    @pytest.mark.parametrize("column", [5, 13, 31, 40, 63])
    def test_every_code_exactly(self, column: int, inputs: torch.dtype) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        numbers = codes.view(torch.float8_e4m3fn).float()
        finite = numbers.isfinite()
        part = torch.empty(2 * STRIP)
        # Every place has an input of its own.
        x = torch.arange(1, 65, dtype=torch.float32).to(inputs)
        for start in range(0, 256, STRIP):
            # Each code alone in a row of zeros.
            rows = torch.zeros(STRIP, 64, dtype=torch.uint8)
            rows[:, column] = codes[start : start + STRIP]
            scale, sums = torch.tensor([E4M3_UNIT]), torch.zeros(STRIP, 1)
            multiply(
                *(rows.data_ptr(), 64, 1, 64, scale.data_ptr(), 0),
                *(x.data_ptr(), 64 * x.itemsize, x.itemsize, 1),
                *(part.data_ptr(), sums.data_ptr(), 4, 4),
            )
            expected = numbers[start : start + STRIP] * (column + 1)
            wanted = finite[start : start + STRIP]
            assert torch.equal(sums[:, 0][wanted], expected[wanted])


class TestRoundInput:
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)).bfloat16() * 3

    def seen(self, inputs: int, scale: float = 0.0) -> Tensor:
        """What a linear layer computes with."""
        row = np.zeros(1, dtype=LINEAR)
        row["inputs"], row["input_scale"] = inputs, scale
        out = np.zeros(len(self.x), np.float32)
        factor = round_input(row[0], self.x.view(torch.uint16).numpy(), out)
        return torch.from_numpy(out) * float(factor)

    def test_each_way(self) -> None:
        largest = self.x.float().abs().max()
        assert torch.equal(self.seen(AS_IT_IS), self.x.float())
        static = torch.tensor(0.01)
        assert torch.equal(self.seen(STATIC, 0.01), reference.rounded(self.x, static))
        assert torch.equal(self.seen(BY_TOKEN), reference.rounded(self.x, largest / 448))
        assert torch.equal(self.seen(BY_GROUP), reference.rounded_groups(self.x.float()))

    def test_zeros(self) -> None:
        zeros = TestRoundInput()
        zeros.x = torch.zeros(130, dtype=torch.bfloat16)
        for inputs in (AS_IT_IS, BY_TOKEN, BY_GROUP):
            assert torch.equal(zeros.seen(inputs), torch.zeros(130))


class TestTeam:
    def test_waits(self) -> None:
        team, order = Team(3), []
        lock = threading.Lock()

        def share(number: int) -> None:
            for turn in range(200):
                with lock:
                    order.append(turn)
                team.wait()

        team.run(share)
        team.close()
        assert order == sorted(order)

    def test_one_that_fails_does_not_keep_the_others(self) -> None:
        team = Team(2)

        def share(number: int) -> None:
            if number:
                raise ValueError("not this one")
            team.wait()

        with pytest.raises(ValueError, match="not this one"):
            team.run(share)
        team.run(lambda number: team.wait())
        team.close()


class TestDecoder:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("model", MODELS)
    def test_is_as_near_to_the_format_as_transformers(
        self, model: str, scheme: str, checkpoint: Callable[[str, str], Path]
    ) -> None:
        source, path, ids = checkpoint(model, "bf16"), checkpoint(model, scheme), tokens(90)
        expected = exact(source, path, ids)
        limit = 1e-4 + 2 * divergence(expected, by_transformers(path, ids))
        with closing(open_decoder(path, threads=2)) as decoder:
            assert len(ids) > FEW
            for chunk in (len(ids), FEW + 1, 20, 5, 1):
                assert divergence(expected, log_probabilities(decoder, ids, chunk)) < limit

    def test_in_any_blocks(self, decoder: CpuDecoder) -> None:
        ids = tokens(60)
        for chunk in (60, 7):
            usual = log_probabilities(decoder, ids, chunk)
            scattered = log_probabilities(decoder, ids, chunk, table=torch.tensor([9, 2, 31, 4]))
            assert torch.equal(usual, scattered)

    def test_with_any_number_of_threads(self, checkpoint: Callable[[str, str], Path]) -> None:
        found = []
        for threads in (1, 2, 3):
            with closing(open_decoder(checkpoint("llama3", "fp8"), threads)) as decoder:
                found.append(log_probabilities(decoder, tokens(40), 9))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    @pytest.mark.parametrize("counts", [(1, 1, 1), (1, 40, 3, 1, 20), (17, 2), (6, 6, 6)])
    def test_sequences_beside_others(self, counts: tuple[int, ...], decoder: CpuDecoder) -> None:
        """Each at a position of its own, some of them with a past."""
        cache, before = decoder.new_cache(64), [3 * place for place in range(len(counts))]
        sequences = [tokens(b + n, seed=b) for b, n in zip(before, counts, strict=True)]
        tables = torch.arange(4 * len(counts)).view(-1, 4)
        for ids, past, table in zip(sequences, before, tables, strict=True):
            if past:
                decoder.forward(one_sequence(ids[:past], 0, table), cache)
        starts = torch.tensor([0, *np.cumsum(counts)])
        new = zip(sequences, before, strict=True)
        places = zip(before, counts, strict=True)
        batch = Batch(
            torch.cat([ids[past:] for ids, past in new]),
            torch.cat([past + torch.arange(count) for past, count in places]),
            starts,
            tables,
            starts[1:] - 1,
        )
        logits = decoder.logits(decoder.forward(batch, cache)).float()
        for ids, found in zip(sequences, torch.log_softmax(logits, dim=-1), strict=True):
            alone = log_probabilities(decoder, ids, 1)[-1]
            # An input that falls to the next E4M3 number is the most that may happen.
            assert divergence(alone[None], found[None]) < 1e-2

    def test_what_is_cached(self, checkpoint: Callable[[str, str], Path]) -> None:
        path, ids = checkpoint("qwen3", "bf16"), tokens(20)
        known = reference.activations(path, ids[None])
        with closing(open_decoder(path, threads=2)) as decoder:
            cache = decoder.new_cache(2)
            decoder.forward(one_sequence(ids, 0, torch.tensor([1, 0])), cache)
        for kind, stored in (("k", cache.keys), ("v", cache.values)):
            blocks = torch.from_numpy(stored[0][[1, 0]]).view(torch.bfloat16)
            by_head = blocks.transpose(0, 1).flatten(1, 2)[:, : len(ids)]
            expected = known[f"model.layers.0.self_attn.{kind}"][0]
            # One BF16 step: the products before are summed in another order.
            torch.testing.assert_close(by_head.float(), expected.float(), rtol=2**-7, atol=2e-3)

    def test_an_fp8_cache_takes_half_the_memory(
        self, checkpoint: Callable[[str, str], Path]
    ) -> None:
        sizes = {}
        for scheme in ("bf16", "fp8", "fp8-kept"):
            with closing(open_decoder(checkpoint("llama", scheme), threads=1)) as decoder:
                sizes[scheme] = decoder.new_cache(10).nbytes
                assert sizes[scheme] == 10 * BLOCK * decoder.cached_bytes
        assert sizes["bf16"] == sizes["fp8-kept"] == 2 * sizes["fp8"]

    def test_float16_and_float32_become_bfloat16(self, tmp_path: Path) -> None:
        ids = tokens(12)
        for dtype in (torch.float16, torch.float32):
            path = tiny.build("llama", tmp_path / str(dtype), dtype=dtype)
            auto: Any = AutoModelForCausalLM
            with torch.inference_mode():
                model = auto.from_pretrained(path, dtype=torch.bfloat16)
                expected = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
            with closing(open_decoder(path, threads=2)) as decoder:
                assert divergence(expected, log_probabilities(decoder, ids, 12)) < 1e-3


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            (
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                "type 'dynamic'",
            ),
        ],
    )
    def test_what_it_does_not_compute(
        self, changes: dict[str, Any], found: str, tmp_path: Path
    ) -> None:
        path = tiny.build("llama", tmp_path / "model")
        edit_json(path / "config.json", lambda config: config.update(changes))
        with pytest.raises(
            OctavoError, match=rf"config\.json has .*{found}.*--engine transformers"
        ):
            open_model(path)

    def test_narrow_heads(self, tmp_path: Path) -> None:
        path = tiny.build("llama", tmp_path / "model", head_dim=8)
        with pytest.raises(OctavoError, match="heads of 8 channels"):
            open_model(path)

    def test_odd_sizes(self, tmp_path: Path) -> None:
        path = tiny.build("llama", tmp_path / "model", intermediate_size=100)
        with pytest.raises(OctavoError, match="intermediate_size 100"):
            open_model(path)

    def test_a_tensor_that_is_not_there(self, tmp_path: Path) -> None:
        path = tiny.build("llama", tmp_path / "model")
        edit_json(path / "config.json", lambda config: config.update(num_hidden_layers=3))
        with pytest.raises(OctavoError, match="has no tensor"):
            open_model(path)

    def test_a_weight_that_is_not_a_number(
        self, checkpoint: Callable[[str, str], Path], tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(checkpoint("llama", "fp8"), tmp_path / "edition"))
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(path, lambda tensors: tensors[name].view(torch.uint8)[3, 4].fill_(0xFF))
        with pytest.raises(OctavoError, match=rf"{name}' in .* holds NaN"):
            open_model(path)

    def test_a_cache_without_a_block(self, tiny_llama: Path) -> None:
        with pytest.raises(OctavoError, match="holds no block of 16 tokens"):
            open_runner(tiny_llama, kv_cache_memory=100)


class TestEngine:
    """The interface that evaluations use, against the engine on ``transformers``."""

    @pytest.fixture
    def engines(self, checkpoint: Callable[[str, str], Path]) -> Iterator[list[Any]]:
        path = checkpoint("qwen2", "bf16")
        with (
            closing(open_engine("torch", path, "cpu")) as ours,
            closing(open_engine("transformers", path, "cpu")) as theirs,
        ):
            yield [ours, theirs]

    def test_scores(self, engines: list[Any]) -> None:
        sequences = [tokens(count, seed=count) for count in (2, 50, tiny.POSITIONS + 1)]
        for ours, theirs in zip(
            *(engine.score(sequences, [1, 30, 5]) for engine in engines), strict=True
        ):
            assert ours.logprobs.shape == theirs.logprobs.shape
            assert (ours.logprobs - theirs.logprobs).abs().max() < 0.1
            assert (ours.greedy == theirs.greedy).float().mean() > 0.9

    @pytest.mark.parametrize("prefix", [0, 5, 16, 37])
    def test_choices(self, prefix: int, engines: list[Any]) -> None:
        suffixes = [tokens(count, seed=count) for count in (1, 20, 3, 40)]
        ours, theirs = (engine.choose(tokens(prefix), suffixes, [3, 200, 7]) for engine in engines)
        assert (ours - theirs).abs().max() < 0.1

    def test_no_suffixes(self, engines: list[Any]) -> None:
        assert engines[0].choose(tokens(20), [], [3]).shape == (0, 1)

    def test_continuations(self, engines: list[Any]) -> None:
        prompts = [tokens(count, seed=count) for count in (1, 30, 9)]
        first, again = (engines[0].generate(prompts, max_tokens=20) for _ in range(2))
        assert first == again
        assert [len(one) for one in first] == [20, 20, 20]
        stop = first[1][7]
        ended = engines[0].generate(prompts, max_tokens=20, stop=[stop])
        assert ended[1] == first[1][: first[1].index(stop)]
        drawn = [engines[0].generate(prompts, max_tokens=9, temperature=1.0) for _ in range(2)]
        assert drawn[0] == drawn[1] != [one[:9] for one in first]
