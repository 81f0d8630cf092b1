"""What a dialect is: a renaming and a config, there and back.

Inside Octavo a quantized model has canonical names: for a linear layer ``<module>.weight``
(``float8_e4m3fn``), ``<module>.weight_scale`` and, with static inputs, ``<module>.input_scale``;
for an attention block ``<block>.k_scale`` and ``<block>.v_scale``. All scales are float32: scalars,
except weight scales of the shape ``[out, 1]`` (one a channel) or ``[⌈out/128⌉, ⌈in/128⌉]`` (one a
block). Every other tensor keeps its name and bytes.

A stored name that begins with ``rank<N>/`` is a tensor of the file ``rank<N>.safetensors``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from octavo.errors import OctavoError
from octavo.scheme import KINDS, Granularity, Inputs, Scheme

if TYPE_CHECKING:  # the command line lists the formats without waiting for PyTorch
    import torch
    from torch import Tensor

Tensors: TypeAlias = "Mapping[str, Tensor]"
Json = dict[str, Any]
# Where a dialect whose config.json is not Hugging Face's keeps that one.
MODEL_CONFIG = "model_config.json"
Files = Mapping[str, Json]
"""JSON files of a checkpoint's directory by name; ``config.json`` is always among them."""


class Described(Protocol):
    """Dtype and shape of a tensor, which may lie on disk or on the meta device."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Target(NamedTuple):
    """The edition that is being encoded.

    Attributes:
        config: the model's ``config.json``, without a quantization section.
        scheme: what its tensors are.
        tp: tensor parallel ranks, where the dialect keeps a file for each.
        pp: pipeline parallel ranks, likewise.
    """

    config: Json
    scheme: Scheme
    tp: int = 1
    pp: int = 1


class Modules(NamedTuple):
    """Linear layers of decoder layers that are not as the scheme's name says.

    Attributes:
        unquantized: those that keep the model's dtype.
        dynamic: those with dynamic inputs beside the static ones of the others.
    """

    unquantized: Sequence[str] = ()
    dynamic: Sequence[str] = ()


class Piece(NamedTuple):
    """A stored tensor, or some of its rows.

    Attributes:
        name: as stored.
        rows: first and last (exclusive) row; None for all.
    """

    name: str
    rows: tuple[int, int] | None = None


class Stored(NamedTuple):
    """Where a canonical tensor lies: pieces, joined along an axis."""

    pieces: tuple[Piece, ...]
    axis: int = 0


class Decoded(NamedTuple):
    """A checkpoint in canonical terms.

    Attributes:
        config: the model's ``config.json``, without the quantization.
        scheme: what the dialect's config promises; ``exclude`` has patterns for what it leaves
            unquantized, ``dynamic`` for dynamic inputs beside static ones.
        tensors: where each canonical tensor lies.
    """

    config: Json
    scheme: Scheme
    tensors: dict[str, Stored]


class Dialect(NamedTuple):
    """One way to put a quantized model on disk. Its functions are pure.

    Attributes:
        carries: the schemes it has a layout for, keys of :data:`octavo.scheme.KINDS`.
        merges: whether it has one weight scale for what engines fuse (q/k/v, gate/up).
        fuses: linear layers it stores as one tensor, by the last part of their names.
        ranks: whether it keeps a file for each rank of tensor and pipeline parallelism.
        by_module: whether its config says for each linear layer how inputs are scaled.
        encode: canonical tensors to the dialect's names and shapes. Works on meta tensors, which
            is how an edition is laid out before it is computed. Takes any tensors that belong
            together: linear layers it fuses, each with its scales and bias; keys' scale with values'.
        configs: the JSON files of the dialect by name, from the target and the names of the linear
            layers it makes exceptions for.
        recognizes: whether JSON files are of this dialect.
        decode: what they and the stored tensors mean. Raises OctavoError where Octavo cannot
            compute it.
    """

    carries: tuple[str, ...]
    encode: Callable[[Tensors, Target], dict[str, Tensor]]
    configs: Callable[[Target, Modules], dict[str, Json]]
    recognizes: Callable[[Files], bool]
    decode: Callable[[Files, Mapping[str, Described]], Decoded]
    merges: bool = False
    fuses: tuple[tuple[str, ...], ...] = ()
    ranks: bool = False
    by_module: bool = False

    def mixes(self, kind: str) -> bool:
        """Whether linear layers of the scheme ``kind``, of static inputs, can have dynamic ones beside them."""
        weights, inputs = KINDS[kind]
        kinds = {KINDS[name] for name in self.carries}
        both = {(weights, "static"), (weights, "dynamic")} <= kinds
        return self.by_module and inputs == "static" and both


def quantization_section(files: Files) -> Json:
    """The ``quantization_config`` of ``config.json``; empty if there is none."""
    section = files["config.json"].get("quantization_config")
    return section if isinstance(section, dict) else {}


def without_quantization(config: Json) -> Json:
    """``config.json`` as it was before."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def rename_suffix(name: str, suffixes: Mapping[str, str]) -> str:
    """Replace the end of ``name`` that ``suffixes`` lists, from a dot on: ``{"k_scale": …}``."""
    for old, new in suffixes.items():
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new
    return name


def rename_suffixes(tensors: Tensors, suffixes: Mapping[str, str]) -> dict[str, Tensor]:
    """:func:`rename_suffix` for every name, keeping order and tensors."""
    return {rename_suffix(name, suffixes): tensor for name, tensor in tensors.items()}


def renamed(names: Iterable[str], suffixes: Mapping[str, str]) -> dict[str, Stored]:
    """Canonical tensors of a dialect that differs from the canonical form in suffixes only.

    Args:
        names: as stored.
        suffixes: as for :func:`rename_suffixes`: the dialect's by the canonical ones.

    Raises:
        OctavoError: two names mean the same tensor.
    """
    canonical = {new: old for old, new in suffixes.items()}
    found: dict[str, Stored] = {}
    for name in names:
        stored = Stored((Piece(name),))
        other = found.setdefault(rename_suffix(name, canonical), stored)
        if other != stored:
            raise OctavoError(
                f"The checkpoint's tensors {other.pieces[0].name!r} and {name!r} mean the same in its "
                "dialect; expected one of them. Remove the one that does not belong."
            )
    return found


def matching(names: Iterable[str], patterns: object) -> tuple[str, ...]:
    """The modules among tensors that a dialect's list of exceptions means.

    Args:
        names: tensors of the checkpoint.
        patterns: a list of module names, shell-style patterns, or regular expressions behind
            ``re:`` that match from the start; anything else means no exceptions.
    """
    if not isinstance(patterns, list):
        return ()
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    tests = [_pattern(pattern) for pattern in patterns if isinstance(pattern, str)]
    return tuple(module for module in modules if any(test(module) for test in tests))


def _pattern(pattern: str) -> Callable[[str], bool]:
    if not pattern.startswith("re:"):
        return lambda module: fnmatchcase(module, pattern)
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise OctavoError(
            f"The checkpoint's config.json leaves out modules by {pattern!r}, which is not a regular "
            f"expression: {error}. Correct the file."
        ) from error
    return lambda module: expression.match(module) is not None


def scheme_of(
    dialect: str, carries: Sequence[str], weights: Granularity, inputs: Inputs, **rest: Any
) -> Scheme:
    """A scheme the dialect carries.

    Raises:
        OctavoError: it does not carry the combination.
    """
    if weights == "block" and inputs == "static":
        raise unsupported(dialect, "block scales beside static inputs")
    scheme = Scheme(weights=weights, inputs=inputs, **rest)
    if scheme.kind not in carries:
        raise unsupported(dialect, f"{weights} weight scales beside {inputs} inputs")
    return scheme


def unsupported(dialect: str, what: str) -> OctavoError:
    """The error for a section of a known dialect that asks for other arithmetic than Octavo's."""
    return OctavoError(
        f"The checkpoint's {dialect} section in config.json asks for {what}, which Octavo does not "
        "compute. Expected FP8 (E4M3) weights with one scale for each tensor, output channel or block "
        "of 128 x 128, and static per-tensor or dynamic inputs."
    )
