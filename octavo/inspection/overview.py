"""``octavo.inspect``: an edition laid open, with whatever is odd about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from octavo.checkpoint import Checkpoint, read_json
from octavo.checkpoint.hub import resolve_model
from octavo.edition import Edition
from octavo.inspection.checks import CHECKS
from octavo.inspection.findings import Finding, run_checks
from octavo.inspection.survey import OnProgress, silent, take_survey
from octavo.inspection.tables import (
    Layer,
    Linear,
    Sizes,
    describe_layers,
    describe_linears,
    measure_sizes,
)
from octavo.scheme import Scheme


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        model: its directory.
        dialect: the name of its dialect, None if it is not quantized.
        scheme: what its config promises, None if it is not quantized.
        architecture: ``model_type`` of its config.
        files: its shards.
        sizes: bytes by dtype.
        layers: decoder layers.
        linears: linear layers.
        findings: what is odd, errors first.
    """

    model: str
    dialect: str | None
    scheme: Scheme | None
    architecture: str
    files: tuple[str, ...]
    sizes: Sizes
    layers: tuple[Layer, ...]
    linears: tuple[Linear, ...]
    findings: tuple[Finding, ...]


def inspect(
    model: str | Path, *, config: str | Path | None = None, on_progress: OnProgress = silent
) -> Inspection:
    """Look into a checkpoint: an FP8 edition in any dialect, or an unquantized one.

    Every tensor is read once, in pieces: memory does not grow with the model.

    Args:
        model: a directory, or a hub id.
        config: the original model's ``config.json``, where the checkpoint has none (a TensorRT-LLM
            checkpoint of another tool).
        on_progress: called after each tensor, with megabytes.

    Raises:
        OctavoError: not a checkpoint, or one whose files contradict each other so far that its tensors
            cannot be told (a malformed shard, an index that names others, an unknown dialect).
    """
    with open_edition(model, config) as edition:
        return describe(edition, on_progress)


@contextmanager
def open_edition(model: str | Path, config: str | Path | None = None) -> Iterator[Edition]:
    """The edition called ``model``, and its files closed afterwards; arguments as for :func:`inspect`."""
    with closing(Checkpoint(resolve_model(model))) as checkpoint:
        yield Edition(checkpoint, None if config is None else read_json(Path(config)))


def describe(edition: Edition, on_progress: OnProgress = silent) -> Inspection:
    """:func:`inspect` for an edition that is open."""
    survey = take_survey(edition, on_progress)
    linears = describe_linears(survey)
    return Inspection(
        model=str(edition.directory),
        dialect=edition.dialect,
        scheme=edition.scheme,
        architecture=str(edition.config.get("model_type")),
        files=tuple(path.name for path in edition.checkpoint.files),
        sizes=measure_sizes(edition),
        layers=describe_layers(survey, linears),
        linears=linears,
        findings=run_checks(CHECKS, survey),
    )


def as_json(value: Any) -> Any:
    """A result of this package as JSON values."""
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: as_json(one) for key, one in value.items()}
    return [as_json(one) for one in value] if isinstance(value, (list, tuple)) else value
