"""What ``octavo analyze`` finds, against plain ``transformers`` models in which only one part is rounded."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import tiny
from octavo import Calibration, OctavoError, Scheme, analyze, quantize
from octavo.analysis import KV_CACHE, LAYER, Measured, all_units, linear_losses, measure
from octavo.analysis.analyzing import _settings
from octavo.checkpoint import Checkpoint
from octavo.cli import app
from octavo.job import Job, open_job
from octavo.reporting.analysis import Analysis, UnitLoss
from octavo.reporting.analysis_page import analysis_page
from octavo.scheme import scheme_called
from reference import fake_quantized, rounded, whole

SEQ_LEN, WINDOWS = 32, 4
UNITS = ("q/k/v", "o", "gate/up", "down")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Calibration, Path]:
    """Token ids to calibrate on, and others to measure on: just the windows asked for."""
    samples = tiny.save_ids(tmp_path / "samples.npy", samples=8, seq_len=SEQ_LEN)
    windows = tiny.save_ids(tmp_path / "windows.npy", samples=WINDOWS, seq_len=SEQ_LEN, seed=1)
    return Calibration(source=str(samples)), windows


def analyzed(
    model: Path, output: Path, texts: tuple[Calibration, Path], **options: Any
) -> Analysis:
    given = {"windows": WINDOWS, "seq_len": SEQ_LEN, "device": "cpu", **options}
    return analyze(model, output, calibration=texts[0], data=texts[1], **given)


def part_of(edition: dict[str, Tensor], loss: UnitLoss | None) -> dict[str, Tensor]:
    """The tensors that round what a unit is; those of everything for None."""
    if loss is None:
        return edition
    scales = (".k_scale", ".v_scale")
    cached = loss.unit in (KV_CACHE, LAYER)
    layer = f"model.layers.{loss.layer}."
    return {
        name: tensor
        for name, tensor in edition.items()
        if (name.endswith(scales) and cached and name.startswith(layer))
        or (not name.endswith(scales) and name.rpartition(".")[0] in loss.modules)
    }


def distance(model: Path, edition: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """KL of the model in float32 and of the one in which what ``edition`` holds is rounded, by window."""
    auto: Any = AutoModelForCausalLM
    original = auto.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        p, q = (
            one(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
            for one in (original, fake_quantized(model, edition))
        )
    kl: Tensor = (p.exp() * (p - q)).sum(-1).mean(-1)
    return kl


@pytest.mark.parametrize(
    ("kind", "scheme", "format", "dtype", "options"),
    [
        ("llama", "fp8", "modelopt", torch.bfloat16, {}),
        ("llama", "fp8", "modelopt", torch.float32, {"tie_word_embeddings": True}),
        ("qwen2", "fp8-channel-static", "compressed-tensors", torch.bfloat16, {}),
        ("qwen3", "fp8-dynamic", "modelopt", torch.bfloat16, {}),
        ("mistral", "fp8-block", "compressed-tensors", torch.float16, {"sliding_window": 8}),
    ],
)
def test_each_unit_costs_what_it_costs_alone(
    kind: str,
    scheme: str,
    format: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    tmp_path: Path,
    texts: tuple[Calibration, Path],
) -> None:
    model = tiny.build(kind, tmp_path / "model", layers=3, dtype=dtype, **options)
    # The compressed-tensors dialect has other names for the cache's scales.
    cache: Any = "fp8" if scheme == "fp8" else "none"
    chosen = scheme_called(scheme, kv_cache=cache)
    found = analyzed(model, tmp_path / "analysis", texts, scheme=chosen)
    quantize(model, tmp_path / "out", scheme=chosen, calibration=texts[0], format=format)
    checkpoint = Checkpoint(tmp_path / "out")
    edition = {name: checkpoint.read(name) for name in checkpoint}
    tokens = torch.from_numpy(np.load(texts[1]))[:, :-1]
    expected_units = (*UNITS, KV_CACHE) if cache == "fp8" else UNITS
    assert [(unit.layer, unit.unit) for unit in found.units] == [
        (layer, name) for layer in range(3) for name in expected_units
    ]
    assert [(unit.layer, unit.unit) for unit in found.layers] == [(n, LAYER) for n in range(3)]
    for loss in (*found.units, *found.layers, None):
        windows = distance(model, part_of(edition, loss), tokens)
        result = loss or found.everything
        # Float32 on both sides: other orders of sums, and now and then a value on the edge between two codes.
        assert result.kl == pytest.approx(windows.mean().item(), rel=0.01), loss
        error = windows.std().item() / WINDOWS**0.5
        assert result.kl_standard_error == pytest.approx(error, rel=0.02), loss
        assert result.kl > 1e-6


@pytest.mark.parametrize("kv_cache", ["fp8", "none"])
def test_what_dynamic_inputs_cost_in_the_place_of_static_ones(
    kv_cache: Any, tmp_path: Path, texts: tuple[Calibration, Path]
) -> None:
    model = tiny.build("llama", tmp_path / "model", layers=3)
    # Those of one unit are dynamic anyway, another is left as it is.
    options: Any = {"dynamic": ("*.1.mlp.down_proj",), "exclude": ("*.0.self_attn.o_proj",)}
    scheme = scheme_called("fp8", kv_cache=kv_cache, **options)
    given: Any = {"windows": WINDOWS, "seq_len": SEQ_LEN, "device": "cpu", "data": texts[1]}
    (tmp_path / "work").mkdir()
    found, plain = (
        linear_losses(
            model,
            tmp_path / "work",
            tmp_path,
            scheme=scheme,
            dynamic=dynamic,
            calibration=texts[0],
            **given,
        )
        for dynamic in (True, False)
    )
    assert all(one.dynamic is None for one in plain)
    # What else is measured changes nothing.
    assert [one.loss for one in found] == [one.loss for one in plain]
    out = tmp_path / "out"
    quantize(model, out, scheme=scheme, calibration=texts[0], format="compressed-tensors")
    checkpoint = Checkpoint(out)
    edition = {name: checkpoint.read(name) for name in checkpoint}
    edition |= {name: one.reshape(()) for name, one in edition.items() if one.numel() == 1}
    tokens = torch.from_numpy(np.load(texts[1]))[:, :-1]
    assert len(found) == 3 * 4 - 1
    for loss, dynamic in found:
        part = part_of(edition, loss)
        assert loss.kl == pytest.approx(distance(model, part, tokens).mean().item(), rel=0.01)
        if loss.modules == ("model.layers.1.mlp.down_proj",):
            assert dynamic is None
            continue
        assert dynamic is not None
        assert (dynamic.layer, dynamic.modules, dynamic.bytes) == (
            loss.layer,
            loss.modules,
            loss.bytes,
        )
        moved = {name: one for name, one in part.items() if not name.endswith("input_scale")}
        expected = distance(model, moved, tokens).mean().item()
        assert dynamic.kl == pytest.approx(expected, rel=0.01)
        assert dynamic.kl != loss.kl


def test_errors_of_inputs_are_those_of_float64(
    tmp_path: Path, tiny_llama: Path, texts: tuple[Calibration, Path]
) -> None:
    found = analyzed(tiny_llama, tmp_path / "analysis", texts)
    samples = torch.from_numpy(np.load(texts[0].source))
    tokens = torch.from_numpy(np.load(texts[1]))[:, :-1]
    maxima = whole(tiny_llama, samples)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    seen: dict[str, Tensor] = {}
    for name in found.linears:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]}))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    for name, error in found.linears.items():
        exact, amax = seen[name].double(), torch.tensor(maxima[name])
        left = rounded(seen[name], amax / 448).double()
        sqnr = 10 * torch.log10(exact.square().sum() / (exact - left).square().sum()).item()
        assert error.input.sqnr_db == pytest.approx(sqnr, abs=0.05), name
        underflow = ((left == 0) & (exact != 0)).double().mean().item()
        assert error.input.underflow == pytest.approx(underflow, abs=1e-3)
        clipped = (exact.abs() > amax.double()).double().mean().item()
        assert error.input.clipped == pytest.approx(clipped, abs=1e-3)
    assert any(error.input.clipped for error in found.linears.values())


def test_errors_of_weights_are_those_of_the_edition(
    tmp_path: Path, tiny_llama: Path, texts: tuple[Calibration, Path]
) -> None:
    found = analyzed(tiny_llama, tmp_path / "analysis", texts)
    quantize(tiny_llama, tmp_path / "out", calibration=texts[0])
    record = json.loads((tmp_path / "out" / "octavo.json").read_text())["weights"]
    assert {name: error.weight.model_dump() for name, error in found.linears.items()} == record


def test_bytes_are_what_exclusion_adds(
    tmp_path: Path, tiny_llama: Path, texts: tuple[Calibration, Path]
) -> None:
    found = analyzed(tiny_llama, tmp_path / "analysis", texts)
    sizes = []
    for number, exclude in enumerate(((), ("*.layers.1.mlp.gate_proj", "*.layers.1.mlp.up_proj"))):
        out = tmp_path / f"out-{number}"
        sizes.append(
            quantize(
                tiny_llama, out, scheme=Scheme(exclude=exclude), calibration=texts[0]
            ).bytes_after
        )
    unit = next(unit for unit in found.units if (unit.layer, unit.unit) == (1, "gate/up"))
    assert unit.bytes == sizes[1] - sizes[0]
    parts = [one for one in found.units if one.layer == 1]
    assert found.layers[1].bytes == sum(one.bytes for one in parts)
    cache = next(one for one in parts if one.unit == KV_CACHE)
    # Keys and values of two heads of 16, a byte more each.
    assert (cache.bytes, cache.cache_bytes_per_token) == (0, 2 * 2 * 16)


def test_what_is_excluded_is_in_no_unit(
    tmp_path: Path, tiny_llama: Path, texts: tuple[Calibration, Path]
) -> None:
    scheme = scheme_called("fp8", kv_cache="none", exclude=("*.layers.0.*", "*.v_proj", "*.o_proj"))
    found = analyzed(tiny_llama, tmp_path / "analysis", texts, scheme=scheme)
    assert [(one.layer, one.unit) for one in found.units] == [
        (1, "q/k/v"),
        (1, "gate/up"),
        (1, "down"),
    ]
    block = "model.layers.1.self_attn"
    assert found.units[0].modules == (f"{block}.q_proj", f"{block}.k_proj")
    assert len(found.layers) == 1
    # The only layer there is: everything.
    assert found.layers[0].kl == found.everything.kl
    assert set(found.linears) == {name for one in found.units for name in one.modules}


def measured(job: Job, texts: tuple[Calibration, Path], directory: Path) -> Measured:
    samples, tokens = (torch.from_numpy(np.load(path)) for path in (texts[0].source, texts[1]))
    directory.mkdir()
    units, settings = all_units(job), _settings(job, samples)
    return measure(job, units, samples, tokens, settings, directory, directory / "target")


def test_nothing_quantized_costs_nothing(
    tmp_path: Path, tiny_llama: Path, texts: tuple[Calibration, Path]
) -> None:
    job = open_job(
        tiny_llama, scheme_called("fp8", kv_cache="none"), "modelopt", torch.device("cpu")
    )
    plans = [plan._replace(linears=(), kept=plan.linears) for plan in job.plans]
    found = measured(job._replace(plans=plans), texts, tmp_path / "work")
    assert not found.units
    assert not found.everything.any()


def test_each_layer_is_read_once_and_threads_change_nothing(
    tmp_path: Path,
    tiny_llama: Path,
    texts: tuple[Calibration, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, buffer: Tensor | None = None) -> Tensor:
        reads[name] += 1
        return read(self, name, buffer)

    monkeypatch.setattr(Checkpoint, "read", counted)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            job = open_job(tiny_llama, Scheme(), "modelopt", torch.device("cpu"))
            found.append(measured(job, texts, tmp_path / f"work-{threads}"))
    finally:
        torch.set_num_threads(before)
    layers = {name: count for name, count in reads.items() if ".layers." in name}
    assert len(layers) == 2 * 9
    assert set(layers.values()) == {2}  # once in each of two runs
    assert torch.equal(found[0].kl, found[1].kl)
    assert found[0].inputs == found[1].inputs
    # Hidden states of all slots in one file, whatever the layers: two, and six for each layer.
    size = (tmp_path / "work-1" / "variants").stat().st_size
    assert size == (2 + 2 * 6) * WINDOWS * SEQ_LEN * 64 * 4


def test_windows_come_from_all_over_the_text(tmp_path: Path, tiny_llama: Path) -> None:
    calibration = Calibration(source=str(tiny.save_ids(tmp_path / "ids.npy", seq_len=16)))
    other = tmp_path / "other.npy"
    np.save(other, np.arange(1000) % tiny.VOCAB_SIZE)
    found = analyze(
        tiny_llama, tmp_path / "one", calibration=calibration, data=other, windows=500, seq_len=100
    )
    assert found.text.model_dump() == {"data": "other.npy", "windows": 10, "seq_len": 100}
    assert "gave 10 windows of 100 tokens, 500 were asked for" in found.warnings[0]
    same = analyze(
        tiny_llama,
        tmp_path / "two",
        calibration=calibration,
        data=calibration.source,
        windows=1,
        seq_len=16,
    )
    assert "is the calibration text too" in same.warnings[0]
    assert same.everything.kl_standard_error is None


class Tags(HTMLParser):
    """Every tag is closed, in order; no script, nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        assert not any(name == "src" for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(page: str) -> Counter[str]:
    parser = Tags()
    parser.feed(page)
    assert not parser.open
    return parser.seen


def octavo(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(tmp_path: Path, tiny_llama: Path, texts: tuple[Calibration, Path]) -> None:
    out = tmp_path / "analysis"
    command = ("analyze", tiny_llama, "-o", out, "--calib", texts[0].source, "--data", texts[1])
    result = octavo(*command, "--seq-len", SEQ_LEN)
    assert result.exit_code == 0, result.output
    assert "12 parts, each quantized alone" in result.stderr
    assert "everything quantized" in result.stdout
    assert "sum of 10 units" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["analysis.html", "analysis.json"]
    text = (out / "analysis.json").read_text()
    found = Analysis.model_validate_json(text)
    assert found.version == 1
    assert str(tmp_path) not in text
    largest = found.costliest[0]
    assert f"layer {largest.layer} {largest.unit}" in result.stdout
    page = (out / "analysis.html").read_text()
    assert tags(page)["script"] == 0
    assert tags(page)["figure"] == 3
    assert page == analysis_page(found)

    before = tiny.contents(out)
    refused = octavo(*command, "--seq-len", SEQ_LEN)
    assert refused.exit_code == 2
    assert "already exists" in refused.stderr
    assert tiny.contents(out) == before
    again = octavo(*command, "--seq-len", SEQ_LEN, "--overwrite", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(text)
    # Equal runs give equal bytes.
    assert tiny.contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "analysis",
        "samples.npy",
        "windows.npy",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--exclude", "*"), "leaves no linear layer"),
        (("--seq-len", "64"), "holds sequences of 32 tokens, --seq-len asks for 64"),
        (("--scheme", "int4"), "Unknown scheme"),
        (("--device", "tpu"), "Unknown device"),
    ],
)
def test_mistakes_leave_nothing(
    options: tuple[str, str],
    message: str,
    tmp_path: Path,
    tiny_llama: Path,
    texts: tuple[Calibration, Path],
) -> None:
    given = {"--calib": texts[0].source, "--data": str(texts[1])} | {options[0]: options[1]}
    flat = [part for pair in given.items() for part in pair]
    result = octavo("analyze", tiny_llama, "-o", tmp_path / "made" / "analysis", *flat)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "made").exists()


def test_a_damaged_head_is_named(
    tmp_path: Path, texts: tuple[Calibration, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama", tmp_path / "model")
    rows = Checkpoint.read_rows

    def damaged(self: Checkpoint, name: str, wanted: Any) -> Tensor:
        found = rows(self, name, wanted)
        return found.fill_(torch.nan) if name == "lm_head.weight" else found

    monkeypatch.setattr(Checkpoint, "read_rows", damaged)
    with pytest.raises(OctavoError, match=r"'lm_head.weight' of the input holds NaN"):
        analyzed(model, tmp_path / "analysis", texts)
    assert not (tmp_path / "analysis").exists()
