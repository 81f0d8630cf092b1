"""EleutherAI's lm-evaluation-harness on Octavo's engines: all the tasks it knows.

The harness is the optional package ``lm-eval`` (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.engines import Engine
from octavo.errors import OctavoError, one_line
from octavo.evaluation.journal import Journal
from octavo.evaluation.progress import OnProgress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_tasks(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    on_progress: OnProgress = silent,
    journal: Journal | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness.

    Args:
        engine: the model.
        tokenizer: its tokenizer.
        tasks: names that the harness knows, of tasks, groups or tags.
        limit: documents of each task, the first ones; all by default.
        num_fewshot: shots, instead of what a task says.
        include_path: a directory with tasks of one's own (YAML), before the harness's.
        on_progress: called after each request.
        journal: where requests' results are kept.

    Returns:
        The harness's results: by task, its metrics (``acc,none``) and their standard errors
        (``acc_stderr,none``).

    Raises:
        OctavoError: the harness is not installed, a task is unknown, or its data is out of reach.
    """
    check_installed()
    evaluator = import_module("lm_eval.evaluator")
    adapter = import_module("octavo.evaluation.harness_model")
    manager = _find(tasks, include_path)
    model = adapter.HarnessModel(engine, tokenizer, journal or Journal(), on_progress)
    try:
        output = evaluator.simple_evaluate(
            model=model,
            tasks=tasks,
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # what `datasets` raises for files, sets and servers it does not find
        raise OctavoError(
            f"The data of {', '.join(tasks)} cannot be loaded: {one_line(error)}. "
            "Run once where the hub can be reached, or pass local data as another task."
        ) from error
    results: dict[str, dict[str, Any]] = output["results"]
    return results


def check_installed() -> None:
    """
    Raises:
        OctavoError: the harness is not installed.
    """
    try:
        import_module("lm_eval")
    except ImportError as error:
        raise OctavoError(
            f"lm-eval tasks need the package lm-eval, which cannot be loaded: {one_line(error)}. "
            "Install it with `pip install 'octavo[eval]'`."
        ) from error


def _find(tasks: list[str], include_path: Path | None) -> Any:
    """A task manager that knows ``tasks``."""
    managers: Any = import_module("lm_eval.tasks").TaskManager
    if include_path is not None:
        # The harness's own tasks are thousands of files, seconds of reading.
        own = managers(include_path=str(include_path), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own
    manager = managers(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise OctavoError(
            f"lm-eval has no task {', '.join(unknown) or 'without a name'}. "
            "`lm-eval ls tasks` lists those it has."
        )
    return manager
