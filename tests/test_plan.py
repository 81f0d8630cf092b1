"""``octavo plan`` against what runs really read and write, and its pipeline against a simulation."""

from __future__ import annotations

import heapq
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny
from octavo import Calibration, plan, quantize, synth
from octavo.cli import app
from octavo.errors import OctavoError
from octavo.planning import simulate
from octavo.scheme import scheme_called


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("qwen2", tmp_path_factory.mktemp("plan") / "model", layers=3)


@pytest.mark.parametrize(
    ("format", "kind"),
    [("modelopt", "fp8"), ("quark", "fp8-dynamic"), ("tensorrt-llm", "fp8")],
)
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config alone"])
def test_bytes_are_those_of_the_run(
    format: str, kind: str, weights: bool, model: Path, tmp_path: Path
) -> None:
    described = model
    if not weights:
        described = tmp_path / "config"
        described.mkdir()
        shutil.copy(model / "config.json", described)
    scheme = scheme_called(kind)
    foreseen = plan(
        described,
        scheme=scheme,
        format=format,
        device="h200",
        calibration=Calibration(samples=4, seq_len=16),
    )
    ids = tiny.save_ids(tmp_path / "ids.npy")
    result = quantize(
        model,
        tmp_path / "out",
        scheme=scheme,
        format=format,
        calibration=Calibration(source=str(ids)),
    )
    assert foreseen.bytes_read == result.bytes_before
    assert foreseen.bytes_written == result.bytes_after
    assert (foreseen.layers, foreseen.tokens) == (result.layers, result.tokens)
    files = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert foreseen.bytes_written == pytest.approx(files, rel=0.1)
    assert foreseen.disk >= foreseen.bytes_written + (2 * 4 * 16 * 64 * 2 if result.tokens else 0)


def test_a_known_shape_has_the_published_size() -> None:
    found = plan("llama-3.1-405b", device="h200")
    assert found.parameters == 405_853_388_800
    assert found.bytes_read == 2 * found.parameters
    # All linear layers of 126 layers in a byte each; embedding, lm_head and norms in two.
    linears = 126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248)
    scales = 126 * (7 * 2 + 2) * 4
    assert found.bytes_written == 2 * found.parameters - linears + scales
    # On one GPU of 141 GB it is never in memory.
    assert found.peak_memory < 20e9


def test_the_plan_of_a_run_here(model: Path) -> None:
    found = plan(model, device="cpu", calibration=Calibration(samples=4, seq_len=16))
    assert min(found.rates[:4]) > 0
    assert found.rates.link is None
    assert found.seconds["total"] > max(
        found.seconds[stage] for stage in ("read", "calibrate", "cast", "write")
    )
    assert found.bound_by in found.seconds


def test_more_workers_are_faster_and_need_more_disk() -> None:
    plans = [plan("llama-3.1-405b", device="h200", workers=count) for count in (2, 8, 64)]
    seconds = [found.seconds["total"] for found in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert [found.disk for found in plans] == sorted(found.disk for found in plans)
    assert len({found.bytes_read for found in plans}) == 1


def test_the_command(model: Path) -> None:
    arguments = ["plan", str(model), "--device", "h100", "--workers", "2", "--samples", "8"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0, table.output
    assert "free disk needed" in table.stdout
    assert "data sheet" in table.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["workers"] == 2
    assert found["seconds"]["total"] > 0
    assert found["rates"]["read"] == 6.0
    slower = [*arguments, "--json", "--disk-read", "1", "--disk-write", "1"]
    assert json.loads(CliRunner().invoke(app, slower).stdout)["rates"]["read"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("nowhere",), "is not a directory"),
        (("llama-3.1-8b", "--device", "abacus"), "Expected auto, cpu or cuda"),
        (("llama-3.1-8b", "--device", "h200", "--workers", "33"), "decoder layers (32)"),
        (("llama-3.1-8b", "--device", "h200", "--format", "block-fp8"), "block-fp8"),
        (("llama-3.1-8b", "--device", "h200", "--max-memory", "500MB"), "--max-memory"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], fragment: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert fragment in " ".join(result.stderr.split())


def test_a_config_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(OctavoError, match="not supported"):
        plan(tmp_path, device="h200")


def test_synth_is_what_was_planned(tmp_path: Path) -> None:
    found = plan("smollm2-135m", device="h200")
    made = synth("smollm2-135m", tmp_path / "model", layers=1)
    layer = (found.bytes_read - 2 * 49152 * 576 - 2 * 576) / 30
    assert made.nbytes == 2 * 49152 * 576 + 2 * 576 + layer


def by_events(passes: list[list[int]], load: float, step: float, end: float, batches: int) -> float:
    """The same pipeline as events: every worker does what it can as soon as it can."""
    plan_of: list[list[tuple[str, int, float]]] = []
    for counts in passes:
        tasks = []
        for number, layers in enumerate(counts):
            tasks.append(("load", -1, layers * load))
            for batch in range(batches):
                kind = "first" if number == 0 else "again"
                tasks.append((kind, batch, layers * step))
            tasks.append(("end", number, layers * end))
        plan_of.append(tasks)
    # When each batch has left each stage; nothing leaves before the stage's last pass.
    left: list[dict[int, float]] = [dict.fromkeys(range(batches), 0.0)]
    left += [{} for _ in passes]
    at, finished = [0] * len(passes), 0.0
    queue = [(0.0, stage) for stage in range(len(passes))]
    waiting: dict[tuple[int, int], list[tuple[float, int]]] = {}
    while queue:
        now, stage = heapq.heappop(queue)
        finished = max(finished, now)
        if at[stage] == len(plan_of[stage]):
            continue
        kind, batch, seconds = plan_of[stage][at[stage]]
        if kind == "first" and batch not in left[stage]:
            waiting.setdefault((stage, batch), []).append((now, stage))
            continue
        begin = max(now, left[stage].get(batch, 0.0)) if kind == "first" else now
        at[stage] += 1
        after = begin + seconds
        done_passes = sum(1 for task in plan_of[stage][: at[stage]] if task[0] == "end")
        if kind in ("first", "again") and done_passes == len(passes[stage]) - 1:
            left[stage + 1][batch] = after
            for one in waiting.pop((stage + 1, batch), []):
                heapq.heappush(queue, (max(one[0], after), one[1]))
        heapq.heappush(queue, (after, stage))
    return finished


@given(
    passes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=5),
    load=st.floats(0, 5),
    step=st.floats(0.01, 5),
    end=st.floats(0, 5),
    batches=st.integers(1, 8),
)
def test_the_pipeline_is_that_of_a_simulation(
    passes: list[list[int]], load: float, step: float, end: float, batches: int
) -> None:
    expected = by_events(passes, load, step, end, batches)
    assert simulate(passes, load, step, end, batches) == pytest.approx(expected)


def test_the_pipeline_s_textbook_case() -> None:
    # M batches through N equal stages: M + N - 1 steps, and one load and one end.
    assert simulate([[3]] * 4, 2.0, 0.5, 1.0, 16) == pytest.approx(6 + (16 + 4 - 1) * 1.5 + 3)
