"""What GPTQ's codes win at the same format, and which of its ingredients pay.

Editions of one model are made with codes to nearest and by GPTQ, in variants that differ in one thing, from two
calibration texts, and each is scored on two texts that none was calibrated on: KL from the BF16 model and
perplexity. Variants that the tool does not offer are made by putting something else in the place of a function.

Usage: python -m benchmarks.rounding WIKI.test.raw WIKI.valid.tokens [--model smollm2|qwen2.5-coder-1.5b]
                                     [--windows 16] [--only NAME …]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import CACHE, RESULTS, machine, sample_model, save
from benchmarks.qwen import qwen_model
from octavo import Calibration, quantize, write_calibration
from octavo.allocator import keep_freed_memory
from octavo.calibration import stream
from octavo.evaluation import evaluate
from octavo.job import Job
from octavo.rounding import gptq
from octavo.scheme import scheme_called


class Variant(NamedTuple):
    """One way to make an edition.

    Attributes:
        name: in the table.
        rounding: of the scheme.
        scales: of the scheme.
        samples: of calibration, of 512 tokens.
        text: what it is calibrated on: the built-in text, WikiText-2's validation text, or what the model writes itself.
        change: what else is different.
    """

    name: str
    rounding: str = "gptq"
    scales: str = "amax"
    samples: int = 128
    text: str = "builtin"
    change: Callable[[], Any] | None = None


@contextmanager
def damping(value: float) -> Iterator[None]:
    with patch.object(gptq, "prepare", partial(gptq.prepare, damping=value)):
        yield


@contextmanager
def order_of_columns() -> Iterator[None]:
    """Columns one after another, as they are stored."""

    def unordered(values: Tensor, **_: Any) -> Tensor:
        return torch.arange(len(values))

    with patch.object(gptq, "argsort", unordered):
        yield


@contextmanager
def moment_tokens(count: int) -> Iterator[None]:
    with patch.object(stream, "MOMENT_TOKENS", count):
        yield


def keys_as_stored() -> Any:
    """Without moving keys onto the numbers of the cache."""
    return patch.object(Job, "align_keys", lambda *_: [])


MODELS = {"smollm2": sample_model, "qwen2.5-coder-1.5b": qwen_model}

VARIANTS = [
    Variant("nearest", "nearest"),
    Variant("gptq"),
    Variant("nearest, on WikiText-2", "nearest", text="wikitext"),
    Variant("gptq, on WikiText-2", text="wikitext"),
    Variant("nearest, 32 samples", "nearest", samples=32, text="wikitext"),
    Variant(
        "nearest, 32 samples, keys as stored",
        "nearest",
        samples=32,
        text="wikitext",
        change=keys_as_stored,
    ),
    Variant("gptq, 32 samples", samples=32, text="wikitext"),
    Variant("gptq, scales by MSE, 32 samples", scales="mse", samples=32, text="wikitext"),
    Variant(
        "learned, scales by MSE, 32 samples", "learned", scales="mse", samples=32, text="wikitext"
    ),
    Variant("nearest, 32 samples of its own text", "nearest", samples=32, text="own"),
    Variant(
        "gptq, scales by MSE, 32 samples of its own text", scales="mse", samples=32, text="own"
    ),
    Variant("gptq, columns as stored", text="wikitext", change=order_of_columns),
    Variant(
        "gptq, moments of 65,536 tokens", text="wikitext", change=partial(moment_tokens, 65536)
    ),
    *(
        Variant(f"gptq, damping {value:g}", text="wikitext", change=partial(damping, value))
        for value in (0.0001, 0.001, 0.1)
    ),
]


def measure(
    variant: Variant, model: Path, wikitext: Path, texts: dict[str, str], windows: int
) -> dict[str, Any]:
    """Make one edition and score it."""
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        out, own = Path(scratch) / "out", Path(scratch) / "own.npy"
        source = {"builtin": "builtin", "wikitext": str(wikitext), "own": str(own)}[variant.text]
        if variant.text == "own":
            write_calibration(model, own, samples=variant.samples)
        begin = time.perf_counter()
        with variant.change() if variant.change else patch.object(gptq, "DAMPING", gptq.DAMPING):
            quantize(
                model,
                out,
                scheme=scheme_called("fp8", rounding=variant.rounding, scales=variant.scales),
                calibration=Calibration(source=source, samples=variant.samples),
            )
        # Rows are made in several runs, which need not be on one machine.
        result: dict[str, Any] = {
            "cpu": machine()["cpu"],
            "seconds": time.perf_counter() - begin,
        }
        for name, text in texts.items():
            found: Any = evaluate(out, task="kl", data=text, reference=model, limit=windows)
            result[name] = {
                key: getattr(found, key)
                for key in (
                    *("kl", "kl_standard_error", "perplexity", "reference_perplexity"),
                    *("perplexity_ratio", "ratio_standard_error", "tokens"),
                )
            }
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("test", type=Path, help="WikiText-2's test text")
    parser.add_argument("valid", type=Path, help="WikiText-2's validation text")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=[one.name for one in VARIANTS])
    options = parser.parse_args()
    keep_freed_memory()
    CACHE.mkdir(exist_ok=True)
    wikitext = CACHE / "wikitext-2-valid.txt"
    wikitext.write_text(options.valid.read_text())
    texts = {"wikitext-2 test": str(options.test), "builtin": "builtin"}
    result = "rounding" if options.model == "smollm2" else f"rounding_{options.model}"
    path = RESULTS / f"{result}.json"
    variants: dict[str, Any] = json.loads(path.read_text())["variants"] if path.exists() else {}
    for variant in [one for one in VARIANTS if one.name in options.only]:
        found = measure(variant, MODELS[options.model](), wikitext, texts, options.windows)
        variants[variant.name] = found
        kls = ", ".join(f"{name}: KL {found[name]['kl']:.5f}" for name in texts)
        print(f"{variant.name}: {found['seconds']:.0f} s, {kls}", flush=True)
        save(result, {"windows": options.windows, "variants": variants})


if __name__ == "__main__":
    main()
