"""Editions in which some linear layers have dynamic inputs beside the static ones of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from octavo import Calibration, OctavoError, convert, inspect, load, quantize
from octavo.checkpoint import Checkpoint
from octavo.cli import app
from octavo.edition import Edition
from octavo.formats import FORMATS, formats_that_mix, get_format
from octavo.scheme import KINDS, Scheme, scheme_called
from reference import fake_quantized
from spoiling import edit_json, edit_tensors
from test_convert import files

# Parts that engines fuse, parts of layers, and something that is left unquantized all the same.
DYNAMIC = ("*.down_proj", "model.layers.1.self_attn.[qkv]_proj", "*.layers.0.mlp.*")
EXCLUDE = ("model.layers.0.mlp.down_proj",)
MOVED = {
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    *(f"model.layers.1.self_attn.{one}_proj" for one in "qkv"),
}
# Each dialect with each of its static schemes.
CASES = [(name, kind) for kind in KINDS for name in formats_that_mix(kind)]


def mixed(kind: str = "fp8", **options: Any) -> Scheme:
    return scheme_called(kind, **{"dynamic": DYNAMIC, "exclude": EXCLUDE, **options})


def make(model: Path, directory: Path, format: str, scheme: Scheme) -> Path:
    directory.mkdir(exist_ok=True)
    ids = tiny.save_ids(directory / "ids.npy", samples=8, seq_len=32)
    out = directory / f"edition-{format}"
    quantize(model, out, scheme=scheme, format=format, calibration=Calibration(source=str(ids)))
    return out


def section(edition: Path) -> Any:
    return json.loads((edition / "config.json").read_text())["quantization_config"]


def test_which_dialects_can_say_so() -> None:
    assert CASES == [
        ("quark", "fp8"),
        ("compressed-tensors", "fp8"),
        ("compressed-tensors", "fp8-channel-static"),
    ]


@pytest.mark.parametrize("kv_cache", ["fp8", "none"])
@pytest.mark.parametrize(("format", "kind"), CASES)
def test_what_is_written_is_what_is_read(
    format: str, kind: str, kv_cache: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    out = make(tiny_llama, tmp_path, format, mixed(kind, kv_cache=kv_cache))
    tensors = load_file(out / "model.safetensors")
    quantized = {name.removesuffix(".weight_scale") for name in tensors if "weight_scale" in name}
    static = {name.removesuffix(".input_scale") for name in tensors if "input_scale" in name}
    assert quantized - static == MOVED
    assert len(quantized) == 13
    found = Edition(Checkpoint(out)).scheme
    assert found is not None
    assert (found.kind, found.kv_cache) == (kind, kv_cache)
    assert set(found.dynamic) == MOVED
    assert set(found.exclude) == {*EXCLUDE, "lm_head"}
    report = inspect(out)
    assert report.findings == ()
    # An edition decoded and encoded again is the same.
    again = make(
        tiny_llama, tmp_path / "again", format, found.model_copy(update={"rounding": "nearest"})
    )
    assert {k: v for k, v in files(out).items() if k != "octavo.json"} == {
        k: v for k, v in files(again).items() if k != "octavo.json"
    }


@pytest.mark.parametrize("format", formats_that_mix("fp8"))
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_loaded_edition_is_the_fake_quantized_model(
    kind: str, format: str, tmp_path: Path
) -> None:
    """Against one in which everything is static too: which inputs are rounded how must matter here."""
    model = tiny.build(kind, tmp_path / "model", dtype=torch.float32)
    scheme = mixed(kv_cache="none")
    out = make(model, tmp_path, format, scheme)
    tensors = load_file(out / "model.safetensors")
    ids = torch.randint(tiny.VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    others = make(model, tmp_path / "static", format, scheme.model_copy(update={"dynamic": ()}))
    with torch.inference_mode():
        expected, found = fake_quantized(model, tensors)(ids).logits, load(out)[0](ids).logits
        static = load(others)[0](ids).logits
    assert (found - expected).norm() < 0.1 * (static - expected).norm()


@pytest.mark.parametrize("format", [name for name in FORMATS if "fp8" in FORMATS[name].carries])
def test_others_refuse_and_name_those_that_can(
    format: str, tiny_llama: Path, tmp_path: Path
) -> None:
    if format in formats_that_mix("fp8"):
        assert get_format(format, mixed()) is FORMATS[format]
        return
    with pytest.raises(OctavoError, match=rf"{format} has no layout.*quark, compressed-tensors\."):
        make(tiny_llama, tmp_path, format, mixed())
    source = make(tiny_llama, tmp_path, "quark", mixed())
    with pytest.raises(OctavoError, match=rf"{format} has no layout.*quark, compressed-tensors\."):
        convert(source, tmp_path / "converted", to=format)
    assert not (tmp_path / "converted").exists()


def test_there_and_back_again(tiny_llama: Path, tmp_path: Path) -> None:
    first = make(tiny_llama, tmp_path, "quark", mixed())
    convert(first, tmp_path / "there", to="compressed-tensors")
    direct = make(tiny_llama, tmp_path, "compressed-tensors", mixed())
    assert files(tmp_path / "there") == files(direct)
    convert(tmp_path / "there", tmp_path / "back", to="quark")
    assert files(tmp_path / "back") == files(first)


def test_names_come_before_patterns_for_quark(tiny_llama: Path, tmp_path: Path) -> None:
    """Its readers take the first that fits; keys and values are cached in FP8 whatever the inputs are."""
    layers = section(make(tiny_llama, tmp_path, "quark", mixed()))["layer_quant_config"]
    assert [*layers][-2:] == ["*k_proj", "*v_proj"]
    assert set(layers) - {"*k_proj", "*v_proj"} == MOVED
    for name, layer in layers.items():
        assert (layer["output_tensors"] is not None) is name.endswith(("k_proj", "v_proj"))
        assert layer["input_tensors"]["is_dynamic"] is (name in MOVED)


def test_a_group_by_regular_expression(tiny_llama: Path, tmp_path: Path) -> None:
    out = make(tiny_llama, tmp_path, "compressed-tensors", mixed())
    expected = load(out)[0](torch.arange(9)[None]).logits

    def rewrite(config: Any) -> None:
        group = config["quantization_config"]["config_groups"]["group_1"]
        group["targets"] = ["re:.*0.mlp.(up|gate)_proj", "re:.*1.(self_attn.[qkv]|mlp.down)_proj"]

    edit_json(out / "config.json", rewrite)
    assert set(Edition(Checkpoint(out)).scheme.dynamic) == MOVED  # type: ignore[union-attr]
    assert torch.equal(load(out)[0](torch.arange(9)[None]).logits, expected)


def of_quark(edit: Callable[[Any], Any]) -> tuple[str, Callable[[Any], Any]]:
    name = "model.layers.1.mlp.down_proj"
    return "quark", lambda section: edit(section["layer_quant_config"][name])


def of_group(edit: Callable[[Any], Any]) -> tuple[str, Callable[[Any], Any]]:
    return "compressed-tensors", lambda section: edit(section["config_groups"]["group_1"])


UNKNOWN = {
    "a group of other weights": of_group(lambda group: group["weights"].update(strategy="channel")),
    "a group of static inputs": of_group(
        lambda group: group["input_activations"].update(dynamic=False, strategy="tensor")
    ),
    "a group of weights alone": of_group(lambda group: group.update(input_activations=None)),
    "a group that is none": (
        "compressed-tensors",
        lambda section: section["config_groups"].update(group_1="all"),
    ),
    "a layer of other weights": of_quark(
        lambda layer: layer["weight"].update(qscheme="per_channel", ch_axis=0)
    ),
    "a layer of weights alone": of_quark(lambda layer: layer.update(input_tensors=None)),
    "a layer with one scale for all tokens": of_quark(
        lambda layer: layer["input_tensors"].update(qscheme="per_tensor")
    ),
    "static inputs beside dynamic ones": (
        "quark",
        lambda section: section["global_quant_config"].update(
            input_tensors=section["layer_quant_config"]["model.layers.1.mlp.down_proj"][
                "input_tensors"
            ]
        ),
    ),
}


@pytest.mark.parametrize(("format", "edit"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_computed_is_refused(
    format: str, edit: Callable[[Any], Any], tiny_llama: Path, tmp_path: Path
) -> None:
    out = make(tiny_llama, tmp_path, format, mixed())
    edit_json(out / "config.json", lambda config: edit(config["quantization_config"]))
    with pytest.raises(OctavoError, match="which Octavo does not compute"):
        load(out)


def test_a_scale_that_is_missing_or_too_many_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    out = make(tiny_llama, tmp_path, "quark", mixed())
    static, dynamic = "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"

    def swap(tensors: dict[str, Any]) -> None:
        tensors[f"{dynamic}.input_scale"] = tensors.pop(f"{static}.input_scale")

    edit_tensors(out, swap)
    found = {finding.code: finding.faults for finding in inspect(out).findings}
    assert {code: [fault.place for fault in faults] for code, faults in found.items()} == {
        "input-scale-missing": [f"{static}.input_scale"],
        "input-scale-unpromised": [f"{dynamic}.input_scale"],
    }
    with pytest.raises(OctavoError, match="promises static inputs"):
        convert(out, tmp_path / "converted", to="compressed-tensors")


def test_what_engines_fuse_goes_together(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        OctavoError, match=r"means model\.layers\.0\.self_attn\.k_proj and not .*q_proj"
    ):
        make(tiny_llama, tmp_path, "quark", Scheme(dynamic=("*.k_proj",)))
    # What is left unquantized does not count.
    apart = Scheme(dynamic=("*.k_proj", "*.v_proj"), exclude=("*.q_proj",))
    make(tiny_llama, tmp_path, "quark", apart)
    out = make(tiny_llama, tmp_path, "compressed-tensors", mixed())
    edit_json(
        out / "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_1"]["targets"].remove(
            "model.layers.0.mlp.up_proj"
        ),
    )
    faults = {finding.code: finding.faults for finding in inspect(out).findings}
    (fault,) = faults["fusion-inputs-mixed"]
    assert fault.found == "dynamic inputs in gate_proj, not in up_proj"


@pytest.mark.parametrize("kind", ["fp8-dynamic", "fp8-block", "fp8-tensor-dynamic"])
def test_dynamic_beside_dynamic_is_refused(kind: str) -> None:
    with pytest.raises(OctavoError, match="all inputs are dynamic"):
        scheme_called(kind, dynamic=("*",))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_command_line(rounding: str, tiny_llama: Path, tmp_path: Path) -> None:
    ids = tiny.save_ids(tmp_path / "ids.npy", samples=8, seq_len=32)
    arguments = [
        "quantize",
        tiny_llama,
        "-o",
        tmp_path / "out",
        "--calib",
        ids,
        "--format",
        "quark",
    ]
    arguments += ["--dynamic-inputs", "*.down_proj", "--dynamic-inputs", "*.0.self_attn.o_proj"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--rounding", rounding])
    assert result.exit_code == 0, result.stderr
    account = json.loads((tmp_path / "out" / "octavo.json").read_text())
    assert account["scheme"]["dynamic"] == ["*.down_proj", "*.0.self_attn.o_proj"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(name.endswith("input_scale") for name in tensors) == 14 - 3
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "dynamic inputs in" in shown
    assert "model.layers.{0-1}.mlp.down_proj" in shown
