"""What a base model's own card passes on to its editions: the licence above all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, ValidationError

from octavo.errors import OctavoError
from octavo.reporting.validation import Frozen, first_fault, read_bounded

_LIMIT = 4 << 20


class BaseCard(Frozen):
    """The fields of a model card's front matter that hold for a quantized edition as well.

    The names are those of the Hugging Face hub; None where the card does not say.
    """

    # A card has many more fields, which are about the base model alone.
    model_config = ConfigDict(extra="ignore")

    license: str | tuple[str, ...] | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | tuple[str, ...] | None = None


def read_base_card(base: Path) -> BaseCard:
    """The front matter of ``README.md`` in the base model's directory; empty where there is none.

    Raises:
        OctavoError: there is front matter, but it cannot be understood. A licence is not to be
            lost in silence.
    """
    path = base / "README.md"
    if not path.exists():
        return BaseCard()
    text = read_bounded(path, _LIMIT).decode("utf-8-sig", errors="replace")
    try:
        return BaseCard.model_validate(_front_matter(text))
    except ValidationError as error:
        fault = first_fault(error)
    except (yaml.YAMLError, RecursionError) as error:
        fault = str(error).splitlines()[0]
    raise OctavoError(
        f"The front matter of {path} cannot be understood: {fault}. Expected YAML between two lines "
        "of ---, as on the Hugging Face hub. Correct it, so that the licence can be carried over."
    )


def _front_matter(text: str) -> Any:
    """The YAML between the first two lines of ``---``, every scalar a string."""
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), len(lines))
    # BaseLoader builds strings, lists and dicts and nothing else: no dates, no merge keys.
    return yaml.load("\n".join(lines[1:end]), Loader=yaml.BaseLoader) or {}
