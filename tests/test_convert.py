"""Editions in one dialect made into another: the codes stay, the configs say the same."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from octavo import Calibration, OctavoError, convert, fp8, load, quantize
from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.formats import FORMATS
from octavo.scheme import scheme_called
from spoiling import edit_json, edit_tensors, hide_quantization

# What differs between two models: architecture, tied embeddings, biases, KV cache, exclusions.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"shards": 3, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
}


PAIRS = [
    (kind, source, target)
    for source, dialect in FORMATS.items()
    for kind in dialect.carries
    for target in FORMATS
    if kind in FORMATS[target].carries and target != source
]
# Every pair with one of the models in turn.
CASES = [(*pair, model) for pair, model in zip(PAIRS, itertools.cycle(MODELS))]


def make(kind: str, format: str, architecture: str, directory: Path, **options: Any) -> Path:
    """An edition whose fused groups share scales, so that any dialect can hold it."""
    model = tiny.build(architecture, directory / "model", **MODELS[architecture])
    ids = tiny.save_ids(directory / "ids.npy")
    scheme = scheme_called(
        kind,
        **{
            "kv_cache": "none" if architecture == "mistral" else "fp8",
            "merge_scales": kind in ("fp8", "fp8-tensor-dynamic"),
            "exclude": ("*.o_proj", "*.down_proj") if architecture == "llama" else (),
            **options,
        },
    )
    quantize(
        model,
        directory / "edition",
        scheme=scheme,
        calibration=Calibration(source=str(ids)),
        format=format,
    )
    return directory / "edition"


def files(directory: Path) -> dict[str, Any]:
    """Tensors and JSON of a checkpoint, to be compared."""
    found: dict[str, Any] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            found |= {
                f"{path.stem if path.stem.startswith('rank') else ''}/{name}": (
                    tensor.dtype,
                    tuple(tensor.shape),
                    tensor.contiguous().view(torch.uint8).numpy().tobytes()
                    if tensor.ndim
                    else tensor.item(),
                )
                for name, tensor in tensors.items()
            }
        elif path.suffix == ".json" and not path.name.endswith("index.json"):
            found[path.name] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize(("kind", "source", "target", "architecture"), CASES)
def test_there_and_back_again(
    kind: str, source: str, target: str, architecture: str, tmp_path: Path
) -> None:
    first = make(kind, source, architecture, tmp_path)
    there = convert(first, tmp_path / "there", to=target)
    assert (there.before, there.after, there.requantized) == (source, target, {})
    convert(tmp_path / "there", tmp_path / "back", to=source)
    assert files(tmp_path / "back") == files(first)


@pytest.mark.parametrize("target", [name for name in FORMATS if "fp8" in FORMATS[name].carries])
def test_a_converted_edition_is_what_quantize_writes(target: str, tmp_path: Path) -> None:
    first = make("fp8", "modelopt", "llama", tmp_path / "a")
    convert(first, tmp_path / "converted", to=target)
    direct = make("fp8", target, "llama", tmp_path / "b")
    assert files(tmp_path / "converted") == files(direct)


@pytest.mark.parametrize("kind", ["fp8", "fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dequantized_is_codes_times_scales(kind: str, dtype: str, tmp_path: Path) -> None:
    first = make(kind, "compressed-tensors", "llama", tmp_path)
    result = convert(first, tmp_path / "plain", dequantize=dtype)
    assert result.after is None
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    plain, source = load_file(tmp_path / "plain" / "model.safetensors"), tensors_of(first)
    assert set(plain) == {name for name in source if not name.endswith("_scale")}
    for name, tensor in plain.items():
        assert tensor.dtype == wanted
        expected = source[name].double()
        if source[name].dtype == torch.float8_e4m3fn:
            scale = source[f"{name}_scale"].double()
            rows, columns = expected.shape
            if kind == "fp8-block":
                scale = scale[torch.arange(rows) // 128][:, torch.arange(columns) // 128]
            expected = (expected * scale).float().double()
        assert torch.equal(tensor, expected.to(wanted))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(wanted).removeprefix("torch.")
    model, _ = load(tmp_path / "plain")
    assert torch.isfinite(model(torch.arange(9).reshape(1, -1)).logits).all()


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(
    "options", [{"to": "tensorrt-llm", "tp": 2}, {"dequantize": "bf16"}], ids=str
)
def test_memory_is_that_of_a_few_tensors(options: dict[str, Any], tmp_path: Path) -> None:
    """Peak above what a small conversion takes, in a process of its own."""
    model = tiny.build(
        "llama",
        tmp_path / "model",
        layers=6,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        head_dim=64,
    )
    ids = tiny.save_ids(tmp_path / "ids.npy")
    first = tmp_path / "edition"
    # Unmerged: gate or up is rounded again.
    quantize(model, first, calibration=Calibration(source=str(ids)))
    small = make("fp8", "modelopt", "qwen2", tmp_path / "small", merge_scales=False)
    script = """
import json, sys
from octavo import convert
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
options = json.loads(sys.argv[4])
convert(sys.argv[1], sys.argv[3] + "/small", **options)
before = peak()
convert(sys.argv[2], sys.argv[3] + "/large", **options)
print(peak() - before)
"""
    arguments = [small, first, tmp_path / "out", json.dumps(options)]
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    largest = 1024 * 4096
    assert first.joinpath("model.safetensors").stat().st_size > 18 * largest
    # Codes before and after, and what they are decoded through; the allocator keeps some.
    assert int(ran.stdout) < 12 * largest, (
        f"{int(ran.stdout) / largest:.1f} times the largest tensor"
    )


@pytest.mark.parametrize("old", [1.0, 0.0123])
@pytest.mark.parametrize("factor", [1.0, 1.1, 2.0, 37.0, 1e5])
def test_new_codes_are_the_nearest_with_the_new_scale(old: float, factor: float) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(3).view(fp8.E4M3)
    before, after = torch.tensor(old), torch.tensor(old) * factor
    found, error = fp8.rescale(codes, before, after)
    values = codes.float() * before
    expected = (values / after).clamp(-448, 448).to(fp8.E4M3)
    nan = values.isnan()
    assert torch.equal(found.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])
    assert found.float().isnan().equal(nan)
    exact, rounded = values[~nan].double(), found[~nan].double() * after.double()
    noise = ((exact - rounded) ** 2).sum()
    if factor in (1.0,):
        assert error == (None, 0.0)
    elif noise:
        expected_db = 10 * torch.log10((exact**2).sum() / noise).item()
        assert error.sqnr_db == pytest.approx(expected_db, abs=1e-4)


def test_blocks_that_do_not_divide_are_warned_of(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "head_dim": 32,
        "num_key_value_heads": 4,
    }
    for name, options in (("fit", sizes), ("partial", {**sizes, "intermediate_size": 300})):
        model = tiny.build("llama", tmp_path / name, **options)
        made = quantize(
            model, tmp_path / f"{name}-8", scheme=scheme_called("fp8-block"), format="block-fp8"
        )
        there = convert(tmp_path / f"{name}-8", tmp_path / f"{name}-ct", to="compressed-tensors")
        assert made.warnings == there.warnings
        assert bool(made.warnings) == (name == "partial")
        if made.warnings:
            assert "6 of 14 weights, model.layers.0.mlp.gate_proj of [300, 128]" in made.warnings[0]


class TestMergedScales:
    """TensorRT-LLM has one scale for q/k/v and one for gate/up."""

    def test_only_weights_with_another_scale_are_rounded_again(self, tmp_path: Path) -> None:
        first = make("fp8", "modelopt", "qwen2", tmp_path, merge_scales=False)
        result = convert(first, tmp_path / "there", to="tensorrt-llm")
        before, after = Edition(Checkpoint(first)), Edition(Checkpoint(tmp_path / "there"))
        groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
        changed = set()
        for module in before.quantized_modules():
            parent, _, projection = module.rpartition(".")
            group = next((group for group in groups if projection in group), (projection,))
            scales = [before.read(f"{parent}.{one}.weight_scale") for one in group]
            largest = torch.stack(scales).amax()
            assert after.read(f"{module}.weight_scale") == largest
            codes = [edition.read(f"{module}.weight") for edition in (before, after)]
            values = codes[0].float() * before.read(f"{module}.weight_scale")
            nearest = (values / largest).clamp(-448, 448).to(fp8.E4M3)
            assert torch.equal(codes[1].view(torch.uint8), nearest.view(torch.uint8))
            if before.read(f"{module}.weight_scale") != largest:
                changed.add(module)
        assert set(result.requantized) == changed
        assert changed
        assert "rounded again" in result.warnings[0]
        assert all(error.sqnr_db and error.sqnr_db > 20 for error in result.requantized.values())

    def test_a_group_of_mixed_precision_is_refused(self, tmp_path: Path) -> None:
        first = make("fp8", "modelopt", "qwen2", tmp_path, exclude=("*.k_proj",))
        with pytest.raises(OctavoError, match=r"q_proj is FP8 while .*k_proj is not"):
            convert(first, tmp_path / "there", to="tensorrt-llm")
        assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("architecture", MODELS)
def test_ranks_are_undone_on_reading(tp: int, pp: int, architecture: str, tmp_path: Path) -> None:
    first = make("fp8", "modelopt", architecture, tmp_path)
    convert(first, tmp_path / "ranks", to="tensorrt-llm", tp=tp, pp=pp)
    assert len(list((tmp_path / "ranks").glob("rank*.safetensors"))) == tp * pp
    convert(tmp_path / "ranks", tmp_path / "back", to="modelopt")
    assert files(tmp_path / "back") == files(first)


def test_a_ranked_edition_computes_what_the_plain_one_does(tmp_path: Path) -> None:
    first = make("fp8", "modelopt", "qwen3", tmp_path)
    convert(first, tmp_path / "ranks", to="tensorrt-llm", tp=2)
    ids = torch.arange(20).reshape(1, -1)
    with torch.inference_mode():
        assert torch.equal(load(first)[0](ids).logits, load(tmp_path / "ranks")[0](ids).logits)


Q_PROJ = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "neither dialect nor dtype": (lambda out: None, {}, "Choose one"),
    "both": (lambda out: None, {"to": "quark", "dequantize": "bf16"}, "Choose one"),
    "unknown dialect": (lambda out: None, {"to": "gguf"}, r"'gguf'.*modelopt, quark"),
    "unknown dtype": (lambda out: None, {"dequantize": "int8"}, r"'int8'.*bf16"),
    "a target without a layout for the scheme": (
        lambda out: None,
        {"to": "block-fp8"},
        r"no layout for the scheme fp8;.*carry fp8: modelopt, quark, compressed-tensors, vllm-fp8",
    ),
    "ranks where there are none": (lambda out: None, {"to": "quark", "tp": 2}, "quark has none"),
    "ranks that do not divide heads": (
        lambda out: None,
        {"to": "tensorrt-llm", "tp": 3},
        r"3.*heads",
    ),
    "ranks that do not divide layers": (
        lambda out: None,
        {"to": "tensorrt-llm", "pp": 3},
        r"3.*layers",
    ),
    "not quantized": (hide_quantization, {"to": "quark"}, "not quantized"),
    "scales of channels though the config promises tensors": (
        lambda out: edit_tensors(
            out, lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(64)})
        ),
        {"to": "quark"},
        rf"{Q_PROJ}.weight_scale.*shape \[64\].*one scale per tensor",
    ),
    "no input scale though the config promises static inputs": (
        lambda out: edit_tensors(out, lambda t: t.pop(f"{Q_PROJ}.input_scale")),
        {"to": "quark"},
        rf"{Q_PROJ}.input_scale.*is missing.*static inputs",
    ),
    "no cache scales though the config promises them": (
        lambda out: edit_tensors(out, lambda t: t.pop("model.layers.1.self_attn.v_proj.v_scale")),
        {"to": "quark"},
        r"layers.1.self_attn.v_scale.*is missing.*KV cache",
    ),
    "an excluded module that is FP8": (
        lambda out: edit_json(
            out / "config.json", lambda c: c["quantization_config"]["ignore"].append(Q_PROJ)
        ),
        {"to": "quark"},
        rf"{Q_PROJ}.weight.*is FP8.*left unquantized",
    ),
    "an unquantized module that is not excluded": (
        lambda out: edit_tensors(
            out,
            lambda t: (
                t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].bfloat16()}),
                t.pop(f"{Q_PROJ}.weight_scale"),
            ),
        ),
        {"to": "quark"},
        rf"{Q_PROJ}.weight.*bfloat16.*promises an FP8 weight",
    ),
    "a tensor of another shape": (
        lambda out: edit_tensors(
            out, lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:8].clone()})
        ),
        {"to": "quark"},
        rf"{Q_PROJ}.weight.*shape \[8, 64\]",
    ),
    "two names for one tensor": (
        lambda out: edit_tensors(
            out, lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.tensor(1.0)})
        ),
        {"to": "quark"},
        r"mean the same",
    ),
    "two checkpoints in one directory": (
        lambda out: shutil.copy(out / "model.safetensors", out / "rank0.safetensors"),
        {"to": "quark"},
        r"two checkpoints",
    ),
    "a rank that is missing": (
        lambda out: (out / "model.safetensors").rename(out / "rank1.safetensors"),
        {"to": "quark"},
        r"rank0.safetensors is missing",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edition to be copied and spoiled."""
    return make("fp8", "modelopt", "qwen2", tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    case: str, good: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(good, tmp_path / "source"))
    spoil, options, reason = REFUSED[case]
    spoil(source)
    before = tiny.contents(tmp_path)
    with pytest.raises(OctavoError, match=reason):
        convert(source, tmp_path / "out", **options)
    assert tiny.contents(tmp_path) == before
