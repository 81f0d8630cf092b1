"""What a checkpoint is worth: perplexity, KL divergence, MMLU, and lm-evaluation-harness."""

from octavo.evaluation.divergence import DivergenceResult, Histogram, divergence
from octavo.evaluation.harness import run_tasks
from octavo.evaluation.mmlu import Accuracy, MmluResult, mmlu
from octavo.evaluation.perplexity import PerplexityResult, perplexity
from octavo.evaluation.progress import Progress
from octavo.evaluation.questions import load_subjects
from octavo.evaluation.tasks import TASKS, HarnessResult, Result, as_json, evaluate
from octavo.evaluation.text import load_tokens

__all__ = [
    "TASKS",
    "Accuracy",
    "DivergenceResult",
    "HarnessResult",
    "Histogram",
    "MmluResult",
    "PerplexityResult",
    "Progress",
    "Result",
    "as_json",
    "divergence",
    "evaluate",
    "load_subjects",
    "load_tokens",
    "mmlu",
    "perplexity",
    "run_tasks",
]
