"""Whole editions of small models: what is in them, against an independent computation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from octavo import Calibration, OctavoError, Scheme, quantize
from octavo.scheme import scheme_called

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LINEARS = [
    f"model.layers.{layer}.{block}.{name}"
    for layer in range(2)
    for block, names in PROJECTIONS.items()
    for name in names
]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def edition(model: Path, output: Path, **options: Any) -> dict[str, Tensor]:
    ids = tiny.save_ids(output.with_suffix(".npy"))
    quantize(model, output, **{"calibration": Calibration(source=str(ids)), **options})
    return tensors_of(output)


def assert_same_bytes(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_are_scaled_by_amax_and_the_rest_is_untouched(
    kind: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny.build(kind, tmp_path / "model", dtype=dtype, tie_word_embeddings=tied)
    source, ours = tensors_of(model), edition(model, tmp_path / "out")
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        if module not in LINEARS:
            assert_same_bytes(ours[name], tensor)
            continue
        scale = (tensor.double().abs().max() / 448).float()
        assert ours[f"{name}_scale"] == scale
        restored = ours[name].double() * scale.double()
        # Half a unit in the last of three mantissa bits, or half the smallest subnormal.
        bound = torch.maximum(tensor.double().abs() / 16, scale.double() * 2**-10)
        assert ((restored - tensor.double()).abs() <= bound * (1 + 1e-6)).all()
    assert ("lm_head.weight" in ours) == (not tied)


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("modelopt", {"self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"}),
        ("quark", {"self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"}),
    ],
)
@pytest.mark.parametrize("kv_cache", ["fp8", "none"])
def test_names_of_a_dialect(
    format: str, names: set[str], kv_cache: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    ours = edition(tiny_llama, tmp_path / "out", format=format, scheme=Scheme(kv_cache=kv_cache))
    scales = {f"{module}.{kind}" for module in LINEARS for kind in ("weight_scale", "input_scale")}
    if kv_cache == "fp8":
        scales |= {f"model.layers.{layer}.{name}" for layer in range(2) for name in names}
    assert set(ours) == set(tensors_of(tiny_llama)) | scales
    assert all(ours[name].dtype == torch.float32 and ours[name].shape == () for name in scales)


def test_scales_of_tensors_channels_and_blocks(tmp_path: Path) -> None:
    """Each is its part's own amax / 448, and every code is the nearest."""
    source = tiny.build("llama", tmp_path / "model", hidden_size=160, intermediate_size=300)
    weights = tensors_of(source)
    for kind in ("fp8-tensor-dynamic", "fp8-dynamic", "fp8-block"):
        scheme = scheme_called(kind)
        assert not scheme.needs_calibration
        ours = edition(source, tmp_path / kind, format="compressed-tensors", scheme=scheme)
        assert not any(name.endswith(("input_scale", "k_scale", "v_scale")) for name in ours)
        for name in (name for name in ours if name.endswith("weight_scale")):
            weight = weights[name.removesuffix("_scale")].double()
            rows, columns = weight.shape
            height = {"fp8-tensor-dynamic": rows, "fp8-dynamic": 1, "fp8-block": 128}[kind]
            width = 128 if kind == "fp8-block" else columns
            codes = ours[name.removesuffix("_scale")].double()
            scale = ours[name].reshape(-(-rows // height), -(-columns // width)).double()
            for i in range(0, rows, height):
                for j in range(0, columns, width):
                    part = weight[i : i + height, j : j + width]
                    one = scale[i // height, j // width]
                    assert one.float() == (part.abs().max() / 448).float()
                    restored = codes[i : i + height, j : j + width] * one
                    bound = torch.maximum(part.abs() / 16, one * 2**-10) * (1 + 1e-6)
                    assert ((restored - part).abs() <= bound).all()


@pytest.mark.parametrize("format", ["modelopt", "quark"])
def test_excluded_modules_keep_their_bytes_and_are_listed(
    format: str, tiny_llama: Path, tmp_path: Path
) -> None:
    scheme = Scheme(exclude=("*.o_proj", "model.layers.1.mlp.*"))
    ours = edition(tiny_llama, tmp_path / "out", format=format, scheme=scheme)
    source = tensors_of(tiny_llama)
    kept = {name for name in LINEARS if name.endswith("o_proj") or "layers.1.mlp" in name}
    for module in LINEARS:
        assert (f"{module}.weight_scale" in ours) == (module not in kept)
    for module in kept:
        assert_same_bytes(ours[f"{module}.weight"], source[f"{module}.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert kept <= set(config["ignore" if format == "modelopt" else "exclude"])


def test_a_part_of_a_fused_group_excluded_is_warned_of(tiny_llama: Path, tmp_path: Path) -> None:
    ids = tiny.save_ids(tmp_path / "ids.npy")
    result = quantize(
        tiny_llama,
        tmp_path / "out",
        scheme=Scheme(exclude=("model.layers.0.self_attn.q_proj",)),
        calibration=Calibration(source=str(ids)),
    )
    assert [warning for warning in result.warnings if "layers.0.self_attn.q_proj" in warning]


def test_merged_scales_are_the_largest_of_their_group(tiny_llama: Path, tmp_path: Path) -> None:
    ours = edition(tiny_llama, tmp_path / "out", scheme=Scheme(merge_scales=True))
    plain = edition(tiny_llama, tmp_path / "plain")
    for layer in range(2):
        for group in (PROJECTIONS["self_attn"][:3], PROJECTIONS["mlp"][:2]):
            block = "self_attn" if group[0] == "q_proj" else "mlp"
            names = [f"model.layers.{layer}.{block}.{name}.weight_scale" for name in group]
            assert {ours[name].item() for name in names} == {
                max(plain[name].item() for name in names)
            }
    assert (
        ours["model.layers.0.mlp.down_proj.weight_scale"]
        == (plain["model.layers.0.mlp.down_proj.weight_scale"])
    )


def test_shards_hold_the_same_tensors_as_one_file(tiny_llama: Path, tmp_path: Path) -> None:
    whole = edition(tiny_llama, tmp_path / "whole")
    sharded = edition(tiny_llama, tmp_path / "sharded", shard_size=40_000)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        assert_same_bytes(sharded[name], tensor)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "sharded" / file)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_equal_runs_give_equal_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    edition(tiny_llama, tmp_path / "a")
    edition(tiny_llama, tmp_path / "b")
    # The sources of the tokens differ in name only, which the record keeps.
    a, b = tiny.contents(tmp_path / "a"), tiny.contents(tmp_path / "b")
    assert {**a, "octavo.json": None} == {**b, "octavo.json": None}


def test_tokenizer_template_and_generation_config_are_carried_over(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, content in tiny.contents(tiny_llama).items():
        (model / name).write_bytes(content or b"")
    tiny.save_tokenizer(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    edition(model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_the_record_says_how_the_edition_was_made(tiny_llama: Path, tmp_path: Path) -> None:
    ours = edition(tiny_llama, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "octavo.json").read_text())
    assert record["scheme"]["inputs"] == "static"
    assert record["calibration"]["samples"] == 4
    for module in LINEARS:
        scale = ours[f"{module}.input_scale"].item()
        assert record["amax"][module] / 448 == pytest.approx(scale, rel=1e-6)


def test_dead_input_gets_scale_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny.build("llama", tmp_path / "model")
    tensors = tensors_of(model)
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ours = edition(model, tmp_path / "out")
    assert ours["model.layers.1.mlp.up_proj.weight_scale"] == 1
    assert ours["model.layers.1.mlp.down_proj.input_scale"] == 1


def test_a_model_whose_activations_overflow_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny.build("llama", tmp_path / "model", dtype=torch.float16)
    tensors = tensors_of(model)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(60000)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OctavoError, match=r"layers\.0\.mlp\.down_proj reach (inf|nan)"):
        edition(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


PEAK = """
import sys
from octavo import Calibration, quantize
calibration = Calibration(source=sys.argv[3])
print(quantize(sys.argv[1], sys.argv[2], calibration=calibration).peak_memory)
"""


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Layers of 7 MB, so that holding 24 more of them would be a third of the process."""
    ids = tiny.save_ids(tmp_path / "ids.npy", samples=8, seq_len=64)
    peaks = {}
    for layers in (8, 32):
        model = tiny.build(
            "llama",
            tmp_path / f"model{layers}",
            layers=layers,
            hidden_size=512,
            intermediate_size=1536,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=128,
        )
        arguments = [model, tmp_path / f"out{layers}", ids]
        command = [sys.executable, "-c", PEAK, *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[layers] = int(run.stdout)
    assert peaks[32] <= 1.1 * peaks[8]
