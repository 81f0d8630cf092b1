"""lm-evaluation-harness on Octavo's engines, against its own `hf` model."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from harness_tasks import check_equal_to_hf, save_tasks
from octavo.engines import open_engine
from octavo.errors import OctavoError
from octavo.evaluation import evaluate
from octavo.evaluation.journal import Journal
from octavo.tokenizer import load_tokenizer

pytestmark = pytest.mark.lm_eval


@pytest.fixture(autouse=True)
def _harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # So that texts take more than one step.
    monkeypatch.setattr("octavo.evaluation.harness_model._STEP", 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, with the end-of-sequence token that the harness needs, and few positions."""
    directory = tmp_path_factory.mktemp("harness") / "model"
    tiny.save_tokenizer(tiny.build("llama", directory, dtype=torch.float32, eos_token_id=0))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "!"}))
    return directory


def random_texts(*lengths: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abc def"), length)) for length in lengths]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """One document is longer than the model's positions."""
    return save_tasks(tmp_path / "tasks", random_texts(30, 40, 30, 300, 20, 30))


def test_metrics_equal_those_of_the_harness_s_own_model(model: Path, tasks: Path) -> None:
    check_equal_to_hf(model, tasks)


def instances(kind: Any, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, 0) for one in arguments]


def adapter(engine: Any, model: Path) -> Any:
    from octavo.evaluation.harness_model import HarnessModel

    return HarnessModel(engine, load_tokenizer(model), Journal(), lambda _: None)


def test_requests_are_answered_alike(model: Path) -> None:
    """Request by request, where a metric would hide a difference."""
    from lm_eval.models.huggingface import HFLM

    texts = random_texts(1, 20, 128, 129, 300)
    pairs = [(one, " end") for one in texts] + [("", "alone"), ("a  ", "b"), ("c", "d")]
    scored = instances("loglikelihood", *pairs, *pairs[:2])
    rolled = instances("loglikelihood_rolling", *((one,) for one in texts))
    options = {"until": ["c"], "max_gen_toks": 12}
    written = instances("generate_until", *((one, dict(options)) for one in texts))
    hf: Any = HFLM(str(model), dtype="float32", device="cpu", batch_size=1)
    with closing(open_engine("transformers", model, "cpu")) as engine:
        ours = adapter(engine, model)
        for mine, other in zip(ours.loglikelihood(scored), hf.loglikelihood(scored), strict=True):
            assert mine[0] == pytest.approx(other[0], abs=1e-3)
            assert mine[1] == other[1]
        sums = ours.loglikelihood_rolling(rolled)
        assert sums == pytest.approx(hf.loglikelihood_rolling(rolled), abs=1e-3)
        assert ours.generate_until(written) == hf.generate_until(written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "top_p": 0.5}, r"sampling with top_p"),
        ({"max_gen_toks": 128}, r"128 new tokens, the model has 128 positions"),
    ],
)
def test_generation_that_cannot_be(options: dict[str, Any], message: str, model: Path) -> None:
    with (
        closing(open_engine("transformers", model, "cpu")) as engine,
        pytest.raises(OctavoError, match=message),
    ):
        adapter(engine, model).generate_until(instances("generate_until", ("a", options)))


def test_resume(model: Path, tasks: Path) -> None:
    seen = []

    def stop(step: Any) -> None:
        seen.append(step)
        if len(seen) == 5:
            raise KeyboardInterrupt

    whole = evaluate(model, task="lm-eval:picking", data=tasks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, task="lm-eval:picking", data=tasks, on_progress=stop)
    assert evaluate(model, task="lm-eval:picking", data=tasks, resume=True) == whole


def test_data_that_is_not_there(model: Path, tasks: Path) -> None:
    (tasks / "docs.json").unlink()
    with pytest.raises(OctavoError, match=r"data of picking cannot be loaded"):
        evaluate(model, task="lm-eval:picking", data=tasks)


def test_an_unknown_task(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading all of the harness's tasks takes seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", lambda self, **_: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager.match_tasks", lambda self, names: [])
    with pytest.raises(OctavoError, match=r"lm-eval has no task a, b"):
        evaluate(model, task="lm-eval:a,b")
