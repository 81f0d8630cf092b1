"""What the card and the HTML both show, put into words once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.reporting import table
from octavo.reporting.commands import Snippet, make_again, rotate_again, serve
from octavo.reporting.numbers import number
from octavo.reporting.record import BudgetRecord, Record
from octavo.reporting.results import Environment, Results
from octavo.scheme import Scheme
from octavo.units import format_bytes

Pairs = list[tuple[str, str]]

_WEIGHTS = {
    "tensor": "one scale per tensor",
    "channel": "one scale per output channel",
    "block": "one scale per block of 128 x 128",
}
_INPUTS = {
    "static": "FP8 (E4M3), symmetric, one calibrated scale per tensor",
    "dynamic": "FP8 (E4M3), symmetric, scaled by the engine as it runs, token by token",
}
_KV_CACHE = {
    "fp8": "FP8 (E4M3), symmetric, one calibrated scale for the keys (after rotary embedding) and "
    "one for the values of each attention block",
    "none": "the model's own dtype",
}

_ROUNDING = {
    "nearest": "each weight's nearest",
    "gptq": "chosen by GPTQ: each makes up for the errors of those before it, on the calibration text",
    "learned": "learned from GPTQ's on, by what comes out of each decoder layer on the calibration text",
}
_ROTATED = (
    "hidden states rotated, each head's values multiplied by a matrix, and both taken back by the weights around them, so that "
    "FP8 loses less; the norms' weights are one"
)
_RANGES = {
    "amax": "The scales are the largest absolute values seen, divided by 448.",
    "mse": "The scales of inputs, keys and values are those, between the largest absolute value seen and twice that "
    "(divided by 448), that leave the least squared error.",
    "percentile": "The scales of inputs, keys and values are what 99.99 % of absolute values do not exceed, divided "
    "by 448.",
}


def view(results: Results) -> dict[str, Any]:
    """The names that the templates know."""
    mmlu, record = results.evaluation.mmlu, results.record
    return {
        "results": results,
        "edition": results.edition,
        "figures": table.figures(results),
        "rows": table.rows(results),
        "nothing": table.NOTHING,
        "mmlu_categories": table.category_rows(mmlu) if mmlu else [],
        "mmlu_subjects": table.subject_rows(mmlu) if mmlu else [],
        "quantized": quantized(results.edition.scheme, record),
        "calibration": record.calibration if record else None,
        "ranges": _RANGES[record.scheme.scales] if record else "",
        "budget": _budget(record.budget) if record else [],
        "again": _again(results),
        "serve": serve(results.edition),
        "environment": _environment(results.environment) + _made_with(results),
    }


def limits(results: Results) -> list[str]:
    """What the numbers do not say."""
    scheme, evaluation = results.edition.scheme, results.evaluation
    measures = {
        "perplexity": evaluation.perplexity,
        "KL divergence": evaluation.divergence,
        "MMLU": evaluation.mmlu,
    }
    measured = [name for name, found in measures.items() if found]
    static = scheme.inputs == "static"
    candidates = {
        "The cost was not measured: no evaluation was run.": not measured,
        f"The cost was measured by {', '.join(measured)} on the data named above. Other languages, "
        "longer contexts, tool use and safety were not measured; check what matters to you.": measured,
        "Scales come from the calibration text. Activations that go beyond what occurred there are "
        "clamped: text of a very different kind may lose more.": static,
        "Serving engines round in another order than the engine of this measurement, so their last "
        "digits differ.": True,
        "Knowledge, biases and terms of use are those of the base model.": True,
    }
    return [text for text, holds in candidates.items() if holds]


def quantized(scheme: Scheme, record: Record | None = None) -> Pairs:
    """What a scheme quantizes, and how."""
    shared = ", shared by q/k/v and by gate/up" if scheme.merge_scales else ""
    budget = record.budget if record else None
    excluded = _named(scheme.exclude, budget.kept if budget else ())
    dynamic = _named(scheme.dynamic, budget.dynamic if budget else ())
    kept = ["lm_head", "embeddings", "norms", *excluded]
    moved = [("Dynamic inputs", f"{', '.join(dynamic)}: {_INPUTS['dynamic']}")] if dynamic else []
    rounded = [("Codes", _ROUNDING[record.scheme.rounding])] if record else []
    turned = [("Axes", _ROTATED)] if record and record.rotation else []
    return [
        ("Weights", f"FP8 (E4M3), symmetric, {_WEIGHTS[scheme.weights]}{shared}"),
        *rounded,
        *turned,
        ("Activations", f"inputs of the same linear layers: {_INPUTS[scheme.inputs]}"),
        *moved,
        ("KV cache", _KV_CACHE[scheme.kv_cache]),
        ("Layers", "every linear layer of the decoder blocks, but for those kept"),
        ("Kept in the model's dtype", ", ".join(kept)),
    ]


def _named(modules: Sequence[str], for_budget: Sequence[str]) -> list[str]:
    """Linear layers as a scheme has them, those that a budget chose as their number."""
    asked = [pattern for pattern in modules if pattern not in for_budget]
    return [*asked, f"{len(for_budget)} linear layers, for the budget"] if for_budget else asked


def _budget(budget: BudgetRecord | None) -> Pairs:
    """What was allowed and what it took, where something was said."""
    if budget is None:
        return []
    if budget.max_kl is not None:
        allowed = f"KL divergence of {number(budget.max_kl)} nats/token"
    else:
        allowed = f"perplexity increase of {100 * (budget.max_perplexity_increase or 0):g} %"
    error = "" if budget.kl_standard_error is None else f" ± {number(budget.kl_standard_error)}"
    found = f"KL {number(budget.kl)}{error}, perplexity × {budget.perplexity_ratio:.4f}"
    return [
        ("Allowed", allowed),
        (
            "Found",
            f"{found}, on {budget.windows} windows of {budget.seq_len} tokens of the second half of {budget.data}",
        ),
        (
            "Kept for it",
            f"{len(budget.kept)} linear layers, {format_bytes(budget.bytes)}"
            if budget.kept
            else "nothing",
        ),
        *(
            [("Dynamic inputs for it", f"{len(budget.dynamic)} linear layers")]
            if budget.dynamic
            else []
        ),
    ]


def _again(results: Results) -> list[Snippet]:
    made = []
    if (record := results.record) is not None:
        if record.rotation is not None:
            original = results.edition.base_model
            made.append(rotate_again(record.rotation, original, record.base_model))
        made.append(make_again(record, results.edition.name))
    measured = [Snippet("Measure", "sh", "\n".join(results.commands))] if results.commands else []
    return made + measured


def _environment(environment: Environment) -> Pairs:
    return [
        ("Engine", environment.engine),
        ("Device", environment.device),
        ("System", environment.os),
        ("Octavo", environment.octavo),
        ("Python", environment.python),
        ("PyTorch", environment.torch),
        ("transformers", environment.transformers),
        ("Date", environment.date.isoformat()),
    ]


def _made_with(results: Results) -> Pairs:
    if (record := results.record) is None:
        return []
    versions = f"Octavo {record.octavo}, PyTorch {record.torch}, transformers {record.transformers}"
    return [("Edition made with", versions)]
