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
from octavo.formats.dialect import Decoded, Dialect, Json, Modules, Stored, Target
from octavo.scheme import Scheme

FORMATS: dict[str, Dialect] = {
    "modelopt": modelopt.DIALECT,
    "quark": quark.DIALECT,
    "compressed-tensors": compressed_tensors.DIALECT,
    "vllm-fp8": vllm_fp8.DIALECT,
    "block-fp8": block_fp8.DIALECT,
    "tensorrt-llm": tensorrt_llm.DIALECT,
}


def get_format(name: str, scheme: Scheme) -> Dialect:
    """The dialect called ``name``, to write a scheme with.

    Args:
        name: a key of :data:`FORMATS`.
        scheme: what is to be written.

    Raises:
        OctavoError: there is no such dialect, or it has no layout for the scheme.
    """
    if name not in FORMATS:
        raise OctavoError(f"Unknown format {name!r}. Expected one of {', '.join(FORMATS)}.")
    kind = scheme.kind
    if kind not in FORMATS[name].carries:
        able = [other for other, dialect in FORMATS.items() if kind in dialect.carries]
        raise OctavoError(
            f"The format {name} has no layout for the scheme {kind}; it carries "
            f"{', '.join(FORMATS[name].carries)}. Formats that carry {kind}: {', '.join(able)}."
        )
    if scheme.dynamic and not FORMATS[name].mixes(kind):
        able = formats_that_mix(kind)
        raise OctavoError(
            f"The format {name} has no layout for dynamic inputs of some linear layers ({', '.join(scheme.dynamic[:3])}"
            f"{', …' if len(scheme.dynamic) > 3 else ''}) beside the static ones of the scheme {kind}. Formats that have: "
            f"{', '.join(able)}."
        )
    return FORMATS[name]


def formats_that_mix(kind: str) -> list[str]:
    """The dialects in which some linear layers can have dynamic inputs beside the scheme's static ones.

    Args:
        kind: a key of :data:`octavo.scheme.KINDS`.
    """
    return [name for name, dialect in FORMATS.items() if dialect.mixes(kind)]


__all__ = [
    "FORMATS",
    "Decoded",
    "Dialect",
    "Json",
    "Modules",
    "Stored",
    "Target",
    "formats_that_mix",
    "get_format",
]
