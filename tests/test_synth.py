"""Random checkpoints in the shape of known models: the shapes, the values, what loads them."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import tiny
from octavo import Calibration, OctavoError, quantize, synth, synthesis
from octavo.cli import app
from octavo.shapes import SHAPES, shape_called
from octavo.skeleton import SUPPORTED
from octavo.synthesis import parameter_counts

# As counted on the hub in the published weights; what is tied once.
PUBLISHED = {
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
}

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 1000,
}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied one with biases, an untied one, and one whose embedding takes several pieces."""
    monkeypatch.setitem(SHAPES, "small-tied", shape_called("qwen2.5-0.5b") | SMALL)
    monkeypatch.setitem(SHAPES, "small-untied", shape_called("llama-3.1-8b") | SMALL)
    monkeypatch.setitem(SHAPES, "medium", shape_called("smollm2-135m") | {"vocab_size": 10_000})


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def octavo(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def read(directory: Path) -> dict[str, Tensor]:
    shards = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def test_full_shapes_have_the_published_parameters() -> None:
    counts = parameter_counts()
    assert {name: counts[name] for name in PUBLISHED} == PUBLISHED
    assert counts.keys() - PUBLISHED.keys() == {"small-tied", "small-untied", "medium"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_cut_has_the_tensors_that_transformers_makes(name: str) -> None:
    config = shape_called(name) | {"num_hidden_layers": 1}
    assert config["model_type"] in SUPPORTED
    found = {key: tuple(t.shape) for key, t in synthesis._layout(config).items()}
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(**config))
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert found == expected


def test_the_table_is_not_the_callers_to_change() -> None:
    shape_called("llama-3.1-8b")["rope_scaling"]["factor"] = 1.0
    assert shape_called("Llama-3.1-8B")["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("like", ["small-tied", "small-untied"])
def test_transformers_loads_and_runs_it(like: str, tmp_path: Path) -> None:
    result = synth(like, tmp_path / "out", layers=2)
    auto: Any = AutoModelForCausalLM
    model, loading = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == result.layers == 2
    logits = model(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 1000)
    assert logits.isfinite().all()
    tensors = read(tmp_path / "out")
    assert ("lm_head.weight" in tensors) == (like == "small-untied")
    assert result.tensors == len(tensors)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.nbytes == 2 * result.parameters


def test_weights_are_normal_and_norms_are_one(tmp_path: Path) -> None:
    synth("medium", tmp_path / "out", layers=1)
    std = 1 / 24
    for name, tensor in read(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        if "norm" in name:
            assert (tensor == 1).all()
            continue
        values = tensor.flatten().float()
        # Four standard errors, and what rounding to BF16 adds to the squares.
        error = 4 / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(0, abs=error * std)
        assert values.std().item() == pytest.approx(std, rel=error + 1e-3)
        for sigmas in (0.5, 1, 2, 3):
            inside = (values.abs() < sigmas * std).float().mean().item()
            assert inside == pytest.approx(math.erf(sigmas / math.sqrt(2)), abs=error / 2 + 2e-3)
        # Neighbours know nothing of each other, within a row or across strips.
        for distance in (1, tensor.shape[-1], synthesis._STRIP, synthesis._PIECE):
            if distance < len(values):
                correlation = (values[distance:] * values[:-distance]).mean().item() / std**2
                assert abs(correlation) < 5 / math.sqrt(len(values) - distance)


def test_biases_are_small_and_random(tmp_path: Path) -> None:
    synth("small-tied", tmp_path / "out", layers=1)
    bias = read(tmp_path / "out")["model.layers.0.self_attn.q_proj.bias"].float()
    assert len(set(bias.tolist())) > len(bias) / 2
    assert 0.01 < bias.std() < 0.03


@pytest.mark.usefixtures("three_threads")
def test_values_depend_on_the_seed_and_the_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "_PIECE", 1000)
    monkeypatch.setattr(synthesis, "_STRIP", 300)
    synth("small-untied", tmp_path / "many", shard_size=50_000)
    synth("small-untied", tmp_path / "other", seed=1)
    torch.set_num_threads(1)
    synth("small-untied", tmp_path / "one", layers=2)
    many, other, one = (read(tmp_path / name) for name in ("many", "other", "one"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert many.keys() > one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    pieces = [
        tuple(tensor.flatten()[start : start + 1000].tolist())
        for tensors in (many, other)
        for name, tensor in tensors.items()
        if "norm" not in name
        for start in range(0, tensor.numel(), 1000)
    ]
    assert len(set(pieces)) == len(pieces)


@pytest.mark.usefixtures("three_threads")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    tracemalloc.start()
    result = synth("smollm2-135m", tmp_path / "out", layers=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.nbytes > 60e6
    assert peak < 20e6


@pytest.mark.parametrize("like", ["small-tied", "small-untied"])
def test_the_tokenizer_makes_a_token_of_each_byte(like: str, tmp_path: Path) -> None:
    synth(like, tmp_path / "out", layers=1)
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(tmp_path / "out")
    text = "  A line,\n\tand 多字节 with émoji 🦙.\r\n" + "".join(map(chr, range(1, 256)))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_config_is_the_published_one_but_for_layers_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_called("llama-2-70b") | SMALL
    assert shape["torch_dtype"] == "float16"
    monkeypatch.setitem(SHAPES, "half", shape)
    synth("half", tmp_path / "out", layers=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == shape | {"num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def test_it_can_be_quantized_with_the_builtin_text(tmp_path: Path) -> None:
    synth("small-tied", tmp_path / "out")
    result = quantize(
        tmp_path / "out", tmp_path / "fp8", calibration=Calibration(samples=2, seq_len=16)
    )
    assert (result.layers, result.linears, result.tokens) == (3, 21, 32)
    assert (tmp_path / "fp8" / "tokenizer.json").exists()


def test_an_unknown_model_is_refused_with_those_known(tmp_path: Path) -> None:
    result = octavo("synth", "--like", "llama-9", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "Unknown model 'llama-9'" in result.stderr
    assert all(name in result.stderr for name in PUBLISHED)
    assert tiny.contents(tmp_path) == {}


@pytest.mark.parametrize("options", [{"layers": 0}, {"seed": -1}])
def test_impossible_options_are_refused(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="expected at least 1 layer and a seed that is not neg"):
        synth("small-tied", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert tiny.contents(tmp_path) == {}


def test_an_existing_output_is_left_alone_unless_it_may_be_replaced(tmp_path: Path) -> None:
    arguments = ("synth", "--like", "small-tied", "-o", tmp_path / "out", "--layers", 1, "-q")
    assert octavo(*arguments).exit_code == 0
    before = tiny.contents(tmp_path)
    refused = octavo(*arguments, "--seed", 1)
    assert refused.exit_code == 2
    assert "already exists" in refused.stderr
    assert tiny.contents(tmp_path) == before
    assert octavo(*arguments, "--seed", 1, "--overwrite").exit_code == 0
    after = tiny.contents(tmp_path)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"out/model.safetensors"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_interrupted_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(error):
        synth("small-untied", tmp_path / "new" / "out", on_progress=stop)
    assert tiny.contents(tmp_path) == {}


def test_progress_ends_with_every_byte(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = synth(
        "small-tied", tmp_path / "out", on_progress=lambda done, total: steps.append((done, total))
    )
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert steps[-1] == (result.nbytes, result.nbytes)


def test_the_command_tells_what_it_made(tmp_path: Path) -> None:
    arguments = ("synth", "--like", "small-tied", "--layers", 2)
    found = octavo(*arguments, "-o", tmp_path / "a", "--shard-size", "100KB", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    shards = list((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 1
    assert result["tensors"] == len(read(tmp_path / "a"))
    assert result["nbytes"] == sum(t.nbytes for t in read(tmp_path / "a").values())
    table = octavo(*arguments, "-o", tmp_path / "b").stdout
    assert f"{result['parameters']:,}" in table


def test_the_known_models_are_listed_with_their_sizes() -> None:
    result = octavo("synth", "--list")
    assert result.exit_code == 0
    lines = {line.split()[1]: line for line in result.stdout.splitlines() if "B │" in line}
    assert lines.keys() >= PUBLISHED.keys()
    assert "405,853,388,800" in lines["llama-3.1-405b"]
    assert "811.7 GB" in lines["llama-3.1-405b"]
