"""How near editions of the same format come to the model, whoever made them.

ModelOpt's, Quark's and llm-compressor's editions are put together from golden files (scales, and hashes of codes), which
were made on the same calibration tokens as Octavo's are here; auto-round's is tuned on them, in an environment of its own,
which takes hours on two cores. All are static per-tensor FP8 with an FP8 KV cache. One scorer reads them all: KL from the
BF16 model and perplexity, on WikiText-2's test text, whose validation text they are calibrated on, on the built-in evaluation text and
on exam questions. With ``--vllm``, vLLM reads them too.

Usage: python -m benchmarks.accuracy GOLDEN WIKI.test.raw MMLU_DIR [--windows 16] [--vllm PYTHON] [--only NAME …]
       [--autoround-iterations 200]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import CACHE, RESULTS, ROOT, machine, sample_model, save
from benchmarks.environments import PEER_SCRIPTS, peer_python, variables
from octavo import Calibration, quantize, rotate, write_calibration
from octavo.allocator import keep_freed_memory
from octavo.evaluation import evaluate, load_subjects
from octavo.evaluation.questions import LETTERS
from octavo.scheme import scheme_called

sys.path.insert(0, str(ROOT / "tests"))
from golden import TOOLS, rebuild

SCHEMES: dict[str, dict[str, Any]] = {
    "nearest": {},
    "nearest, scales by MSE": {"scales": "mse"},
    "GPTQ": {"rounding": "gptq"},
    "GPTQ, scales by MSE": {"rounding": "gptq", "scales": "mse"},
    "learned, scales by MSE": {"rounding": "learned", "scales": "mse"},
    # vLLM rounds q/k/v and gate/up again where each has a scale of its own.
    "GPTQ, scales by MSE, merged": {"rounding": "gptq", "scales": "mse", "merge_scales": True},
}


class Ours(NamedTuple):
    """An edition of Octavo's.

    Attributes:
        scheme: what it differs in from the default.
        rotated: made of what `octavo rotate` makes of the model, on the same tokens.
        text: what it is calibrated on, besides or instead of the golden tokens: a key of ``TEXTS``.
    """

    scheme: dict[str, Any]
    rotated: bool = False
    text: str = ""


# Golden samples, and samples that the model writes itself.
TEXTS = {"": (128, 0), "own text": (0, 256), "both texts": (128, 128)}

OURS = {
    ", ".join(filter(None, ["Octavo", "rotated" * rotated, text, name])): Ours(
        scheme, rotated, text
    )
    for name, scheme in SCHEMES.items()
    for rotated, text in itertools.product((False, True), TEXTS)
}
# The rotated model itself, not quantized: what rounding its weights to BF16 once more takes.
UNQUANTIZED = "rotated, BF16"
# What is tuned here, since there are no golden files of it.
AUTOROUND = "auto-round-0.16.1"
NAMES = [*TOOLS, AUTOROUND, *OURS, UNQUANTIZED]

# vLLM's context is as long as a window, and it generates one token more.
_VLLM_WINDOWS, _VLLM_SEQ_LEN = 8, 2047


def tuned_by_autoround(tokens: Path, iterations: int) -> Path:
    """auto-round's edition, by its own defaults but for the iterations of a decoder layer; kept, for it takes hours."""
    edition = CACHE / f"auto-round-{iterations}"
    if not edition.exists():
        python, script = peer_python("auto-round"), PEER_SCRIPTS / "autoround_quantize.py"
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            written = Path(scratch) / "edition"
            command = [python, script, sample_model(), tokens, written, str(iterations)]
            subprocess.run(list(map(str, command)), env=variables(python), check=True)
            # In a folder with a name of its own choice.
            next(written.iterdir()).rename(edition)
    return edition


def make(name: str, golden: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Make an edition that does not take hours; what is to be said of that. The scorer's reference is always the original."""
    output = folder / name.replace(" ", "-").replace(",", "")
    if name not in OURS and name != UNQUANTIZED:
        rebuild(name, sample_model(), golden, output)
        return output, {}
    begin = time.perf_counter()
    edition = OURS.get(name, Ours({}, rotated=True))
    calibration = Calibration(source=str(calibration_tokens(golden, folder, edition.text)))
    model, found = sample_model(), {}
    if edition.rotated:
        model = output if name == UNQUANTIZED else folder / "rotated"
        rotated = rotate(sample_model(), model, calibration=calibration, overwrite=True)
        found = {"noise": rotated.noise, "rotating_seconds": time.perf_counter() - begin}
    if name != UNQUANTIZED:
        scheme = scheme_called("fp8", **edition.scheme)
        quantize(model, output, scheme=scheme, calibration=calibration)
        found["seconds"] = time.perf_counter() - begin
    return output, found


def calibration_tokens(golden: Path, folder: Path, text: str = "") -> Path:
    """The file of tokens for a text of ``TEXTS``, made once."""
    path = folder / f"{text or 'golden'}.npy"
    if path.exists():
        return path
    given, own = TEXTS[text]
    samples = np.load(golden / "calib_tokens.npy")[:given].astype(np.int64)
    if own:
        write_calibration(sample_model(), path, samples=own, overwrite=True)
        # Mixed: learning takes samples in their order.
        samples = np.random.default_rng(0).permutation(np.concatenate([samples, np.load(path)]))
    np.save(path, samples)
    return path


def exam_questions(mmlu: Path, path: Path) -> Path:
    """The first eight questions of each of MMLU's subjects and their choices, without the answers: a text of a third kind."""
    parts = []
    for subject in load_subjects(mmlu, shots=0, limit=8):
        for question in subject.questions:
            choices = zip(LETTERS, question.choices, strict=True)
            lines = [question.text, *(f"{letter}. {choice}" for letter, choice in choices)]
            parts.append("\n".join(lines))
    path.write_text("\n\n".join(parts))
    return path


def score(edition: Path, data: str, windows: int) -> dict[str, Any]:
    """KL and perplexity by Octavo's engine."""
    found: Any = evaluate(edition, task="kl", data=data, reference=sample_model(), limit=windows)
    names = ("kl", "kl_standard_error", "perplexity", "reference_perplexity")
    return {
        name: getattr(found, name)
        for name in (*names, "perplexity_ratio", "ratio_standard_error", "tokens")
    }


def score_in_vllm(python: Path, edition: Path, data: Path) -> dict[str, Any]:
    """Perplexity by vLLM, in a process of its own."""
    command = [str(python), "-m", "octavo.cli", "eval", str(edition), "--task", "perplexity"]
    command += ["--engine", "vllm", "--data", str(data), "--json", "--quiet"]
    command += ["--seq-len", str(_VLLM_SEQ_LEN), "--limit", str(_VLLM_WINDOWS)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"vLLM failed on {edition}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    return {name: found[name] for name in ("perplexity", "standard_error")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("golden", type=Path, help="the golden files")
    parser.add_argument("test", type=Path, help="WikiText-2's test text")
    parser.add_argument("mmlu", type=Path, help="MMLU's folder")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--autoround-iterations", type=int, default=200, help="its own default")
    options = parser.parse_args()
    keep_freed_memory()
    result: dict[str, Any] = {"editions": {}}
    if (RESULTS / "accuracy.json").exists():
        result = json.loads((RESULTS / "accuracy.json").read_text())
    result |= {"machine": machine(), "windows": options.windows, "calibration": "golden"}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        texts = {
            "wikitext-2 test": str(options.test),
            "builtin": "builtin",
            "exam questions": str(exam_questions(options.mmlu, folder / "questions.txt")),
        }
        if options.vllm:
            result["vllm, BF16"] = score_in_vllm(options.vllm, sample_model(), options.test)
        for name in options.only:
            # Editions are scored in several runs, which need not be on one machine.
            found: dict[str, Any] = {"cpu": machine()["cpu"]}
            if name == AUTOROUND:
                found["iterations"] = options.autoround_iterations
                tokens = calibration_tokens(options.golden, folder)
                edition = tuned_by_autoround(tokens, options.autoround_iterations)
            else:
                edition, made = make(name, options.golden, folder)
                found |= made
            scores = {text: score(edition, data, options.windows) for text, data in texts.items()}
            found |= scores
            kls = ", ".join(f"{text}: KL {one['kl']:.5f}" for text, one in scores.items())
            if options.vllm:
                found["vllm"] = score_in_vllm(options.vllm, edition, options.test)
                kls += f", vLLM {found['vllm']['perplexity']:.3f}"
            print(f"{name}: {kls}", flush=True)
            result["editions"][name] = result["editions"].get(name, {}) | found
            save("accuracy", result)


if __name__ == "__main__":
    main()
