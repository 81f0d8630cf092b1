"""A model in other axes: what it computes stays, the noise that FP8 brings falls, and it is an ordinary checkpoint."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import report_example
import tiny
from octavo import Calibration, OctavoError, quantize, rotate, verify
from octavo.cli import app
from octavo.reporting.card import model_card
from octavo.reporting.record import RotationRecord, read_record
from octavo.rotation import (
    basis,
    blocks_of,
    learn_rotation,
    learning,
    rewriting,
    surveying,
    value_axes,
)

BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", BIASES),
    "llama, a head of 24": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger steps: tiny models need no more."""
    monkeypatch.setattr(learning, "_STEPS", 12)
    monkeypatch.setattr(learning, "_RATE", 2e-2)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return tiny.save_ids(tmp_path / "ids.npy", samples=8, seq_len=32)


def whole(directory: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


def rotated(model: Path, output: Path, ids: Path, **options: Any) -> Any:
    return rotate(model, output, calibration=Calibration(source=str(ids)), **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("widest", [576, 16])
def test_it_computes_what_it_did(
    name: str, widest: int, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "_WIDEST", widest)
    # Less than the rows of any matrix.
    monkeypatch.setattr(rewriting, "_STRIP", 640)
    kind, options = MODELS[name]
    model = tiny.build(kind, tmp_path / "model", dtype=torch.float32, **options)
    found = rotated(model, tmp_path / "out", ids)
    before, after = whole(model), whole(tmp_path / "out")
    tokens = torch.arange(96).view(2, 48)
    with torch.no_grad():
        expected, given = before(tokens).logits, after(tokens).logits
    assert (given - expected).norm() < 2e-5 * expected.norm()
    # It is not as it was.
    turned = after.model.embed_tokens.weight - before.model.embed_tokens.weight
    assert turned.norm() > 0.1 * before.model.embed_tokens.weight.norm()
    norms = [p for n, p in after.named_parameters() if "layernorm" in n or n == "model.norm.weight"]
    assert len(norms) == 5
    assert all((norm == 1).all() for norm in norms)
    assert found.untied == bool(options.get("tie_word_embeddings"))
    assert found.layers == 2
    assert found.tokens == 256


def test_wide_blocks_and_heads_are_inverted_on_several_threads(
    tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis, "_WIDEST", 192)
    wide = {"hidden_size": 384, "head_dim": 192}
    model = tiny.build("llama", tmp_path / "model", dtype=torch.float32, **wide)
    threads = torch.get_num_threads()
    # Where PyTorch's number of threads was ever set, MKL finds wrong pivots of matrices as large as these in batches.
    torch.set_num_threads(2)
    try:
        rotated(model, tmp_path / "out", ids)
    finally:
        torch.set_num_threads(threads)
    tokens = torch.arange(96).view(2, 48)
    with torch.no_grad():
        expected, given = (whole(one)(tokens).logits for one in (model, tmp_path / "out"))
    assert (given - expected).norm() < 2e-5 * expected.norm()


def test_the_noise_is_what_a_float64_model_says(tmp_path: Path, ids: Path) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.float32)
    found = rotated(model, tmp_path / "out", ids)
    reference = whole(model).double()
    # The rotation, from what became of the embedding.
    embeddings = [one.model.embed_tokens.weight for one in (reference, whole(tmp_path / "out"))]
    q = torch.linalg.lstsq(*(one.detach().double() for one in embeddings)).solution.T
    torch.testing.assert_close(q @ q.T, torch.eye(64, dtype=torch.float64), atol=1e-5, rtol=0)
    shares = []
    for seen, weights in read_by_norms(reference, torch.from_numpy(np.load(ids))):
        ratios = [noise(seen @ q.T, one @ q.T) / noise(seen, one) for one in weights]
        shares.append(sum(ratios) / len(ratios))
    assert found.noise == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert found.noise < 0.95


def read_by_norms(model: Any, tokens: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
    """What each norm gives without its weight, and the weights that read it with the norm's."""
    found = []
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, [getattr(layer.self_attn, f"{n}_proj") for n in "qkv"]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            seen: list[Tensor] = []
            hook = norm.register_forward_hook(
                lambda module, _, output, seen=seen: seen.append(output / module.weight)
            )
            with torch.no_grad():
                model(tokens)
            hook.remove()
            found.append((seen[0].view(-1, 64), [one.weight * norm.weight for one in readers]))
    return found


def noise(inputs: Tensor, weight: Tensor) -> float:
    """Of outputs, where each input or weight errs by a share of itself."""
    return (inputs.square().mean(0) * weight.square().sum(0)).sum().item()


@pytest.mark.parametrize("size", [16, 24, 7])
def test_values_reach_the_least_noise_there_is(size: int) -> None:
    generator = torch.Generator().manual_seed(size)

    def moments() -> Tensor:
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return root @ torch.diag(torch.logspace(0, 1.5, size, dtype=torch.float64)) @ root.T

    def noise_in(axes: Tensor) -> float:
        back = torch.linalg.inv(axes)
        return float(((axes @ c @ axes.T).diagonal() * (back.T @ p @ back).diagonal()).sum())

    c, p = moments(), moments()
    axes = value_axes(c, p)
    # The eigenvalues of C P, which no axes change.
    least = torch.linalg.eigvals(c @ p).real.sqrt().sum().square().item() / size
    # A ridge keeps it a little away.
    assert least * (1 - 1e-9) <= noise_in(axes) < least * 1.01
    assert noise_in(axes) < 0.7 * noise_in(torch.eye(size, dtype=torch.float64))
    for _ in range(5):
        other = torch.randn(size, size, generator=generator, dtype=torch.float64)
        assert noise_in(axes @ (torch.eye(size) + 0.1 * other)) > noise_in(axes)
    assert (axes @ c @ axes.T).trace().item() == pytest.approx(c.trace().item(), rel=1e-3)


def test_values_that_are_not_there_or_not_read_keep_their_axes() -> None:
    zero, one = torch.zeros(8, 8), torch.eye(8)
    for values, outputs in ((zero, one), (one, zero)):
        assert torch.equal(value_axes(values, outputs), torch.eye(8, dtype=torch.float64))


def test_nothing_is_rotated_where_nothing_is_won() -> None:
    alike = torch.eye(8).expand(3, 8, 8)
    found = learn_rotation([(alike, alike / 24)], torch.arange(24))
    assert found.noise == 1
    assert torch.equal(found.rotation.of_rows(torch.ones(2, 24)), torch.ones(2, 24))


@pytest.mark.parametrize(
    ("width", "size"), [(576, 576), (1536, 512), (4096, 512), (16384, 512), (7, 7), (1154, 2)]
)
def test_blocks_divide_the_channels(width: int, size: int) -> None:
    assert blocks_of(width) == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_an_ordinary_checkpoint(dtype: torch.dtype, tmp_path: Path, ids: Path) -> None:
    model = tiny.build("qwen2", tmp_path / "model", dtype=dtype, tie_word_embeddings=True, shards=3)
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    rotated(model, tmp_path / "out", ids)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"temperature": 0.5}'
    quantize(tmp_path / "out", tmp_path / "fp8", calibration=Calibration(source=str(ids)))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["octavo_rotation"]["calibration"]["source"] == ids.name
    record = read_record(tmp_path / "fp8")
    assert record is not None
    assert record.rotation is not None
    assert record.rotation.noise == config["octavo_rotation"]["noise"] < 1
    assert record.rotation.calibration.samples == 8
    assert not config["tie_word_embeddings"]


def test_an_edition_is_compared_with_what_it_was_made_from(
    tiny_llama: Path, tmp_path: Path, ids: Path
) -> None:
    rotated(tiny_llama, tmp_path / "bf16", ids)
    quantize(tmp_path / "bf16", tmp_path / "fp8", calibration=Calibration(source=str(ids)))
    assert verify(tmp_path / "fp8", reference=tmp_path / "bf16").ok
    with pytest.raises(OctavoError, match="in different axes"):
        verify(tmp_path / "fp8", reference=tiny_llama)


def test_the_report_says_so_and_how_to_make_it_again() -> None:
    plain = report_example.results()
    assert plain.record is not None
    assert plain.record.calibration is not None
    rotation = RotationRecord(octavo="0.1.0", calibration=plain.record.calibration, noise=0.75)
    record = plain.record.model_copy(update={"rotation": rotation, "base_model": "smollm2-rotated"})
    card = model_card(plain.model_copy(update={"record": record}))
    assert "octavo rotate smollm2-bf16 \\\n  -o smollm2-rotated \\\n  --calib" in card
    assert "octavo quantize smollm2-rotated" in card
    assert "hidden states rotated" in card
    assert "octavo rotate" not in model_card(plain)


def test_it_comes_out_the_same_twice(tiny_llama: Path, tmp_path: Path, ids: Path) -> None:
    for name in ("one", "two"):
        rotated(tiny_llama, tmp_path / name, ids)
    assert tiny.contents(tmp_path / "one") == tiny.contents(tmp_path / "two")


def test_what_is_not_of_the_model_is_carried_over(tmp_path: Path, ids: Path) -> None:
    model = tiny.build("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name, table = "model.layers.0.self_attn.rotary_emb.inv_freq", torch.arange(8.0)
    save_file({**tensors, name: table}, model / "model.safetensors", {"format": "pt"})
    rotated(model, tmp_path / "out", ids)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], table)


def test_a_channel_that_a_norm_drops_stays_dropped(tmp_path: Path, ids: Path) -> None:
    model = tiny.build("llama", tmp_path / "model", dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][5] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    rotated(model, tmp_path / "out", ids)
    tokens = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        expected, given = whole(model)(tokens).logits, whole(tmp_path / "out")(tokens).logits
    assert (given - expected).norm() < 2e-5 * expected.norm()


class TestRefused:
    """Nothing is left behind."""

    @pytest.fixture
    def refused(self, tmp_path: Path, ids: Path) -> Callable[[Path], str]:
        def run(model: Path) -> str:
            (tmp_path / "here").mkdir()
            with pytest.raises(OctavoError) as caught:
                rotated(model, tmp_path / "here" / "out", ids)
            assert not list((tmp_path / "here").iterdir())
            return str(caught.value)

        return run

    def test_an_edition(
        self, tiny_llama: Path, tmp_path: Path, ids: Path, refused: Callable[[Path], str]
    ) -> None:
        quantize(tiny_llama, tmp_path / "fp8", calibration=Calibration(source=str(ids)))
        assert "already quantized" in refused(tmp_path / "fp8")

    @pytest.mark.parametrize(
        "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
    )
    def test_a_nan(self, name: str, tmp_path: Path, refused: Callable[[Path], str]) -> None:
        model = tiny.build("llama", tmp_path / "model")
        tensors = load_file(model / "model.safetensors")
        tensors[name].view(-1)[3] = torch.nan
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        assert name in refused(model)

    def test_a_layer_that_is_not_known(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[Path], str]
    ) -> None:
        monkeypatch.setattr(surveying, "WRITERS", surveying.WRITERS[:1])
        assert "'model.layers.0.mlp.down_proj.weight'" in refused(tiny_llama)

    @pytest.mark.parametrize("number", [1, 2, 3, 4])
    def test_a_full_disk(
        self,
        number: int,
        tiny_llama: Path,
        monkeypatch: pytest.MonkeyPatch,
        refused: Callable[[Path], str],
    ) -> None:
        """The shard, both files of hidden states, and that of moments."""
        reserve, calls = os.posix_fallocate, itertools.count(1)

        def no_space(*place: int) -> None:
            if next(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            reserve(*place)

        monkeypatch.setattr(os, "posix_fallocate", no_space)
        assert "is full" in refused(tiny_llama)

    def test_an_output_that_exists(self, tiny_llama: Path, tmp_path: Path, ids: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(OctavoError, match="already exists"):
            rotated(tiny_llama, tmp_path / "out", ids)
        rotated(tiny_llama, tmp_path / "out", ids, overwrite=True)
        assert (tmp_path / "out" / "config.json").exists()


class TestCommand:
    def test_it_says_what_it_won_and_what_it_costs(self, tmp_path: Path, ids: Path) -> None:
        model = tiny.build("llama", tmp_path / "model", tie_word_embeddings=True)
        arguments = ["rotate", str(model), "-o", str(tmp_path / "out"), "--calib", str(ids)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "× as much" in result.stdout
        assert "learn" in result.stdout
        assert "lm_head and the embedding were one tensor" in result.stderr
        again = CliRunner().invoke(app, [*arguments, "--overwrite", "--json", "-q"])
        assert json.loads(again.stdout)["noise"] < 1

    def test_a_mistake_exits_with_2(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(
            app, ["rotate", str(tmp_path / "none"), "-o", str(tmp_path / "out")]
        )
        assert result.exit_code == 2
        assert "none is not a directory" in result.stderr
