"""The on-disk dialects of FP8 checkpoints, one file each."""

from octavo.errors import OctavoError
from octavo.formats import (
    block_fp8,
    compressed_tensors,
    modelopt,
    quark,
    tensorrt_llm,
    vllm_fp8,
)
from octavo.formats.dialect import Decoded, Dialect, Json, Stored, Target

FORMATS: dict[str, Dialect] = {
    "modelopt": modelopt.DIALECT,
    "quark": quark.DIALECT,
    "compressed-tensors": compressed_tensors.DIALECT,
    "vllm-fp8": vllm_fp8.DIALECT,
    "block-fp8": block_fp8.DIALECT,
    "tensorrt-llm": tensorrt_llm.DIALECT,
}


def get_format(name: str, kind: str) -> Dialect:
    """The dialect called ``name``, to write a scheme with.

    Args:
        name: a key of :data:`FORMATS`.
        kind: a key of :data:`octavo.scheme.KINDS`.

    Raises:
        OctavoError: there is no such dialect, or it has no layout for the scheme.
    """
    if name not in FORMATS:
        raise OctavoError(f"Unknown format {name!r}. Expected one of {', '.join(FORMATS)}.")
    if kind not in FORMATS[name].carries:
        able = [other for other, dialect in FORMATS.items() if kind in dialect.carries]
        raise OctavoError(
            f"The format {name} has no layout for the scheme {kind}; it carries "
            f"{', '.join(FORMATS[name].carries)}. Formats that carry {kind}: {', '.join(able)}."
        )
    return FORMATS[name]


__all__ = ["FORMATS", "Decoded", "Dialect", "Json", "Stored", "Target", "get_format"]
