"""Outside data into validated models, and what to say where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from octavo.errors import OctavoError


class Frozen(BaseModel):
    """What all of the report's data shares: immutable, no unknown fields, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a small file.

    Raises:
        OctavoError: it is longer than ``limit`` bytes, or not a readable file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise OctavoError(
            f"{path} cannot be read: {error.strerror}. Expected a file; check path and permissions."
        ) from None
    if len(content) > limit:
        raise OctavoError(
            f"{path} is larger than {limit:,} bytes, far beyond what such a file holds. "
            "Is it the right file? Remove it, or restore the original."
        )
    return content


def first_fault(error: ValidationError) -> str:
    """``scheme.inputs: Input should be 'static' or 'dynamic'``: the first of a model's faults.

    The offending value itself is left out: it may be of any size.
    """
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where}: {fault['msg']}" if where else fault["msg"]
