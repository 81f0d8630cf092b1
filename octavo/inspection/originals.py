"""The checkpoint that an edition was made from, as it was before it was rounded: with its keys aligned where the
edition's are (:mod:`octavo.alignment`)."""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from octavo.alignment import MOVED, align_keys, input_norm
from octavo.edition import Edition
from octavo.inspection.outline import Outline
from octavo.inspection.strips import strips, strips_of


class Originals:
    """Tensors to compare an edition's with.

    Attributes:
        reference: where they come from.
    """

    def __init__(
        self, edition: Edition, reference: Edition, model: Outline, names: Set[str]
    ) -> None:
        """
        Args:
            edition: the edition.
            reference: the checkpoint.
            model: what both should have.
            names: tensors that both have, in the same shape.
        """
        self.reference, self._head_dim = reference, model.head_dim
        # Which keys were aligned shows in their biases.
        self._blocks = {
            f"{block}.{name}": block
            for block in model.attention
            if names >= {name for name in reference if name.startswith(f"{block}.")}
            and (bias := f"{block}.k_proj.bias") in names
            and _differ(edition, reference, bias)
            for name in MOVED
        }

    def strips(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """As :func:`octavo.inspection.strips.strips` has it."""
        if name not in self._blocks:
            return strips(self.reference, name)
        return strips_of(self._aligned(self._blocks[name])[name])

    def _aligned(self, block: str) -> dict[str, Tensor]:
        # Not the other projections, which are as large; keys with a norm of their own are not moved.
        names = (
            input_norm(block),
            f"{block}.k_norm.weight",
            *(f"{block}.{name}" for name in MOVED),
        )
        tensors = {name: self.reference.read(name) for name in names if name in self.reference}
        align_keys(tensors, block, self._head_dim)
        return tensors


def _differ(edition: Edition, reference: Edition, name: str) -> bool:
    return not torch.equal(edition.read(name).float(), reference.read(name).float())
