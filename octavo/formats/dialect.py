"""What a dialect is: a renaming and a config.

Inside Octavo a quantized model has canonical names: for a linear layer ``<module>.weight``
(``float8_e4m3fn``), ``<module>.weight_scale`` and, with static inputs, ``<module>.input_scale``;
for an attention block ``<block>.k_scale`` and ``<block>.v_scale``. All scales are float32 scalars.
Every other tensor keeps its name and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from octavo.scheme import Scheme

if TYPE_CHECKING:  # the command line lists the formats without waiting for PyTorch
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"
Json = dict[str, Any]


class Dialect(NamedTuple):
    """One way to put a quantized model on disk. Both functions are pure.

    Attributes:
        encode: canonical tensors to the dialect's names and shapes. Works on meta tensors, which
            is how an edition is laid out before it is computed.
        configs: the JSON files of the dialect by name, from the model's ``config.json``, the
            scheme, and the names of linear layers of decoder layers left unquantized.
    """

    encode: Callable[[Tensors, Scheme], dict[str, Tensor]]
    configs: Callable[[Json, Scheme, Sequence[str]], dict[str, Json]]


def rename_suffixes(tensors: Tensors, suffixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace the last part of each name that ``suffixes`` lists, keeping order and tensors."""

    def renamed(name: str) -> str:
        parent, _, last = name.rpartition(".")
        return f"{parent}.{suffixes[last]}" if last in suffixes else name

    return {renamed(name): tensor for name, tensor in tensors.items()}
