"""Invented results, in the shape of a real model's: what a report is made of."""

from __future__ import annotations

import datetime
import math
import random
import shlex

from octavo.reporting import (
    Accuracy,
    BaseCard,
    Divergence,
    Edition,
    Environment,
    Estimate,
    Evaluation,
    Histogram,
    Mmlu,
    MmluComparison,
    Perplexity,
    PerplexityComparison,
    Record,
    Results,
)
from octavo.reporting.record import CalibrationRecord, WeightError
from octavo.scheme import Scheme

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def results(
    *, layers: int = 30, name: str = "smollm2-fp8", base_model: str = "smollm2-bf16"
) -> Results:
    """A report on a model of ``layers`` layers with seven projections each."""
    scheme = Scheme(exclude=("*.layers.0.mlp.*",))
    return Results(
        environment=Environment(
            octavo="0.1.0",
            python="3.11.9",
            torch="2.13.0+cpu",
            transformers="5.19.0",
            engine="transformers",
            device="Intel Xeon, 2 cores",
            os="Linux 6.1",
            date=datetime.date(2026, 11, 22),
        ),
        edition=Edition(
            name=name,
            base_model=base_model,
            format="modelopt",
            scheme=scheme,
            bytes_before=269_060_352,
            bytes_after=162_893_136,
        ),
        base_card=BaseCard(license="apache-2.0", language=("en",)),
        evaluation=Evaluation(perplexity=_perplexity(), divergence=_divergence(), mmlu=_mmlu()),
        commands=(
            f"octavo report {shlex.quote(name)} --reference {shlex.quote(base_model)} -o report",
        ),
        record=record(layers, scheme, base_model),
    )


def massive_inputs(layers: int) -> tuple[str, str]:
    """Where the model has massive activations, as real ones have: early and late."""
    first, second = 11 * layers // 30, layers - 1
    return f"model.layers.{first}.mlp.down_proj", f"model.layers.{second}.mlp.down_proj"


def record(layers: int, scheme: Scheme, base_model: str) -> Record:
    draw = random.Random(0)
    amax: dict[str, float] = {}
    weights: dict[str, WeightError] = {}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        read = {kind: draw.uniform(1, 9) for kind in ("qkv", "o", "gate/up", "down")}
        modules = {f"{block}.self_attn.{kind}_proj": kind for kind in ATTENTION}
        modules |= {f"{block}.mlp.{kind}_proj": kind for kind in MLP}
        for module, kind in modules.items():
            amax[module] = next(value for kinds, value in read.items() if kind in kinds)
            amax[f"{module}.weight"] = draw.uniform(0.5, 4)
            if not scheme.excludes(module):
                sqnr = draw.gauss(31.5, 0.15) - (2 if kind == "o" and layer == 4 else 0)
                weights[module] = WeightError(sqnr_db=sqnr, underflow=draw.uniform(0, 4e-4))
        amax[f"{block}.self_attn.k"] = draw.uniform(10, 30)
        amax[f"{block}.self_attn.v"] = draw.uniform(0.5, 12)
        amax[f"{block}.input_layernorm.weight"] = draw.uniform(0.2, 2)
    amax |= dict(zip(massive_inputs(layers), (3584.0, 2384.0), strict=True))
    return Record(
        octavo="0.1.0",
        torch="2.13.0+cpu",
        transformers="5.19.0",
        base_model=base_model,
        format="modelopt",
        scheme=scheme,
        calibration=CalibrationRecord(
            source="notes.jsonl", text_field="body", samples=128, seq_len=512, seed=7
        ),
        amax=amax,
        weights=weights,
    )


def _perplexity() -> PerplexityComparison:
    def on_wikitext(value: float) -> Perplexity:
        return Perplexity(
            value=value,
            standard_error=0.31,
            data="wikitext2",
            tokens=16376,
            windows=8,
            seq_len=2048,
        )

    ratio = Estimate(value=1.00318, standard_error=0.00064)
    return PerplexityComparison(
        before=on_wikitext(19.2831), after=on_wikitext(19.3444), ratio=ratio
    )


def _divergence() -> Divergence:
    edges = tuple(10 ** (-7 + step / 5) for step in range(41))
    counts = tuple(round(1500 * math.exp(-((step - 21) ** 2) / 40)) for step in range(40))
    return Divergence(
        mean=Estimate(value=0.00732, standard_error=0.00011),
        worst_1_percent=0.0961,
        top1_agreement=Estimate(value=0.9613, standard_error=0.0015),
        histogram=Histogram(edges=edges, counts=counts),
        data="wikitext2",
        tokens=16376,
        windows=8,
        seq_len=2048,
    )


def _mmlu() -> MmluComparison:
    def accuracy(value: float, questions: int) -> Accuracy:
        error = math.sqrt(value * (1 - value) / questions)
        return Accuracy(value=value, standard_error=error, questions=questions)

    def on_mmlu(value: float) -> Mmlu:
        categories = {"STEM": 3018, "humanities": 4705, "social sciences": 3077, "other": 3242}
        return Mmlu(
            **accuracy(value, 14042).model_dump(),
            shots=5,
            categories={name: accuracy(value, count) for name, count in categories.items()},
            subjects={
                "abstract_algebra": accuracy(value, 100),
                "world_religions": accuracy(value, 171),
            },
        )

    change = Estimate(value=-0.0021, standard_error=0.0018)
    return MmluComparison(before=on_mmlu(0.2846), after=on_mmlu(0.2825), change=change)
