"""MMLU questions per second: five-shot prefixes shared, against each full prompt by itself.

Both ways run on the same engine with the same batches and cores; they differ in whether what a
subject's prompts begin with is computed once or for every question.

Usage: python -m benchmarks.mmlu_speed MMLU_DIR [--subjects anatomy,astronomy] [--limit 60]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import ROOT, median, sample_model, save
from octavo.engines import Engine, open_engine
from octavo.evaluation.mmlu import Batch, PromptEncoder
from octavo.evaluation.questions import load_subjects
from octavo.tokenizer import load_tokenizer

SUBJECTS = "anatomy,high_school_psychology,moral_scenarios,professional_accounting"


def shared(engine: Engine, batch: Batch, choices: list[int]) -> Tensor:
    """The product's way."""
    return engine.choose(batch.prefix, batch.suffixes, choices)


def separate(engine: Engine, batch: Batch, choices: list[int]) -> Tensor:
    """Each prompt from its first token on."""
    return engine.choose([], [batch.prefix + suffix for suffix in batch.suffixes], choices)


WAYS: dict[str, Callable[[Engine, Batch, list[int]], Tensor]] = {
    "shared": shared,
    "separate": separate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mmlu", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--subjects", default=SUBJECTS)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = options.model or sample_model()
    subjects = load_subjects(
        options.mmlu, shots=5, limit=options.limit, only=options.subjects.split(",")
    )
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    results: dict[str, Tensor] = {}
    with closing(open_engine("transformers", model)) as engine:
        encoder = PromptEncoder(load_tokenizer(model), engine.max_positions)
        batches = [batch for subject in subjects for batch in encoder.batches(subject)]
        for number in range(options.rounds):
            for name, way in WAYS.items():
                begin = time.perf_counter()
                results[name] = torch.cat([way(engine, one, encoder.choices) for one in batches])
                seconds[name].append(time.perf_counter() - begin)
                print(f"round {number + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    questions = len(results["shared"])
    rates = {name: questions / median(values) for name, values in seconds.items()}
    chosen = {name: logprobs.argmax(dim=-1) for name, logprobs in results.items()}
    disagreements = int((chosen["shared"] != chosen["separate"]).sum())
    ratio = rates["shared"] / rates["separate"]
    print(
        f"{rates['shared']:.2f} questions/s shared, {rates['separate']:.2f} separate: {ratio:.2f} x; "
        f"{disagreements} of {questions} answers differ"
    )
    path = save(
        "mmlu_speed",
        {
            "model": model.name,
            "subjects": [subject.name for subject in subjects],
            "questions": questions,
            "seconds": {
                name: [round(one, 2) for one in values] for name, values in seconds.items()
            },
            "questions_per_second": {name: round(rate, 2) for name, rate in rates.items()},
            "shared_over_separate": round(ratio, 2),
            "disagreements": disagreements,
        },
    )
    print(f"saved {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
