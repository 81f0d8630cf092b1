"""What a dialect is: a renaming and a config.

Inside Octavo a quantized model has canonical names: for a linear layer ``<module>.weight``
(``float8_e4m3fn``), ``<module>.weight_scale`` and, with static inputs, ``<module>.input_scale``;
for an attention block ``<block>.k_scale`` and ``<block>.v_scale``. All scales are float32 scalars.
Every other tensor keeps its name and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from octavo.errors import OctavoError
from octavo.scheme import Scheme

if TYPE_CHECKING:  # the command line lists the formats without waiting for PyTorch
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"
Json = dict[str, Any]


class Dialect(NamedTuple):
    """One way to put a quantized model on disk. Its functions are pure.

    Attributes:
        encode: canonical tensors to the dialect's names and shapes. Works on meta tensors, which
            is how an edition is laid out before it is computed.
        configs: the JSON files of the dialect by name, from the model's ``config.json``, the
            scheme, and the names of linear layers of decoder layers left unquantized.
        recognizes: whether a ``quantization_config`` is of this dialect.
        scheme: what such a section promises. Raises OctavoError where Octavo cannot compute it.
        canonical_name: a tensor's canonical name, from the dialect's. Scales need no more than that
            and their shape put right: one value, or one for each output channel as ``[out, 1]``.
    """

    encode: Callable[[Tensors, Scheme], dict[str, Tensor]]
    configs: Callable[[Json, Scheme, Sequence[str]], dict[str, Json]]
    recognizes: Callable[[Json], bool]
    scheme: Callable[[Json], Scheme]
    canonical_name: Callable[[str], str]


def rename_suffix(name: str, suffixes: Mapping[str, str]) -> str:
    """Replace the end of ``name`` that ``suffixes`` lists, from a dot on: ``{"k_scale": …}``."""
    for old, new in suffixes.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def rename_suffixes(tensors: Tensors, suffixes: Mapping[str, str]) -> dict[str, Tensor]:
    """:func:`rename_suffix` for every name, keeping order and tensors."""
    return {rename_suffix(name, suffixes): tensor for name, tensor in tensors.items()}


def inverse(suffixes: Mapping[str, str]) -> dict[str, str]:
    """The renaming that undoes ``suffixes``."""
    return {new: old for old, new in suffixes.items()}


def unsupported(dialect: str, what: str) -> OctavoError:
    """The error for a section of a known dialect that asks for other arithmetic than Octavo's."""
    return OctavoError(
        f"The checkpoint's {dialect} section in config.json asks for {what}, which Octavo does not "
        "compute. Expected FP8 (E4M3) weights with one scale for each tensor or output channel, and "
        "static per-tensor or dynamic per-token inputs."
    )
