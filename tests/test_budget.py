"""Editions within a budget: what is chosen against brute force, what is promised against a measurement of its own."""

from __future__ import annotations

import json
import math
import re
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from octavo import Budget, Calibration, OctavoError, evaluate, quantize_within
from octavo.budget import Choice, Part, budget_of, cheapest
from octavo.cli import app
from octavo.evaluation import DivergenceResult
from octavo.scheme import scheme_called
from spoiling import edit_tensors

SEQ_LEN, WINDOWS = 32, 8


losses = st.tuples(st.floats(0, 1), st.none() | st.floats(0, 1), st.integers(0, 1000))
given_parts = st.lists(losses, max_size=6).map(
    lambda found: [
        Part((f"{n}",), size, kl, by_token) for n, (kl, by_token, size) in enumerate(found)
    ]
)


def loss_of(part: Part, how: str) -> float:
    """What a part costs, in the one place that says so for these tests."""
    by_token = math.inf if part.dynamic_kl is None else part.dynamic_kl
    return {"static": part.kl, "dynamic": by_token, "kept": 0.0}[how]


@given(given_parts, st.floats(-0.1, 4))
def test_the_choice_is_enough_and_nearly_the_cheapest(parts: list[Part], allowed: float) -> None:
    found = cheapest(parts, allowed)
    ways = [
        "kept" if part in found.kept else "dynamic" if part in found.moved else "static"
        for part in parts
    ]
    total = sum(map(loss_of, parts, ways))
    assert total == pytest.approx(found.left(parts))
    assert total <= allowed + 1e-9 or len(found.kept) == len(parts)
    enough = [
        [part for part, how in zip(parts, every, strict=True) if how == "kept"]
        for every in product(("static", "dynamic", "kept"), repeat=len(parts))
        if sum(map(loss_of, parts, every)) <= allowed - 1e-9
    ]
    if not enough:
        return
    # The bytes are those of the best of all choices, or those of a part more.
    least = min(sum(part.bytes for part in kept) for kept in enough)
    assert found.bytes <= least + max((part.bytes for part in parts), default=0)
    # Beside what is kept, fewer moved would not do.
    others = [part for part in parts if part not in found.kept]
    fewest = min(
        (
            every.count("dynamic")
            for every in product(("static", "dynamic"), repeat=len(others))
            if sum(map(loss_of, others, every)) <= allowed - 1e-9
        ),
        default=len(others),
    )
    assert len(found.moved) <= fewest


def test_moving_costs_no_bytes_and_comes_first() -> None:
    parts = [Part(("a",), 10, 0.5, 0.2), Part(("b",), 1, 0.5, 0.1), Part(("c",), 10, 0.1, 0.2)]
    assert cheapest(parts, 2.0) == Choice()
    assert cheapest(parts, 0.7) == Choice(moved=(parts[1],))
    assert cheapest(parts, 0.4) == Choice(moved=(parts[0], parts[1]))
    assert cheapest(parts, 0.39) == Choice(kept=(parts[1],), moved=(parts[0],))
    # What costs more with dynamic inputs is never moved, what is kept neither.
    assert cheapest(parts, -1.0) == Choice(kept=tuple(parts))


@pytest.mark.parametrize(
    ("max_kl", "increase", "fault"),
    [
        (None, None, "one of max_kl and max_perplexity_increase is needed"),
        (0.1, "1%", "and not both"),
        (-0.1, None, "greater than 0"),
        (math.inf, None, "finite number"),
        (None, "0.01", "in per cent"),
        (None, "much%", "could not convert"),
    ],
)
def test_what_is_no_budget_is_refused(
    max_kl: float | None, increase: str | None, fault: str
) -> None:
    with pytest.raises(OctavoError, match=fault):
        budget_of(max_kl, increase, "builtin")


def test_a_budget_as_it_is_typed() -> None:
    assert budget_of(None, "1.5%", "x.txt").limit == pytest.approx(0.015)
    assert budget_of(0.02, None, "x.txt").limit == 0.02


class Case(NamedTuple):
    """A model, its calibration, a text for budgets, and what everything quantized loses on its second half."""

    model: Path
    calibration: Calibration
    text: Path
    half: Path
    loss: float

    def budget(self, **limit: float) -> Budget:
        return Budget(data=str(self.text), seq_len=SEQ_LEN, windows=WINDOWS, **limit)

    def measure(self, edition: Path) -> DivergenceResult:
        found = evaluate(
            edition, task="kl", data=self.half, reference=self.model, seq_len=SEQ_LEN, limit=WINDOWS
        )
        assert isinstance(found, DivergenceResult)
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("budget")
    model = tiny.build("llama", directory / "model", layers=3)
    samples = tiny.save_ids(directory / "samples.npy", samples=8, seq_len=SEQ_LEN)
    text = tiny.save_ids(directory / "text.npy", samples=40, seq_len=SEQ_LEN, seed=1)
    half = directory / "half.npy"
    np.save(half, np.load(text).reshape(-1)[20 * SEQ_LEN :])
    case = Case(model, Calibration(source=str(samples)), text, half, 0.0)
    made = quantize_within(
        model, directory / "all", case.budget(max_kl=1.0), calibration=case.calibration
    )
    assert not made.record.kept
    assert made.record.tries == 1
    return case._replace(loss=made.record.kl)


def test_an_edition_keeps_its_budget(case: Case, tmp_path: Path) -> None:
    steps: list[str] = []
    made = quantize_within(
        case.model,
        tmp_path / "out",
        case.budget(max_kl=0.6 * case.loss),
        calibration=case.calibration,
        on_step=steps.append,
    )
    found = case.measure(tmp_path / "out")
    assert found.kl == pytest.approx(made.record.kl)
    assert found.kl <= 0.6 * case.loss
    # Not all was kept, and what was is what the record and the edition say.
    kept = made.record.kept
    assert 0 < len(kept) < 3 * 7
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.removesuffix(".weight_scale") for name in stored if "weight_scale" in name} == {
        name.removesuffix(".weight")
        for name in stored
        if "_proj" in name and name.endswith(".weight") and name.removesuffix(".weight") not in kept
    }
    account = json.loads((tmp_path / "out" / "octavo.json").read_text())
    assert account["budget"] == made.record.model_dump(mode="json")
    assert set(kept) <= set(account["scheme"]["exclude"])
    assert made.record.bytes > 0
    assert "measuring what each part costs" in steps
    # What engines fuse is kept together.
    for layer in range(3):
        group = {f"model.layers.{layer}.self_attn.{kind}_proj" for kind in "qkv"}
        assert len(group & set(kept)) in (0, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def outlying_tokens(directory: Path) -> Path:
    """A model four of whose tokens have inputs of the first layer, in a channel without weights, that are 10⁵ times as large
    as others': one scale for all tokens leaves little of the others."""
    model = tiny.build("llama", directory, layers=3)

    def enlarge(tensors: dict[str, Any]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        embedding[:, 0] = 0
        embedding[:4, 0] = 50
        tensors["model.layers.0.input_layernorm.weight"][0] = 3e4
        for one in "qkv":
            tensors[f"model.layers.0.self_attn.{one}_proj.weight"][:, 0] = 0

    edit_tensors(model, enlarge)
    return model


@pytest.mark.parametrize("format", ["quark", "compressed-tensors"])
def test_inputs_are_moved_before_anything_is_kept(format: str, case: Case, tmp_path: Path) -> None:
    scheme = scheme_called("fp8", kv_cache="none")
    model = outlying_tokens(tmp_path / "model")
    steps: list[str] = []

    def made(name: str, limit: float, format: str) -> Any:
        return quantize_within(
            model,
            tmp_path / name,
            case.budget(max_kl=limit),
            calibration=case.calibration,
            scheme=scheme,
            format=format,
            on_step=steps.append,
        ).record

    everything = made("all", 1.0, format).kl
    moved = made("moved", 0.7 * everything, format)
    assert (moved.kept, moved.bytes) == ((), 0)
    assert {f"model.layers.0.self_attn.{one}_proj" for one in "qkv"} <= set(moved.dynamic)
    found = case._replace(model=model).measure(tmp_path / "moved")
    assert found.kl == pytest.approx(moved.kl)
    assert moved.kl <= 0.7 * everything
    assert any(re.search(r"all linear layers; \d+ with dynamic inputs", one) for one in steps)
    # The edition is what the record says.
    stored = load_file(tmp_path / "moved" / "model.safetensors")
    quantized = {name.removesuffix(".weight_scale") for name in stored if "weight_scale" in name}
    static = {name.removesuffix(".input_scale") for name in stored if "input_scale" in name}
    assert quantized - static == set(moved.dynamic)
    account = json.loads((tmp_path / "moved" / "octavo.json").read_text())
    assert account["budget"] == moved.model_dump(mode="json")
    assert account["scheme"]["dynamic"] == list(moved.dynamic)
    # A dialect that cannot move them keeps some for the same loss.
    alone = made("alone", 0.7 * everything, "modelopt")
    assert alone.bytes > 0
    assert not alone.dynamic
    # Where moving does not suffice, some are kept beside those that are moved.
    both = made("both", 0.5 * moved.kl, format)
    assert both.kept
    assert both.dynamic
    assert not set(both.kept) & set(both.dynamic)


def test_perplexity_can_be_limited(case: Case, tmp_path: Path) -> None:
    made = quantize_within(
        case.model,
        tmp_path / "out",
        case.budget(max_perplexity_increase=0.5),
        calibration=case.calibration,
        scheme=scheme_called("fp8", kv_cache="none"),
    )
    assert case.measure(tmp_path / "out").perplexity_ratio == pytest.approx(
        made.record.perplexity_ratio
    )
    assert made.record.perplexity_ratio <= 1.5


def test_what_cannot_be_reached_is_refused_with_the_best(case: Case, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"still [0-9.e-]+ nats/token.*--kv-cache none"):
        quantize_within(
            case.model,
            tmp_path / "out",
            case.budget(max_kl=1e-9),
            calibration=case.calibration,
        )
    assert not list(tmp_path.iterdir())


def test_the_calibration_text_is_no_budget_text(case: Case, tmp_path: Path) -> None:
    budget = Budget(max_kl=1.0, data=case.calibration.source, seq_len=SEQ_LEN)
    with pytest.raises(OctavoError, match="is what scales are calibrated on"):
        quantize_within(case.model, tmp_path / "out", budget, calibration=case.calibration)


@pytest.mark.parametrize(
    "option", [["--resume"], ["--max-memory", "3GiB"], ["--workers", "2"]], ids=lambda one: one[0]
)
def test_options_that_do_not_go_with_it(case: Case, option: list[str], tmp_path: Path) -> None:
    arguments: list[Any] = ["quantize", case.model, "-o", tmp_path / "out", "--max-kl", "1"]
    result = CliRunner().invoke(app, [*map(str, arguments), *option])
    assert result.exit_code == 2
    assert f"{option[0]} cannot go with --max-kl" in " ".join(result.stderr.split())


def test_the_command_tells_what_it_kept(case: Case, tmp_path: Path) -> None:
    tiny.save_tokenizer(case.model)
    arguments: list[Any] = ["quantize", case.model, "-o", tmp_path / "out", "--max-kl", "1"]
    arguments += ["--calib", case.calibration.source, "--kv-cache", "none"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    assert "kept for it" in result.stdout
    assert "nothing" in result.stdout
    assert "KL divergence: " in result.stderr
    assert "× 128 tokens" in result.stdout


def test_the_command_tells_what_it_moved(case: Case, tmp_path: Path) -> None:
    model = tiny.save_tokenizer(outlying_tokens(tmp_path / "model"))
    arguments: list[Any] = ["quantize", model, "-o", tmp_path / "out", "--format", "quark"]
    arguments += ["--calib", case.calibration.source, "--budget-data", case.text]
    arguments += ["--kv-cache", "none", "--max-kl"]
    result = CliRunner().invoke(app, [*map(str, arguments), "10"])
    everything = re.search(r"KL, nats/token[ │]+([0-9.]+)", result.stdout)
    assert everything is not None, result.output
    assert "dynamic inputs for it" not in result.stdout
    limit = f"{0.7 * float(everything[1])}"
    result = CliRunner().invoke(app, [*map(str, arguments), limit, "--overwrite"])
    assert result.exit_code == 0, result.stderr
    assert re.search(r"kept for it[ │]+nothing", result.stdout)
    assert re.search(r"dynamic inputs for it[ │]+\d+ linear layers", result.stdout)


def test_a_window_that_is_too_long_is_refused_at_the_start(case: Case, tmp_path: Path) -> None:
    steps: list[str] = []
    budget = Budget(max_kl=1.0, data=str(case.text), seq_len=256)
    with pytest.raises(OctavoError, match="longer than the model's 128 positions"):
        quantize_within(case.model, tmp_path / "out", budget, on_step=steps.append)
    assert not steps
