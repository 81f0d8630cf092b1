"""What an edition's config calls for: which tensors there should be, and what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from octavo.consistency import attention_blocks, decoder_linears
from octavo.edition import Edition
from octavo.skeleton import build_skeleton


@dataclass(frozen=True)
class Outline:
    """The model that ``config.json`` describes.

    Attributes:
        shapes: of every tensor but scales, by name.
        linears: linear layers of decoder layers, by module name.
        outer_linears: those outside (``lm_head``), which keep their dtype as a rule.
        attention: attention blocks, by module name.
        head_dim: channels of their heads.
        tied: tensors that are another one's and need not be stored, with the other one's name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[str, ...]
    outer_linears: tuple[str, ...]
    attention: tuple[str, ...]
    head_dim: int
    tied: Mapping[str, str]


def outline(edition: Edition) -> Outline:
    """The model of ``edition``.

    Raises:
        OctavoError: Octavo does not know the architecture, or the config contradicts itself.
    """
    config, model = build_skeleton(edition)
    modules = dict(model.named_modules())
    linears = decoder_linears(model)
    embedding = next(name for name in modules if modules[name] is model.get_input_embeddings())
    attention = tuple(attention_blocks(model))
    return Outline(
        shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        linears=tuple(linears),
        outer_linears=tuple(
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear) and name not in linears
        ),
        attention=attention,
        head_dim=next((int(modules[name].head_dim) for name in attention), 0),
        tied={"lm_head.weight": f"{embedding}.weight"} if config.tie_word_embeddings else {},
    )
