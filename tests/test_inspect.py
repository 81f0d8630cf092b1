"""Inspecting and verifying: a sound edition has nothing odd, and each fault is found and named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import tiny
from octavo import Calibration, OctavoError, fp8, quantize
from octavo.checkpoint import Checkpoint
from octavo.cli import app
from octavo.edition import Edition
from octavo.engines.vllm_loaded import LoadedCache, LoadedLinear, LoadedModel
from octavo.formats import FORMATS
from octavo.inspection import (
    Finding,
    as_json,
    codes,
    inspect,
    inspect_tensor,
    run_checks,
    survey,
)
from octavo.inspection import strips as strips_module
from octavo.inspection.names import fold, tell
from octavo.inspection.strips import strips
from octavo.scheme import scheme_called
from octavo.verification import Verification, verify
from octavo.verification.engine_checks import CHECKS
from octavo.verification.running import Ran

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
BLOCK = "model.layers.0.self_attn"
# In multiples of 128: block scales have nothing odd then.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
KINDS = [(name, kind) for name, dialect in FORMATS.items() for kind in dialect.carries]


class Editions:
    """Editions of one small model, made once each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # More than 20 linear layers: a single scale of 1 may be chance among these.
        self.source = tiny.build("llama", root / "source", layers=3, **SIZES)
        tiny.save_tokenizer(self.source)
        self.ids = tiny.save_ids(root / "ids.npy", samples=8, seq_len=32)

    def made(self, format: str, kind: str = "fp8", **scheme: Any) -> Path:
        name = "-".join([format, kind, *(f"{key}{value}" for key, value in scheme.items())])
        path = self.root / name.replace("*", "_").replace("/", "_")
        if not path.exists():
            quantize(
                self.source,
                path,
                scheme=scheme_called(kind, **scheme),
                format=format,
                calibration=Calibration(source=str(self.ids)),
            )
        return path


@pytest.fixture(scope="module")
def editions(tmp_path_factory: pytest.TempPathFactory) -> Editions:
    return Editions(tmp_path_factory.mktemp("inspect"))


class Copy:
    """A copy of an edition, to be broken.

    Attributes:
        path: where it is.
        tensors: under their stored names; written back by :meth:`save`.
        config: likewise.
    """

    def __init__(self, edition: Path, path: Path) -> None:
        shutil.copytree(edition, path)
        self.path = path
        self.tensors = load_file(path / "model.safetensors")
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())

    @property
    def quantization(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config["quantization_config"]
        return section

    def save(self) -> Path:
        save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self.path

    def fill(self, ending: str, value: float) -> None:
        """Set every scale whose name ends so."""
        for name in [name for name in self.tensors if name.endswith(ending)]:
            self.tensors[name].fill_(value)

    def unquantize(self, module: str) -> None:
        """Put a BF16 weight in the place of an FP8 one; its scales stay."""
        weight = self.tensors[f"{module}.weight"].float() * self.tensors[f"{module}.weight_scale"]
        self.tensors[f"{module}.weight"] = weight.bfloat16()

    def drop(self, *names: str) -> None:
        for name in names:
            del self.tensors[name]

    def ignore(self, *modules: str) -> None:
        self.quantization["ignore"] += modules


def found(path: Path) -> dict[str, Finding]:
    return {finding.code: finding for finding in inspect(path).findings}


@pytest.mark.parametrize(("format", "kind"), KINDS)
def test_nothing_is_odd_about_a_sound_edition(format: str, kind: str, editions: Editions) -> None:
    report = inspect(editions.made(format, kind))
    assert report.findings == ()
    assert (report.dialect, report.architecture) == (format, "llama")
    assert report.scheme is not None
    assert report.scheme.kind == kind
    assert [layer.number for layer in report.layers] == [0, 1, 2, None]
    for layer in report.layers[:3]:
        assert layer.dtypes == {"float8_e4m3fn": 7}
        assert layer.used is not None
        # Two or three weights share a scale where the dialect merges them.
        assert layer.used == 1 if format != "tensorrt-llm" else 0.5 < layer.used <= 1
        assert (layer.input_scale is None) == (report.scheme.inputs == "dynamic")
        assert (layer.k_scale is None) == (report.scheme.kv_cache == "none")


@pytest.mark.parametrize(
    "scheme",
    [
        {"kv_cache": "none"},
        {"merge_scales": True},
        {"exclude": ("*.self_attn.*", "model.layers.1.*")},
    ],
    ids=lambda scheme: next(iter(scheme)),
)
@pytest.mark.parametrize("format", ["modelopt", "quark", "compressed-tensors", "vllm-fp8"])
def test_nothing_is_odd_about_other_schemes(
    format: str, scheme: dict[str, Any], editions: Editions
) -> None:
    assert inspect(editions.made(format, **scheme)).findings == ()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_is_odd_about_an_unquantized_checkpoint(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    report = inspect(tiny.build(kind, tmp_path / kind, tie_word_embeddings=tied))
    assert report.findings == ()
    assert report.dialect is None
    assert report.scheme is None
    assert report.sizes.bytes_per_parameter == 2
    weights = load_file(tmp_path / kind / "model.safetensors")
    assert report.linears[0].amax == weights[f"{Q}.weight"].abs().max().item()


class Fault(NamedTuple):
    """How to break an edition, and what is then found.

    Attributes:
        code: of the only finding.
        severity: its.
        place: the first of it.
        break_: does it.
        format: of the edition.
        kind: of the edition.
    """

    code: str
    severity: str
    place: str
    break_: Callable[[Copy], object]
    format: str = "modelopt"
    kind: str = "fp8"


def rename(copy: Copy, old: str, new: str) -> None:
    copy.tensors[new] = copy.tensors.pop(old)


def lose_quantization(copy: Copy) -> None:
    del copy.config["quantization_config"]


def keep_q_in_bf16(copy: Copy) -> None:
    copy.unquantize(Q)
    copy.drop(f"{Q}.weight_scale", f"{Q}.input_scale")
    copy.ignore(Q)


def unquantize_down(copy: Copy) -> None:
    copy.unquantize(DOWN)
    copy.drop(f"{DOWN}.weight_scale", f"{DOWN}.input_scale")


def leave_input_scale(copy: Copy) -> None:
    copy.unquantize(DOWN)
    copy.drop(f"{DOWN}.weight_scale")
    copy.ignore(DOWN)


def scale_q_by_token(copy: Copy) -> None:
    groups = copy.quantization["config_groups"]
    by_token = groups["group_0"]["input_activations"] | {"dynamic": True, "strategy": "token"}
    groups["group_1"] = groups["group_0"] | {"input_activations": by_token, "targets": [Q]}
    copy.drop(f"{Q}.input_scale")


def quantize_excluded_head(copy: Copy) -> None:
    head = copy.tensors["lm_head.weight"]
    scale = head.float().abs().max() / 448
    copy.tensors["lm_head.weight"] = (head.float() / scale).to(fp8.E4M3)
    copy.tensors["lm_head.weight_scale"] = scale
    copy.tensors["lm_head.input_scale"] = scale.clone()


def quantize_head(copy: Copy) -> None:
    quantize_excluded_head(copy)
    copy.quantization["ignore"].remove("lm_head")


def tie(copy: Copy) -> None:
    copy.config["tie_word_embeddings"] = True


def spoil_codes(copy: Copy) -> None:
    copy.tensors[f"{DOWN}.weight"].view(torch.uint8)[3, 5] = 0x7F
    copy.tensors[f"{DOWN}.weight"].view(torch.uint8)[70, 9] = 0xFF


def halve_codes(copy: Copy, rows: int | None = None) -> None:
    """Three binades lower, with nothing beyond 56."""
    weight = copy.tensors[f"{DOWN}.weight"]
    weight[:rows] = (weight[:rows].float() / 8).to(fp8.E4M3)


def spoil_norm(value: float) -> Callable[[Copy], None]:
    def spoil(copy: Copy) -> None:
        copy.tensors["model.norm.weight"][7] = value

    return spoil


def zero(copy: Copy) -> None:
    copy.tensors[f"{DOWN}.weight"].view(torch.uint8).zero_()


def repeat_scale(copy: Copy) -> None:
    copy.tensors[f"{DOWN}.weight_scale"] = copy.tensors[f"{DOWN}.weight_scale"].repeat(128, 1)


def set_tensor(name: str, value: Tensor) -> Callable[[Copy], None]:
    def put(copy: Copy) -> None:
        copy.tensors[name] = value

    return put


def scaled(name: str, factor: float) -> Callable[[Copy], None]:
    return lambda copy: set_tensor(name, copy.tensors[name] * factor)(copy)


def drop(*names: str) -> Callable[[Copy], None]:
    return lambda copy: copy.drop(*names)


def fill(ending: str, value: float) -> Callable[[Copy], None]:
    return lambda copy: copy.fill(ending, value)


K_SCALE = f"{BLOCK}.k_proj.k_scale"
FAULTS = {
    "missing tensor": Fault(
        "tensor-missing", "error", "model.norm.weight", drop("model.norm.weight")
    ),
    "missing head": Fault("tensor-missing", "error", "lm_head.weight", drop("lm_head.weight")),
    "wrong shape": Fault(
        "tensor-shape",
        "error",
        "model.norm.weight",
        set_tensor("model.norm.weight", torch.ones(64).bfloat16()),
    ),
    "wrong dtype": Fault(
        "tensor-dtype",
        "error",
        "model.norm.weight",
        set_tensor("model.norm.weight", torch.ones(128).to(torch.float8_e5m2)),
    ),
    "FP8 norm": Fault(
        "tensor-dtype",
        "error",
        "model.norm.weight",
        set_tensor("model.norm.weight", torch.ones(128).to(fp8.E4M3)),
    ),
    "FP8 head": Fault("tensor-dtype", "error", "lm_head.weight", quantize_head),
    "unknown tensor": Fault(
        "tensor-unknown",
        "note",
        f"{BLOCK}.rotary_emb.inv_freq",
        set_tensor(f"{BLOCK}.rotary_emb.inv_freq", torch.ones(8)),
    ),
    "lost config": Fault(
        "quantization-undeclared",
        "error",
        f"{Q}.weight",
        lose_quantization,
        "compressed-tensors",
    ),
    "excluded but FP8": Fault("excluded-quantized", "error", DOWN, lambda copy: copy.ignore(DOWN)),
    "FP8 head excluded": Fault(
        "excluded-quantized",
        "error",
        "lm_head",
        quantize_excluded_head,
    ),
    "unquantized but not excluded": Fault("unquantized-unlisted", "error", DOWN, unquantize_down),
    "mixed group": Fault("fusion-mixed", "warning", BLOCK, keep_q_in_bf16),
    "mixed inputs of a group": Fault(
        "fusion-inputs-mixed", "error", BLOCK, scale_q_by_token, "compressed-tensors"
    ),
    "lost tie": Fault("tied-lost", "error", "lm_head.weight", tie),
    "scale of zero": Fault(
        "scale-invalid", "error", f"{DOWN}.input_scale", fill("0.mlp.down_proj.input_scale", 0.0)
    ),
    "negative scale": Fault(
        "scale-invalid", "error", f"{BLOCK}.v_scale", fill("0.self_attn.v_proj.v_scale", -1.0)
    ),
    "scale of NaN": Fault(
        "scale-invalid",
        "error",
        f"{DOWN}.weight_scale",
        fill("0.mlp.down_proj.weight_scale", math.nan),
    ),
    "infinite scale": Fault(
        "scale-invalid", "error", f"{BLOCK}.k_scale", fill("0.self_attn.k_proj.k_scale", math.inf)
    ),
    "one channel's scale of zero": Fault(
        "scale-invalid",
        "error",
        f"{DOWN}.weight_scale",
        lambda copy: copy.tensors[f"{DOWN}.weight_scale"][3].zero_(),
        kind="fp8-dynamic",
    ),
    "uncalibrated inputs": Fault(
        "scale-uncalibrated", "error", f"{Q}.input_scale", fill(".input_scale", 1.0)
    ),
    "uncalibrated weights": Fault(
        "scale-uncalibrated", "error", f"{Q}.weight_scale", fill(".weight_scale", 1.0)
    ),
    "uncalibrated block": Fault(
        "scale-uncalibrated",
        "error",
        f"{DOWN}.weight_scale",
        lambda copy: copy.tensors[f"{DOWN}.weight_scale_inv"][0, 1].fill_(1.0),
        "block-fp8",
        "fp8-block",
    ),
    "one scale of 1": Fault(
        "scale-of-one", "warning", f"{DOWN}.input_scale", fill("0.mlp.down_proj.input_scale", 1.0)
    ),
    "uncalibrated cache": Fault(
        "kv-scale-uncalibrated", "warning", f"{BLOCK}.k_scale", fill(".k_scale", 1.0)
    ),
    "no weight scale": Fault(
        "weight-scale-missing", "error", f"{DOWN}.weight_scale", drop(f"{DOWN}.weight_scale")
    ),
    "no input scale": Fault(
        "input-scale-missing", "error", f"{DOWN}.input_scale", drop(f"{DOWN}.input_scale")
    ),
    "unpromised input scales": Fault(
        "input-scale-unpromised",
        "warning",
        f"{Q}.input_scale",
        lambda copy: copy.quantization.update(activation_scheme="dynamic"),
        "vllm-fp8",
    ),
    "differing input scales": Fault(
        "input-scales-differ", "warning", BLOCK, scaled(f"{Q}.input_scale", 2.0)
    ),
    "no scale of keys": Fault("kv-scale-missing", "error", f"{BLOCK}.k_scale", drop(K_SCALE)),
    "no promise of an FP8 cache": Fault(
        "kv-scale-unpromised",
        "warning",
        f"{BLOCK}.k_scale",
        lambda copy: copy.quantization.pop("kv_cache_scheme"),
    ),
    "keys clip": Fault("kv-scale-range", "warning", f"{BLOCK}.k_scale", scaled(K_SCALE, 1 / 300)),
    "keys underflow": Fault("kv-scale-range", "warning", f"{BLOCK}.k_scale", scaled(K_SCALE, 300)),
    "amax for scale": Fault(
        "kv-scale-range", "warning", f"{BLOCK}.k_scale", fill(".k_proj.k_scale", 30.0)
    ),
    "scales of no shape": Fault(
        "scale-shape",
        "error",
        f"{DOWN}.weight_scale",
        set_tensor(f"{DOWN}.weight_scale", torch.full((7,), 0.01)),
    ),
    "two input scales": Fault(
        "scale-shape",
        "error",
        f"{DOWN}.input_scale",
        set_tensor(f"{DOWN}.input_scale", torch.tensor([0.01, 0.02])),
    ),
    "empty scale": Fault(
        "scale-shape",
        "error",
        f"{DOWN}.weight_scale",
        set_tensor(f"{DOWN}.weight_scale", torch.ones(0)),
    ),
    "empty norm": Fault(
        "tensor-shape",
        "error",
        "model.norm.weight",
        set_tensor("model.norm.weight", torch.ones(0).bfloat16()),
    ),
    "empty weight": Fault(
        "tensor-shape",
        "error",
        f"{DOWN}.weight",
        set_tensor(f"{DOWN}.weight", torch.ones(0, 256).to(fp8.E4M3)),
    ),
    "scales of channels": Fault(
        "scale-granularity", "error", f"{DOWN}.weight_scale", repeat_scale, "compressed-tensors"
    ),
    "scale of no FP8 weight": Fault(
        "scale-orphan",
        "warning",
        f"{DOWN}.input_scale",
        leave_input_scale,
    ),
    "unknown scale": Fault(
        "scale-unknown",
        "warning",
        f"{Q}.output_scale",
        set_tensor(f"{Q}.output_scale", torch.tensor(0.1)),
    ),
    "NaN codes": Fault("nan-codes", "error", f"{DOWN}.weight", spoil_codes),
    "NaN": Fault("not-finite", "error", "model.norm.weight", spoil_norm(math.nan)),
    "infinity": Fault("not-finite", "error", "model.norm.weight", spoil_norm(-math.inf)),
    "zeros": Fault("weight-zero", "warning", f"{DOWN}.weight", zero),
    "narrow codes": Fault("codes-narrow", "warning", f"{DOWN}.weight", halve_codes),
    "narrow channels": Fault(
        "codes-narrow",
        "warning",
        f"{DOWN}.weight",
        lambda copy: halve_codes(copy, 5),
        kind="fp8-dynamic",
    ),
    "stale file": Fault(
        "file-stale",
        "warning",
        "model-00001-of-00002.safetensors",
        lambda copy: save_file(
            {"x": torch.ones(1)}, copy.path / "model-00001-of-00002.safetensors"
        ),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(name: str, editions: Editions, tmp_path: Path) -> None:
    fault = FAULTS[name]
    copy = Copy(editions.made(fault.format, fault.kind), tmp_path / "broken")
    fault.break_(copy)
    (finding,) = inspect(copy.save()).findings
    assert (finding.code, finding.severity.value) == (fault.code, fault.severity)
    assert finding.faults[0].place == fault.place
    assert finding.faults[0].found
    assert finding.expected
    assert finding.advice


def test_every_check_has_a_fault() -> None:
    from octavo.inspection.checks import CHECKS

    # Those two need other editions, below.
    elsewhere = {"blocks-partial", "index-incomplete"}
    assert {check.code for check in CHECKS} == {one.code for one in FAULTS.values()} | elsewhere
    assert len({check.code for check in CHECKS}) == len(CHECKS)


def test_partial_blocks(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path / "out", format="block-fp8", scheme=scheme_called("fp8-block"))
    (finding,) = inspect(tmp_path / "out").findings
    assert (finding.code, finding.severity.value) == ("blocks-partial", "warning")
    assert len(finding.faults) == 14


def test_an_index_that_forgets_a_tensor(editions: Editions, tmp_path: Path) -> None:
    path = tmp_path / "out"
    quantize(
        editions.source,
        path,
        calibration=Calibration(source=str(editions.ids)),
        shard_size=200_000,
    )
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    (finding,) = inspect(path).findings
    assert finding.code == "index-incomplete"
    assert [fault.place for fault in finding.faults] == ["model.norm.weight"]
    # What the index names and no shard has is refused at once.
    content["weight_map"]["nowhere"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(OctavoError, match=r"model\.safetensors\.index\.json says tensor"):
        inspect(path)


def test_counts_of_channels_and_of_repeated_scales(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt", "fp8-dynamic"), tmp_path / "channels")
    halve_codes(copy, 5)
    (fault,) = found(copy.save())["codes-narrow"].faults
    assert fault.found == "5 of 128 channels stay below 224"
    # One scale repeated for every channel is one scale: its smaller channels are no fault.
    whole = Copy(editions.made("modelopt"), tmp_path / "whole")
    repeated = {
        f"{name}_scale": whole.tensors[f"{name}_scale"].repeat(len(tensor))
        for name, tensor in whole.tensors.items()
        if tensor.dtype == fp8.E4M3
    }
    for name in repeated:
        copy.tensors[name.removesuffix("_scale")] = whole.tensors[name.removesuffix("_scale")]
        copy.tensors[name] = repeated[name]
    assert inspect(copy.save()).findings == ()


def test_a_weight_of_zeros_rightly_has_a_scale_of_one(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt"), tmp_path / "zeros")
    zero(copy)
    copy.fill("0.mlp.down_proj.weight_scale", 1.0)
    assert set(found(copy.save())) == {"weight-zero"}


def test_a_finding_has_all_its_places(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt"), tmp_path / "ones")
    copy.fill(".input_scale", 1.0)
    finding = found(copy.save())["scale-uncalibrated"]
    assert len(finding.faults) == 21
    lines = tell(finding.faults)
    assert lines[0] == "model.layers.{0-2}.self_attn.q_proj.input_scale: exactly 1"
    assert lines[-1] == "… and 3 more lines like these"


def test_names_are_folded_by_layer() -> None:
    layers = [f"model.layers.{number}.mlp" for number in (7, 0, 2, 1)]
    assert fold([*layers, "lm_head", "model.layers.3.self_attn"]) == [
        "lm_head",
        "model.layers.{0-2,7}.mlp",
        "model.layers.3.self_attn",
    ]


@pytest.mark.parametrize("tile", [(1, 300), (128, 128)], ids=["channel", "block"])
def test_codes_are_counted(tile: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.integers(256, size=(200, 300), dtype=np.uint8)
    matrix[:150] >>= 1
    counts, largest = codes.tally(torch.from_numpy(matrix), tile)
    assert counts.tolist() == np.bincount(matrix.reshape(-1), minlength=256).tolist()
    for row in range(largest.shape[0]):
        for column in range(largest.shape[1]):
            part = matrix[
                row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]
            ]
            assert largest[row, column] == (part & 0x7F).max()


def test_what_counts_tell() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512) * 0.02
    weight[0, :100] = 0
    quantized, error = fp8.quantize_and_measure(weight, fp8.scale_from_amax(weight.abs().max()))
    values = quantized.double().abs()
    counts = codes.tally(quantized.view(torch.uint8), (1, 512))[0].tolist()
    assert codes.largest_value(counts) == values.max() == 448
    assert codes.zero_count(counts) == (values == 0).sum()
    assert codes.subnormal_count(counts) == ((values > 0) & (values < 2**-6)).sum()
    assert codes.saturated_count(counts) == (values == 448).sum()
    assert codes.nan_count(counts) == 0
    for exponent, count in codes.by_exponent(counts):
        assert count == ((values >= 2.0**exponent) & (values < 2.0 ** (exponent + 1))).sum()
    expected = codes.expected_sqnr(counts)
    assert expected is not None
    assert expected == pytest.approx(error.sqnr_db, abs=0.5)
    assert codes.expected_sqnr([7] + 255 * [0]) is None


@pytest.mark.parametrize("elements", [1, 128 * 128, 1 << 30])
def test_strips_are_the_tensor(
    elements: int, editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a dialect cuts tensors into pieces, by rows or by columns."""
    monkeypatch.setattr(strips_module, "_STRIP_ELEMENTS", elements)
    for path in (editions.made("tensorrt-llm"), two_ranks(editions)):
        edition = Edition(Checkpoint(path))
        for name in edition:
            rows = [(first, strip) for first, strip in strips(edition, name)]
            assert all(first % 128 == 0 for first, _ in rows)
            joined = torch.cat([strip.reshape(-1) for _, strip in rows])
            expected = edition.read_unchecked(name)
            assert joined.dtype == expected.dtype
            assert torch.equal(joined.view(torch.uint8), expected.reshape(-1).view(torch.uint8)), (
                name
            )


@pytest.mark.parametrize(("format", "kind"), KINDS)
def test_strips_change_nothing(
    format: str, kind: str, editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = editions.made(format, kind)
    before = verify(path, reference=editions.source)
    monkeypatch.setattr(strips_module, "_STRIP_ELEMENTS", 1)
    after = verify(path, reference=editions.source)
    assert before.inspection == after.inspection
    for one, other in zip(levels(before).items(), levels(after).items(), strict=True):
        assert one == pytest.approx(other)


def two_ranks(editions: Editions) -> Path:
    from octavo import convert

    path = editions.root / "two-ranks"
    if not path.exists():
        convert(editions.made("modelopt", merge_scales=True), path, to="tensorrt-llm", tp=2)
    return path


def test_ranks_are_put_together(editions: Editions) -> None:
    report = inspect(two_ranks(editions))
    assert report.findings == ()
    assert report.files == ("rank0.safetensors", "rank1.safetensors")
    whole = inspect(editions.made("modelopt", merge_scales=True))
    assert report.linears == whole.linears
    assert report.sizes.parameters == whole.sizes.parameters
    with pytest.raises(OctavoError, match=r"q_proj\.weight, .*k_proj\.weight, .*Name one"):
        inspect_tensor(two_ranks(editions), "rank0/transformer.layers.0.attention.qkv.weight")


def levels(result: Verification) -> dict[str, float | None]:
    assert result.comparison is not None
    return {one.module: one.sqnr_db for one in result.comparison.weights}


@pytest.mark.parametrize(("format", "kind"), [pair for pair in KINDS if pair[0] != "tensorrt-llm"])
def test_sqnr_is_that_of_float64(format: str, kind: str, editions: Editions) -> None:
    path = editions.made(format, kind)
    result = verify(path, reference=editions.source)
    assert result.findings == ()
    assert result.ok
    assert result.comparison is not None
    # Two norms a layer, the last norm, the embedding and the head.
    assert result.comparison.equal == 9
    original = load_file(editions.source / "model.safetensors")
    ours = load_file(path / "model.safetensors")
    for module, level in levels(result).items():
        weight = original[f"{module}.weight"].double()
        scale = ours.get(f"{module}.weight_scale", ours.get(f"{module}.weight_scale_inv"))
        assert scale is not None
        spread = scale.double()
        if kind == "fp8-block":
            spread = spread.repeat_interleave(128, 0).repeat_interleave(128, 1)
        elif scale.numel() > 1:
            spread = spread.reshape(-1, 1)
        noise = (weight - ours[f"{module}.weight"].double() * spread).square().sum()
        expected = 10 * torch.log10(weight.square().sum() / noise)
        assert level == pytest.approx(expected.item(), abs=1e-4)


def test_the_reference_is_the_wrong_one(editions: Editions, tmp_path: Path) -> None:
    path = editions.made("modelopt")
    other = tiny.build("llama", tmp_path / "other", **SIZES)
    result = verify(path, reference=other)
    assert not result.ok
    assert "reference-mismatch" in {finding.code for finding in result.findings}
    with pytest.raises(OctavoError, match="is quantized itself"):
        verify(path, reference=path)


def test_another_tensor_than_the_reference_has(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt"), tmp_path / "changed")
    copy.tensors["model.norm.weight"][0] += 1
    copy.tensors["lm_head.weight"] = copy.tensors["lm_head.weight"].float()
    result = verify(copy.save(), reference=editions.source)
    (finding,) = result.findings
    assert finding.code == "reference-differs"
    assert dict(finding.faults) == {
        "model.norm.weight": "other numbers",
        "lm_head.weight": "float32, in the reference bfloat16",
    }


def test_a_scale_that_is_not_the_weights(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt"), tmp_path / "scale")
    copy.tensors[f"{DOWN}.weight_scale"] *= 2
    result = verify(copy.save(), reference=editions.source)
    (finding,) = result.findings
    assert (finding.code, finding.faults[0].place) == ("sqnr-low", DOWN)
    assert levels(result)[DOWN] == pytest.approx(0, abs=0.5)


def test_an_outlier_among_equals(editions: Editions, tmp_path: Path) -> None:
    """A weight rounded twice is a few dB worse than the same projection in other layers."""
    copy = Copy(editions.made("modelopt"), tmp_path / "outlier")
    weight, scale = copy.tensors[f"{DOWN}.weight"], copy.tensors[f"{DOWN}.weight_scale"]
    coarse = scale * 1.3
    copy.tensors[f"{DOWN}.weight"] = (weight.float() * scale / coarse).to(fp8.E4M3)
    copy.tensors[f"{DOWN}.weight_scale"] = coarse
    result = verify(copy.save(), reference=editions.source)
    (finding,) = result.findings
    assert (finding.code, finding.severity.value) == ("sqnr-outlier", "warning")
    assert [fault.place for fault in finding.faults] == [DOWN]
    assert result.ok
    assert result.comparison is not None
    row = next(one for one in result.comparison.projections if one.name == "down_proj")
    assert (row.count, row.worst, row.outliers) == (3, DOWN, (DOWN,))
    others = [levels(result)[f"model.layers.{layer}.mlp.down_proj"] for layer in range(3)]
    assert row.median_db == sorted(level for level in others if level is not None)[1]


def test_tied_weights_are_the_embedding(editions: Editions, tmp_path: Path) -> None:
    """A stored copy of a tied tensor is compared with what the reference ties it to."""
    source = tiny.build("llama", tmp_path / "source", tie_word_embeddings=True, **SIZES)
    quantize(source, tmp_path / "out", calibration=Calibration(source=str(editions.ids)))
    copy = Copy(tmp_path / "out", tmp_path / "copy")
    copy.tensors["lm_head.weight"] = copy.tensors["model.embed_tokens.weight"].clone()
    assert verify(copy.save(), reference=source).findings == ()
    copy.tensors["lm_head.weight"][0, 0] += 1
    codes_found = {one.code for one in verify(copy.save(), reference=source).findings}
    assert codes_found == {"tied-lost", "reference-differs"}


def test_the_engine_torch(editions: Editions, tmp_path: Path) -> None:
    path = editions.made("modelopt")
    result = verify(path, reference=editions.source, engine="transformers")
    assert result.findings == ()
    assert result.scores is not None
    assert (result.scores.engine, result.scores.text) == ("transformers", "builtin")
    assert result.scores.tokens == tiny.POSITIONS
    assert result.scores.nll is not None
    assert result.scores.reference_nll is not None
    assert result.scores.nll != result.scores.reference_nll
    assert result.scores.nll == pytest.approx(result.scores.reference_nll, abs=0.15)
    # An untrained model predicts worse than chance, which only the reference can excuse.
    assert {one.code for one in verify(path, engine="transformers").findings} == {"scores-chance"}
    copy = Copy(path, tmp_path / "refused")
    copy.drop(f"{Q}.weight_scale")
    refused = verify(copy.save(), engine="transformers")
    assert {one.code for one in refused.findings} == {"weight-scale-missing", "engine-refuses"}
    assert refused.scores is None


def test_the_engine_computes_nan(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt"), tmp_path / "nan")
    spoil_codes(copy)
    result = verify(copy.save(), engine="transformers")
    assert {one.code for one in result.findings} == {"nan-codes", "scores-not-finite"}


def test_the_engine_is_off_the_reference(editions: Editions, tmp_path: Path) -> None:
    """Codes and scale of every weight right, input scales hopeless: only running it tells."""
    copy = Copy(editions.made("modelopt"), tmp_path / "clipped")
    copy.fill(".input_scale", 1e-6)
    path = copy.save()
    assert verify(path, reference=editions.source).findings == ()
    (finding,) = verify(path, reference=editions.source, engine="transformers").findings
    assert finding.code == "scores-off"
    copy.tensors["lm_head.weight"] *= 4
    result = verify(copy.save(), reference=editions.source, engine="transformers")
    assert {one.code for one in result.findings} == {"reference-differs", "scores-wrong"}


def in_vllm(**changes: Any) -> LoadedModel:
    """What vLLM holds of the edition if it takes everything, but for ``changes`` of layer 0."""
    linear = LoadedLinear("", "float8_e4m3fn", "Fp8LinearMethod", "Kernel", True, True)
    fields = {key: value for key, value in changes.items() if key in LoadedLinear._fields}
    cache_fields = {key: value for key, value in changes.items() if key in LoadedCache._fields}
    names = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    return LoadedModel(
        "0.32.0",
        tuple(
            linear._replace(
                name=f"model.layers.{layer}.{name}", **({} if layer or name != names[0] else fields)
            )
            for layer in range(3)
            for name in names
        ),
        tuple(
            LoadedCache(f"model.layers.{layer}.self_attn", "fp8", 0.01, 0.02)._replace(
                **({} if layer else cache_fields)
            )
            for layer in range(3)
        ),
    )


@pytest.mark.parametrize(
    ("changes", "code", "places"),
    [
        ({}, None, []),
        # Held in BF16.
        ({"k_scale": 0.01 * (1 + 2**-9)}, None, []),
        (
            {"weight_dtype": "bfloat16"},
            "engine-weights",
            [f"{BLOCK}.{one}_proj" for one in ("q", "k", "v")],
        ),
        ({"rounds_inputs": False}, "engine-inputs", [f"{BLOCK}.qkv_proj"]),
        (
            {"static_inputs": False},
            "engine-input-scales",
            [f"{BLOCK}.{one}_proj" for one in ("q", "k", "v")],
        ),
        ({"dtype": "auto", "k_scale": 1.0, "v_scale": 1.0}, "engine-kv-cache", [BLOCK]),
        ({"v_scale": 1.0}, "engine-kv-scales", [f"{BLOCK}.v_scale"]),
    ],
    ids=str,
)
def test_what_vllm_does_not_take(
    changes: dict[str, Any], code: str | None, places: list[str], editions: Editions
) -> None:
    inspection = inspect(editions.made("modelopt"))
    scales = {
        f"model.layers.{layer}.self_attn.{kind}_scale": value
        for layer in range(3)
        for kind, value in (("k", 0.01), ("v", 0.02))
    }
    findings = run_checks(CHECKS, Ran("vllm", inspection, scales, loaded=in_vllm(**changes)))
    assert [finding.code for finding in findings] == ([] if code is None else [code])
    assert [fault.place for one in findings for fault in one.faults] == places


def test_a_tensor_in_detail(editions: Editions) -> None:
    path = editions.made("modelopt")
    stored = load_file(path / "model.safetensors")
    report = inspect_tensor(path, f"{Q}.weight")
    values = stored[f"{Q}.weight"].double()
    scale = stored[f"{Q}.weight_scale"].item()
    assert (report.dtype, report.shape) == ("float8_e4m3fn", (128, 128))
    assert report.files == ("model.safetensors",)
    assert report.amax == pytest.approx(values.abs().max().item() * scale)
    assert report.zeros == (values == 0).sum()
    assert sum(one.count for one in report.histogram) == values.numel()
    assert report.quantization is not None
    assert sum(report.quantization.counts) == values.numel()
    assert [one.name for one in report.scales] == [f"{Q}.weight_scale", f"{Q}.input_scale"]
    assert report.scales[0].range is not None
    assert report.scales[0].range.low == scale


def test_an_unquantized_tensor_in_detail(editions: Editions) -> None:
    report = inspect_tensor(editions.source, "lm_head.weight")
    values = load_file(editions.source / "model.safetensors")["lm_head.weight"].double()
    assert report.quantization is None
    assert report.amax == values.abs().max().item()
    bins = {one.label: one.count for one in report.histogram}
    assert sum(bins.values()) == values.numel()
    assert bins["2^-4"] == ((values.abs() >= 2**-4) & (values.abs() < 2**-3)).sum()


def test_stored_names_are_understood(editions: Editions) -> None:
    report = inspect_tensor(editions.made("modelopt"), K_SCALE)
    assert report.name == f"{BLOCK}.k_scale"
    assert report.stored == (K_SCALE,)
    with pytest.raises(OctavoError, match=r"no tensor .*Similar names: .*q_proj\.weight"):
        inspect_tensor(editions.made("modelopt"), "model.layers.0.attn.q_proj.weight")


def octavo_(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands(editions: Editions, tmp_path: Path) -> None:
    path = editions.made("modelopt")
    shown = octavo_("inspect", path)
    assert shown.exit_code == 0, shown.output
    assert "Nothing odd." in shown.stdout
    assert octavo_("verify", path, "-q").exit_code == 0
    against = octavo_("verify", path, "--reference", editions.source)
    assert against.exit_code == 0
    assert "down_proj" in against.stdout
    tensor = octavo_("inspect", path, "--tensor", f"{Q}.weight")
    assert "SQNR expected of rounding" in tensor.stdout
    copy = Copy(path, tmp_path / "broken")
    copy.fill(".input_scale", 0.0)
    broken = copy.save()
    # To look is no failure; to verify is.
    assert octavo_("inspect", broken).exit_code == 0
    failed = octavo_("verify", broken)
    assert failed.exit_code == 1
    assert "scale-invalid, 21 places" in failed.stdout
    assert "1 error" in failed.stdout


def test_commands_as_json(editions: Editions) -> None:
    path = editions.made("compressed-tensors", "fp8-dynamic")
    shown = json.loads(octavo_("inspect", path, "--json").stdout)
    assert shown == as_json(inspect(path))
    assert shown["scheme"]["weights"] == "channel"
    assert len(shown["linears"]) == 22
    checked = json.loads(octavo_("verify", path, "--reference", editions.source, "--json").stdout)
    assert checked["ok"] is True
    assert len(checked["comparison"]["weights"]) == 21
    tensor = json.loads(octavo_("inspect", path, "--tensor", f"{Q}.weight", "--json").stdout)
    assert sum(tensor["quantization"]["counts"]) == 128 * 128


def broken_json(editions: Editions, tmp_path: Path) -> Iterator[tuple[object, ...]]:
    path = editions.made("modelopt")
    yield "inspect", tmp_path / "nowhere"
    yield "inspect", path, "--tensor", "nowhere"
    yield "verify", tmp_path / "nowhere"
    yield "verify", path, "--engine", "abacus"
    yield "verify", path, "--reference", path
    yield "verify", path, "--reference", tmp_path / "nowhere"
    yield "verify", path, "--engine", "vllm"


def test_a_users_mistake_exits_with_2(
    editions: Editions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.engines.find_spec", lambda name: None)
    for arguments in broken_json(editions, tmp_path):
        result = octavo_(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")


def test_values_that_json_has_no_word_for(editions: Editions, tmp_path: Path) -> None:
    copy = Copy(editions.made("modelopt"), tmp_path / "nan")
    copy.fill(".weight_scale", math.nan)
    spoil_codes(copy)
    result = verify(copy.save(), reference=editions.source)
    json.loads(json.dumps(as_json(result), allow_nan=False))
    assert {one.code for one in result.findings} == {"scale-invalid", "nan-codes", "sqnr-low"}


def test_memory_does_not_grow_with_the_tensor(
    editions: Editions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of a tensor is asked for at once than a strip."""
    monkeypatch.setattr(strips_module, "_STRIP_ELEMENTS", 128)
    asked: list[int] = []
    read_bytes = Checkpoint.read_bytes

    def watched(self: Checkpoint, name: str, offset: int, target: Tensor) -> None:
        asked.append(target.numel())
        read_bytes(self, name, offset, target)

    monkeypatch.setattr(Checkpoint, "read_bytes", watched)
    edition = Edition(Checkpoint(editions.made("modelopt")))
    survey.take_survey(edition)
    # 128 rows of BF16; the largest matrix has 256.
    assert max(asked) == 128 * 128 * 2
