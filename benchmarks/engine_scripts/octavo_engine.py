"""Octavo's embedded engine."""

import sys
from pathlib import Path

from benchmarks.engine_scripts.loop import answer
from octavo.allocator import keep_freed_memory
from octavo.engines.torch import Request, Sampling, open_runner

# As Octavo's program begins.
keep_freed_memory()
runner = open_runner(Path(sys.argv[1]), "cpu", max_tokens=2048)


def run(prompts: list[list[int]], new: int) -> None:
    requests = [Request(prompt, new, Sampling(temperature=0.0)) for prompt in prompts]
    assert all(len(outputs) == new for outputs in runner.generate(requests))


answer(run)
runner.close()
