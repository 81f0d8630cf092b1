"""Tasks of our own for lm-evaluation-harness, one of each kind, and both sides' results on them."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from octavo.evaluation import HarnessResult, evaluate

TASKS: dict[str, dict[str, Any]] = {
    "picking": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": ["one", "two words", "three"],
        "num_fewshot": 1,
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["q", "\n\n"], "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def save_tasks(directory: Path, texts: list[str]) -> Path:
    """Write :data:`TASKS` into a new ``directory``, each with one document a text."""
    directory.mkdir()
    data = directory / "docs.json"
    documents = [
        {"text": text, "label": number % 3, "answer": "?"} for number, text in enumerate(texts)
    ]
    data.write_text("".join(json.dumps(one) + "\n" for one in documents))
    for name, task in TASKS.items():
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "fewshot_split": "test",
            **task,
        }
        # JSON is YAML.
        (directory / f"{name}.yaml").write_text(json.dumps(config))
    return directory


def check_equal_to_hf(model: Path, tasks: Path) -> None:
    """Assert that all metrics of a float32 model are those of the harness's own ``hf`` model, within 1e-3."""
    ours = evaluate(model, task=f"lm-eval:{','.join(TASKS)}", data=tasks, device="cpu")
    assert isinstance(ours, HarnessResult)
    managers: Any = import_module("lm_eval.tasks").TaskManager
    theirs = import_module("lm_eval.evaluator").simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        tasks=list(TASKS),
        task_manager=managers(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert ours.tasks.keys() == theirs["results"].keys() == TASKS.keys()
    compared = 0
    for name, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "stderr" not in metric:
                assert ours.tasks[name][metric] == pytest.approx(value, abs=1e-3), metric
                compared += 1
    assert compared >= 5
