"""The model card: ``README.md`` in the manner of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import yaml
from markupsafe import Markup

from octavo.reporting.rendering import render
from octavo.reporting.results import Results
from octavo.reporting.view import limits, view


def model_card(results: Results) -> str:
    """The card as Markdown, with YAML front matter."""
    calibration = results.record.calibration if results.record else None
    return render(
        "card.md.jinja",
        **view(results),
        base_card=results.base_card,
        front_matter=Markup(yaml.safe_dump(front_matter(results), sort_keys=False, width=1000)),
        cached=results.edition.scheme.kv_cache == "fp8",
        tokens=f"{calibration.samples * calibration.seq_len:,}" if calibration else None,
        limits=limits(results),
    )


def front_matter(results: Results) -> dict[str, Any]:
    """What the hub reads: licence and languages of the base model, relation, tags."""
    edition = results.edition
    carried = results.base_card.model_dump(mode="json", exclude_none=True)
    return {
        **carried,
        "base_model": edition.base_model,
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["fp8", "e4m3", "octavo", edition.format, "vllm"],
    }
