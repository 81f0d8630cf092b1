"""The on-disk dialects of FP8 checkpoints, one file each."""

from octavo.errors import OctavoError
from octavo.formats import modelopt, quark
from octavo.formats.dialect import Dialect

FORMATS: dict[str, Dialect] = {
    "modelopt": modelopt.DIALECT,
    "quark": quark.DIALECT,
}


def get_format(name: str) -> Dialect:
    """The dialect called ``name``.

    Raises:
        OctavoError: there is none.
    """
    if name not in FORMATS:
        raise OctavoError(f"Unknown format {name!r}. Expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


__all__ = ["FORMATS", "Dialect", "get_format"]
