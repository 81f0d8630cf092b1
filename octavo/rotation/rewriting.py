"""A checkpoint's tensors in other axes, in the checkpoint's dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.canonical import finite_amax
from octavo.checkpoint import CheckpointWriter
from octavo.decoder import Decoder
from octavo.rotation.basis import Rotation, inverses
from octavo.rotation.surveying import OUTPUTS, READERS, VALUES, WRITERS
from octavo.transfer import meta

# Elements of a matrix's rows that are turned at a time.
_STRIP = 1 << 22


class Axes(NamedTuple):
    """What is changed.

    Attributes:
        rotation: of the hidden states.
        values: M of each head of each decoder layer, float64 ``[heads, head_dim, head_dim]``.
    """

    rotation: Rotation
    values: list[Tensor]


class Rewriting:
    """Writes a model in other axes: norms have weights of one, which the weights that read what they give take over.

    Where ``lm_head`` and the embedding are one tensor, they become two: only what the final norm gives is weighted.
    """

    def __init__(self, decoder: Decoder, axes: Axes, writer: CheckpointWriter) -> None:
        """
        Args:
            decoder: the model.
            axes: to write it in.
            writer: takes the tensors of :meth:`layout`.
        """
        self._decoder, self._axes, self._writer = decoder, axes, writer

    @staticmethod
    def layout(decoder: Decoder) -> dict[str, Tensor]:
        """What will be written, as meta tensors."""
        checkpoint = decoder.checkpoint
        layout = {name: meta(checkpoint, name) for name in checkpoint}
        layout["lm_head.weight"] = layout[decoder.head_name]
        return layout

    def write(self, on_tensor: Callable[[int], None] = lambda _: None) -> None:
        """Do it; ``on_tensor`` is called with the bytes done."""
        done = 0
        on_tensor(done)
        for part in (self._outside(), *map(self._layer, range(len(self._decoder.layers)))):
            for name in part:
                done += self._nbytes(name)
                on_tensor(done)

    def _nbytes(self, name: str) -> int:
        checkpoint = self._decoder.checkpoint
        return checkpoint[name if name in checkpoint else self._decoder.head_name].nbytes

    def _outside(self) -> Iterator[str]:
        """The tensors outside the decoder layers."""
        decoder, checkpoint = self._decoder, self._decoder.checkpoint
        norm, embedding, head = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
        gain = checkpoint.read(norm)
        finite_amax(norm, gain)
        self._strips(embedding, embedding, None)
        yield embedding
        self._strips(decoder.head_name, head, gain)
        yield head
        self._writer.write(norm, torch.ones_like(gain))
        yield norm
        written = {norm, embedding, head}
        for index in range(len(decoder.layers)):
            written.update(decoder.tensor_names(index))
        for name in [one for one in checkpoint if one not in written]:
            # Nothing of the model: tables that older versions of transformers saved.
            self._writer.write(name, checkpoint.read(name))
            yield name

    def _strips(self, source: str, name: str, gain: Tensor | None) -> None:
        """A matrix whose rows are read as hidden states, some rows at a time."""
        checkpoint = self._decoder.checkpoint
        rows, width = checkpoint[source].shape
        step, place = max(_STRIP // width, 1), 0
        for top in range(0, rows, step):
            part = checkpoint.read_rows(source, range(top, min(top + step, rows)))
            finite_amax(source, part)
            data = self._turned(part, gain, part.dtype).view(-1).view(torch.uint8)
            self._writer.write_bytes(name, place, data)
            place += len(data)
        self._writer.finish(name)

    def _turned(self, rows: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Rows of a weight that reads what a norm gives, with the norm's weight; or of the embedding."""
        rotation, result = self._axes.rotation, torch.empty(rows.shape, dtype=dtype)
        step = max(_STRIP // rows.shape[1], 1)
        for top in range(0, len(rows), step):
            part = rows[top : top + step].to(rotation.blocks.device).float()
            if gain is not None:
                part = part * gain.to(part.device).float()
            result[top : top + step] = rotation.of_rows(part)
        return result

    def _layer(self, index: int) -> Iterator[str]:
        """The tensors of a decoder layer."""
        checkpoint, prefix = self._decoder.checkpoint, f"{self._decoder.layer_name(index)}."
        norms = {name: checkpoint.read(f"{prefix}{name}.weight") for name in READERS}
        gains = {reader: norms[norm] for norm, readers in READERS.items() for reader in readers}
        for name in self._decoder.tensor_names(index):
            module, _, kind = name.removeprefix(prefix).rpartition(".")
            tensor = checkpoint.read(name)
            dtype = tensor.dtype
            if module in READERS:
                tensor = torch.ones_like(tensor)
            if module in (VALUES, OUTPUTS):
                tensor = self._by_head(index, module, kind, tensor)
            if module in gains and kind == "weight":
                tensor = self._turned(tensor, gains[module], dtype)
            elif module in WRITERS:
                tensor = self._axes.rotation.of_columns(tensor)
            self._writer.write(name, tensor.to("cpu", dtype))
            yield name

    def _by_head(self, index: int, module: str, kind: str, tensor: Tensor) -> Tensor:
        """A weight or bias that gives values, or the weight that reads them, in the values' axes; float32."""
        axes = self._axes.values[index]
        tensor = tensor.to(axes.device).float()
        if module == VALUES:
            return _multiplied(axes.float(), tensor)
        if kind == "bias":
            return tensor
        # Of the queries' heads, of which several read the same values.
        back = inverses(axes).mT.float()
        group = tensor.shape[1] // axes.shape[1] // len(axes)
        return _multiplied(back.repeat_interleave(group, dim=0), tensor.T).T


def _multiplied(matrices: Tensor, tensor: Tensor) -> Tensor:
    """Each head's rows by its matrix."""
    heads, size, _ = matrices.shape
    return torch.bmm(matrices, tensor.reshape(heads, size, -1)).view_as(tensor)
