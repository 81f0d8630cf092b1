"""The commands of the evidence: eval, generate, report, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import tiny
from octavo import Calibration, complete, quantize
from octavo.cli import app

TEMPLATE = "{% for message in messages %}{{ message.role[0] + message.content + ';' }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint with a tokenizer, and its edition."""
    directory = tmp_path_factory.mktemp("models")
    base = tiny.save_tokenizer(tiny.build("llama", directory / "base"))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    ids = tiny.save_ids(directory / "ids.npy", samples=8, seq_len=32)
    quantize(base, directory / "edition", calibration=Calibration(source=str(ids)))
    return base, directory / "edition"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals of evaluations go where nothing else is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {number} of a text\n" for number in range(60)))
    return path


def octavo(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def json_of(*arguments: object) -> Any:
    result = octavo(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_perplexity(models: tuple[Path, Path], text: Path) -> None:
    options = ("--task", "perplexity", "--data", text, "--seq-len", 64)
    found = json_of("eval", models[1], *options, "--limit", 5)
    assert found["windows"] == 5
    assert found["tokens"] == 5 * 63
    assert found["perplexity"] == pytest.approx(np.exp(found["nll"]))
    table = octavo("eval", models[1], *options)
    assert f"{found['seq_len']}" in table.stdout
    assert "±" in table.stdout


def test_divergence(models: tuple[Path, Path], text: Path) -> None:
    base, edition = models
    options = ("--task", "kl", "--data", text, "--seq-len", 64, "--reference", base)
    found = json_of("eval", edition, *options)
    assert 0 < found["kl"] < 1
    assert 0 < found["top1_agreement"] <= 1
    assert json_of("eval", base, *options)["kl"] == pytest.approx(0, abs=1e-6)
    assert "nats/token" in octavo("eval", edition, *options).stdout


def test_builtin_data_needs_nothing(models: tuple[Path, Path]) -> None:
    options = ("--task", "perplexity", "--data", "builtin", "--seq-len", 32, "--limit", 3)
    assert json_of("eval", models[0], *options)["windows"] == 3


@pytest.mark.parametrize("engine", ["torch", "transformers"])
def test_generate(engine: str, models: tuple[Path, Path]) -> None:
    options = ("--max-tokens", 5, "--engine", engine)
    result = octavo("generate", models[1], "Once", *options)
    assert result.exit_code == 0, result.output
    pieces: list[str] = []
    text = complete(models[1], "Once", max_tokens=5, engine=engine, on_text=pieces.append)
    assert result.stdout == "Once" + text + "\n"
    assert "".join(pieces) == text
    assert len(pieces) == (6 if engine == "torch" else 1)


def test_generate_draws(models: tuple[Path, Path]) -> None:
    options = ("--max-tokens", 20, "--temperature", 2, "--top-k", 200, "--min-p", 0.001)
    first, again, other = (
        octavo("generate", models[1], "Once", *options, "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--engine", "abacus"), "Unknown engine 'abacus'. Expected one of"),
        (("--engine", "transformers", "--top-k", 5), "by --temperature only"),
        (("--max-tokens", 1000), "1004"),
    ],
)
def test_what_cannot_be_generated(
    options: tuple[object, ...], reason: str, models: tuple[Path, Path]
) -> None:
    result = octavo("generate", models[1], "Once", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert reason in " ".join(result.stderr.split())


def test_chat(models: tuple[Path, Path]) -> None:
    arguments = ["chat", str(models[1]), "--max-tokens", "6", "--temperature", "0", "--system", "s"]
    result = CliRunner().invoke(app, arguments, input="Hello\n\nagain\n")
    assert result.exit_code == 0, result.output
    first = complete(models[1], "ss;uHello;", max_tokens=6)
    second = complete(models[1], f"ss;uHello;a{first};uagain;", max_tokens=6)
    assert result.stdout == f"{first}\n{second}\n"


def test_chat_with_a_checkpoint_that_was_not_made_for_it(tmp_path: Path) -> None:
    model = tiny.save_tokenizer(tiny.build("llama", tmp_path / "base"))
    result = CliRunner().invoke(app, ["chat", str(model)], input="Hello\n")
    assert result.exit_code == 2
    assert "no chat template" in " ".join(result.stderr.split())


def test_report(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    base, edition = models
    out = tmp_path / "report"
    arguments = ("report", edition, "--reference", base, "-o", out, "--data", text)
    result = octavo(*arguments, "--seq-len", 64)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"README.md", "report.html", "results.json"}
    results = json.loads((out / "results.json").read_text())
    kl = json_of(
        "eval", edition, "--task", "kl", "--data", text, "--seq-len", 64, "--reference", base
    )
    measured = results["evaluation"]
    assert measured["divergence"]["mean"]["value"] == pytest.approx(kl["kl"], rel=1e-5)
    assert measured["perplexity"]["after"]["value"] == pytest.approx(kl["perplexity"], rel=1e-5)
    assert len(results["record"]["weights"]) == 14
    # The report names files, never where they lie.
    for file in out.iterdir():
        assert str(tmp_path) not in file.read_text()
    again = octavo(*arguments)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "unknown task": (("--task", "bleu"), "Unknown task 'bleu'"),
    "no data": (("--task", "perplexity"), "--data"),
    "missing data": (("--task", "perplexity", "--data", "nowhere.txt"), "does not exist"),
    "no reference": (("--task", "kl", "--data", "builtin"), "--reference"),
    "unknown engine": (
        ("--task", "perplexity", "--data", "builtin", "--engine", "abacus"),
        "Unknown engine",
    ),
    "window too long": (
        ("--task", "perplexity", "--data", "builtin", "--seq-len", 4096),
        "positions",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_a_sentence(case: str, models: tuple[Path, Path]) -> None:
    arguments, reason = BAD[case]
    result = octavo("eval", models[0], *arguments)
    assert result.exit_code == 2, result.output
    assert reason in " ".join(result.stderr.split())


def test_report_wants_an_edition(models: tuple[Path, Path], tmp_path: Path) -> None:
    result = octavo("report", models[0], "--reference", models[0], "-o", tmp_path / "report")
    assert result.exit_code == 2
    assert "not quantized" in " ".join(result.stderr.split())
    assert not (tmp_path / "report").exists()
