"""What the programs share. It imports nothing, so that it runs in every environment."""

import json
import sys
import time


def answer(run) -> None:
    """Answer lines with the seconds that ``run(prompts, new)`` takes."""
    print("ready", file=sys.stdout, flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        begin = time.perf_counter()
        run(prompts, new)
        print(f"seconds {time.perf_counter() - begin}", flush=True)
