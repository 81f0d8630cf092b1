"""Streamed statistics against the whole model run by transformers, and the fused kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import tiny
from octavo import kernels
from octavo.calibration import (
    Calibration,
    CalibrationStream,
    HiddenShape,
    batch_sizes,
    load_tokens,
)
from octavo.calibration.tokens import _pieces
from octavo.checkpoint import Checkpoint
from octavo.decoder import Decoder
from octavo.fused import fused_kernels, tensor_amax
from reference import whole

CPU = torch.device("cpu")


def streamed(
    model: Path, tokens: Tensor, *, batch: int = 1024, together: int = 1
) -> dict[str, float]:
    """Octavo's statistics of every layer, ``together`` layers to a pass."""
    checkpoint = Checkpoint(model)
    decoder = Decoder(checkpoint, CPU)
    found: dict[str, float] = {}
    batches = batch_sizes(len(tokens), tokens.shape[1], batch)
    shape = HiddenShape(batches, tokens.shape[1], decoder.config.hidden_size, decoder.dtype)
    with (
        TemporaryDirectory() as scratch,
        CalibrationStream(decoder, shape, Path(scratch), Path(scratch)) as stream,
    ):
        stream.embed(tokens)
        layers = list(range(len(decoder.layers)))
        passes = [layers[start : start + together] for start in range(0, len(layers), together)]
        for number, indices in enumerate(passes):
            for index in indices:
                names = decoder.tensor_names(index)
                decoder.load(index, {name: checkpoint.read(name) for name in names})
            watched = [[name] for index in indices for name in decoder.linears(index)]
            maxima = stream.run(number, indices, watched, last=number + 1 == len(passes))
            found |= {name: value.item() for name, value in maxima.items()}
            for index in indices:
                decoder.unload(index)
    checkpoint.close()
    return found


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in tiny.KINDS},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama with llama3 rotary scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama with gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral with a sliding window": ("mistral", {"sliding_window": 8}),
    "qwen2 with mixed windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "options"), VARIANTS.values(), ids=VARIANTS)
def test_streamed_statistics_are_those_of_the_whole_model(
    kind: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny.build(kind, tmp_path / "model", layers=3, dtype=dtype, shards=3, **options)
    tokens = torch.randint(tiny.VOCAB_SIZE, (5, 40), generator=torch.Generator().manual_seed(1))
    ours, theirs = streamed(model, tokens), whole(model, tokens)
    assert ours.keys() == theirs.keys()
    # Up to the rounding of one matrix product that ran with other block sizes.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=tolerance), name


def test_neither_batches_nor_passes_change_anything(tmp_path: Path) -> None:
    model = tiny.build("llama", tmp_path / "model", layers=3, dtype=torch.float32)
    tokens = torch.randint(tiny.VOCAB_SIZE, (7, 16), generator=torch.Generator().manual_seed(1))
    at_once = streamed(model, tokens)
    assert streamed(model, tokens, batch=32) == pytest.approx(at_once, rel=1e-5)
    # The same products of the same numbers: equal to the last bit.
    assert streamed(model, tokens, together=2) == at_once


@pytest.mark.parametrize(
    ("samples", "seq_len", "tokens"), [(1, 7, 100), (5, 7, 14), (128, 512, 1024)]
)
def test_batches_are_equal_and_take_all_samples(samples: int, seq_len: int, tokens: int) -> None:
    batches = batch_sizes(samples, seq_len, tokens)
    assert sum(batches) == samples
    assert max(batches) - min(batches) <= 1
    assert max(batches) * seq_len <= max(tokens, seq_len)


bf16_arrays = st.integers(0, 2**32 - 1)


def random_bf16(seed: int, *shape: int, scale: float = 4.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def ulps(ours: Tensor, theirs: Tensor) -> int:
    """Largest distance in units in the last place of BF16, signs and zeros taken into account."""

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)

    return int((ordered(ours) - ordered(theirs)).abs().max())


@settings(max_examples=40)
@given(seed=bf16_arrays, rows=st.integers(1, 9), width=st.integers(1, 130))
def test_rms_norm_rounds_like_transformers(seed: int, rows: int, width: int) -> None:
    norm: Any = LlamaRMSNorm
    module = norm(width, eps=1e-5).bfloat16()
    module.weight.data = random_bf16(seed + 1, width, scale=1.0)
    x = random_bf16(seed, rows, width)
    ours, amax = kernels.rms_norm(x, module.weight.data, 1e-5)
    with torch.inference_mode():
        assert ulps(ours, module(x)) <= 1
    assert amax == ours.abs().max().float()


@settings(max_examples=40)
@given(seed=bf16_arrays, size=st.integers(1, 500), scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]))
def test_silu_mul_rounds_like_torch(seed: int, size: int, scale: float) -> None:
    gate, up = random_bf16(seed, size, scale=scale), random_bf16(seed + 1, size)
    expected = silu(gate) * up
    amax = kernels.silu_mul_(gate, up)
    assert ulps(gate, expected) <= 1
    assert amax == gate.abs().max().float()


@settings(max_examples=40)
@given(seed=bf16_arrays, heads=st.integers(1, 4), tokens=st.integers(1, 9))
def test_rotary_equals_transformers(seed: int, heads: int, tokens: int) -> None:
    x = random_bf16(seed, 2, tokens, heads, 16).transpose(1, 2)
    angles = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed))
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    amax = kernels.rotary_(x, cos[0], sin[0])
    assert torch.equal(x, expected)
    assert amax == expected.abs().max().float()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_kernels_pass_on_what_is_not_finite(poison: float) -> None:
    x = random_bf16(0, 1, 4, 2, 16)
    x[0, 1, 1, 3] = poison
    ones = torch.ones(4, 16, dtype=torch.bfloat16)
    assert not kernels.rms_norm(x, ones[0], 1e-5)[1].isfinite()
    assert not kernels.silu_mul_(x.clone(), torch.ones_like(x)).isfinite()
    assert not kernels.rotary_(x.transpose(1, 2), ones, ones).isfinite()


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    called: list[str] = []
    for name in ("rms_norm", "silu_mul_", "rotary_"):
        original: Callable[..., Any] = getattr(kernels, name)

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            called.append(name)
            return original(*args)

        monkeypatch.setattr(kernels, name, spy)
    yield called


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_fused_kernels_stand_in_only_inside_the_context(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tiny.build(kind, tmp_path / "model"))
    decoder = Decoder(checkpoint, CPU)
    layer = decoder.load(0, {name: checkpoint.read(name) for name in decoder.tensor_names(0)})
    (hidden,) = decoder.embed([torch.arange(12).reshape(1, 12)])
    kwargs = decoder.call_arguments(12)
    with torch.inference_mode(), spied(monkeypatch) as called:
        plain = layer(hidden, **kwargs[0])
        assert called == []
        with fused_kernels(layer):
            fused = layer(hidden, **kwargs[0])
        assert set(called) == {"rms_norm", "silu_mul_", "rotary_"}
        called.clear()
        again = layer(hidden, **kwargs[0])
        assert called == []
    torch.testing.assert_close(fused, plain, rtol=2e-2, atol=2e-2)
    assert torch.equal(again, plain)


def test_tensor_amax_is_measured_once() -> None:
    tensor = random_bf16(0, 10)
    first = tensor_amax(tensor)
    tensor.zero_()
    assert tensor_amax(tensor) is first


class TestTokens:
    """Which tokens a source gives."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return tiny.save_tokenizer(tmp_path)

    def load(self, model: Path, **options: Any) -> Tensor:
        return load_tokens(
            Calibration(**options), model, vocab_size=tiny.VOCAB_SIZE, max_positions=64
        )

    def test_builtin_text_needs_nothing(self, model: Path) -> None:
        tokens = self.load(model, samples=4, seq_len=32)
        assert tokens.shape == (4, 32)
        assert tokens.dtype == torch.int64

    def test_same_seed_same_samples_other_seed_others(self, model: Path) -> None:
        one, same, other = (self.load(model, samples=4, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_sequences_are_no_longer_than_the_model_allows(self, model: Path) -> None:
        assert self.load(model, samples=1).shape == (1, 64)

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
    def test_files_hold_the_text_in_order(self, suffix: str, model: Path, tmp_path: Path) -> None:
        texts = [f"document {number} speaks" for number in range(20)]
        path = tmp_path / f"notes{suffix}"
        if suffix == ".txt":
            path.write_text("".join(texts))
        elif suffix == ".jsonl":
            path.write_text("".join(f'{{"body": "{text}"}}\n' for text in texts))
        else:
            from datasets import Dataset

            Dataset.from_dict({"body": texts}).to_parquet(str(path))
        tokens = self.load(
            model, source=str(path), text_field="body", samples=1000, seq_len=8, seed=3
        )
        # The tokenizer makes one token of each byte, so windows are pieces of the joined text.
        joined = "".join(texts).encode()
        assert len(tokens) == len(joined) // 8
        letters = {byte: id for id, byte in enumerate(sorted(_byte_level_alphabet()))}
        expected = [letters[char] for char in _byte_level(joined)]
        assert tokens.flatten().tolist() == expected[: tokens.numel()]

    @given(text=st.text(alphabet="ab \n", max_size=300))
    def test_long_documents_are_cut_between_words(self, text: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("octavo.calibration.tokens.LONGEST", 20)
            pieces = list(_pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 20
        for before, after in pairwise(pieces):
            # Nothing else was there to cut at.
            assert after[0] in " \n" or not set(" \n") & set(before[1:])
            assert "\n\n" not in before[1:] or after[:2] == "\n\n"

    def test_token_ids_are_used_as_they_are(self, model: Path, tmp_path: Path) -> None:
        path = tiny.save_ids(tmp_path / "ids.npy", samples=6, seq_len=20)
        ids = np.load(path)
        assert self.load(model, source=str(path)).tolist() == ids.tolist()
        part = self.load(model, source=str(path), samples=2, seq_len=5)
        assert part.shape == (2, 5)
        assert all(row in ids[:, :5].tolist() for row in part.tolist())


def _byte_level_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet())


def _byte_level(data: bytes) -> str:
    # Printable ASCII stands for itself in the byte-level alphabet, a space for Ġ.
    return data.decode().replace(" ", "Ġ")
