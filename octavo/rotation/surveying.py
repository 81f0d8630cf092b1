"""What the axes are chosen by: second moments of hidden states and values on the calibration text, and those of the weights
that read them. One pass over the decoder layers, one of them in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.calibration import CalibrationStream
from octavo.canonical import finite_amax
from octavo.checkpoint.disk import explained
from octavo.checkpoint.writer import Place
from octavo.decoder import Decoder
from octavo.errors import OctavoError
from octavo.rotation.basis import blocks_of
from octavo.rotation.values import value_axes

# The linear layers of a decoder layer that read hidden states, by the norm in front of them, and those that write them.
VALUES, OUTPUTS = "self_attn.v_proj", "self_attn.o_proj"
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", VALUES),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = (OUTPUTS, "mlp.down_proj")

# They work on a head's queries and keys, which stay as they are.
_UNTOUCHED = ("self_attn.q_norm", "self_attn.k_norm")


class Survey(NamedTuple):
    """What was found.

    Attributes:
        order: channels of the hidden states in the order of their power in front of the first layer, the largest first.
        moments: of each norm (:class:`octavo.rotation.learning.Moments`).
        values: M of each head of each decoder layer, float64 ``[heads, head_dim, head_dim]``.
    """

    order: Tensor
    moments: MomentFile
    values: list[Tensor]


class MomentFile:
    """Second moments of all norms, in a file: of a large model they are gigabytes."""

    def __init__(
        self, path: Path, target: Path, norms: int, width: int, device: torch.device
    ) -> None:
        """
        Args:
            path: the file; it is created.
            target: the output it is for, named in errors.
            norms: how many.
            width: channels of the hidden states.
            device: where they are wanted.

        Raises:
            WriteError: the space is not there.
        """
        size = blocks_of(width)
        shape = (norms, 2, width // size, size, size)
        count = 2 * norms * width * size
        nbytes = count * torch.float32.itemsize
        with explained(target, nbytes):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                # Where a mapped file has no room, writing to it ends the process.
                os.posix_fallocate(descriptor, 0, nbytes)
            finally:
                os.close(descriptor)
        self._device = device
        self._data = torch.from_file(str(path), shared=True, size=count).view(shape)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, weights = self._data[index].to(self._device)
        return inputs, weights

    def __setitem__(self, index: int, moments: tuple[Tensor, Tensor]) -> None:
        for place, one in zip(self._data[index], moments, strict=True):
            place.copy_(one)


def survey(
    decoder: Decoder,
    stream: CalibrationStream,
    place: Place,
    on_layer: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Run the samples through the model.

    Args:
        decoder: the model.
        stream: carries the samples, which are in front of the first layer.
        place: the output; the moments lie beside it.
        on_layer: called with the number of layers done.

    Raises:
        OctavoError: the space for moments is not there, a weight or an activation is NaN or infinite, or a layer has a
            tensor that this does not know.
    """
    count = len(decoder.layers)
    for index in range(count):
        _check_known(decoder, index)
    order = _by_power(stream)
    moments = MomentFile(
        place.edition.parent / "moments",
        place.target,
        count * len(READERS),
        decoder.config.hidden_size,
        decoder.device,
    )
    values = []
    for index in range(count):
        tensors = {name: decoder.checkpoint.read(name) for name in decoder.tensor_names(index)}
        for name, tensor in tensors.items():
            finite_amax(name, tensor)
        decoder.load(index, tensors)
        values.append(_survey_layer(decoder, stream, index, order, moments))
        stream.run(index, (index,), (), last=index + 1 == count)
        decoder.unload(index)
        on_layer(index + 1)
    return Survey(order, moments, values)


def _check_known(decoder: Decoder, index: int) -> None:
    """Raise if a decoder layer has tensors of which it is not known how they meet the hidden states."""
    linears = [name for group in READERS.values() for name in group] + list(WRITERS)
    known = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    known |= {f"{name}.weight" for name in (*READERS, *_UNTOUCHED)}
    prefix = f"{decoder.layer_name(index)}."
    for name in decoder.tensor_names(index):
        if name.removeprefix(prefix) not in known:
            raise OctavoError(
                f"{decoder.checkpoint.directory} has a tensor {name!r}, and how it meets the hidden states is not known: "
                "this architecture cannot be rotated. Quantize the checkpoint as it is."
            )


def _by_power(stream: CalibrationStream) -> Tensor:
    states = stream.states(0)
    batches = (states.read(index).float() for index in range(len(states.shape.batches)))
    powers = [_normed(batch).square().sum((0, 1)) for batch in batches]
    return torch.stack(powers).sum(0).argsort(descending=True, stable=True)


def _normed(hidden: Tensor) -> Tensor:
    return hidden * hidden.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()


def _survey_layer(
    decoder: Decoder, stream: CalibrationStream, index: int, order: Tensor, moments: MomentFile
) -> Tensor:
    """Moments of a loaded layer's norms; the axes of its values."""
    prefix = f"{decoder.layer_name(index)}."
    linears = {name.removeprefix(prefix): one for name, one in decoder.linears(index).items()}
    norms = dict(decoder.layers[index].named_modules())
    ((attention, block),) = decoder.attention_blocks(index)
    axes = torch.empty(0)
    for place, (norm, readers) in enumerate(READERS.items()):
        after = attention if place else None
        names = [f"{prefix}{name}" for name in readers]
        seen = stream.look(index, index, names, cache=False, after=after).moments
        gain = norms[norm].weight.float()
        weights = [linears[name].weight for name in readers]
        moments[index * len(READERS) + place] = _norm_moments(seen, gain, weights, order)
        if after is None:
            outputs = stream.look(index, index, [f"{attention}.o_proj"], cache=False).moments
            axes = _value_axes(seen, outputs, linears, block.head_dim)
    return axes


def _norm_moments(
    seen: Tensor, gain: Tensor, weights: list[Tensor], order: Tensor
) -> tuple[Tensor, Tensor]:
    """For :class:`octavo.rotation.learning.Moments`, from those of what a norm gives with its weight."""
    # A channel that the norm drops is neither seen nor read.
    back = torch.where(gain == 0, 0.0, 1 / gain)
    normed = seen * back * back.unsqueeze(1)
    normed /= normed.diagonal().mean().clamp_min(1e-30)
    channels = order.to(seen.device).view(-1, blocks_of(len(order)))
    read = torch.zeros(*channels.shape, channels.shape[1], device=seen.device)
    power = normed.diagonal()
    for weight in weights:
        columns = weight.float() * gain
        noise = (columns.square().sum(0) * power).sum().clamp_min(1e-30)
        for number, block in enumerate(channels):
            part = columns[:, block]
            read[number] += part.T @ part / (noise * len(weights))
    return normed[channels.unsqueeze(2), channels.unsqueeze(1)], read


def _value_axes(
    seen: Tensor, outputs: Tensor, linears: Mapping[str, torch.nn.Linear], size: int
) -> Tensor:
    """M of each head of values.

    Args:
        seen: moments of what ``v_proj`` reads.
        outputs: of what ``o_proj`` reads.
        linears: of the layer.
        size: channels of a head.
    """
    reader, writer = (linears[name].weight.float() for name in (VALUES, OUTPUTS))
    heads = len(reader) // size
    group = writer.shape[1] // size // heads
    axes = []
    for head in range(heads):
        rows = reader[head * size :][:size]
        # Cached, and averaged by attention; each of the heads that share them reads its own average.
        cached = rows @ seen @ rows.T
        places = [slice(q * size, (q + 1) * size) for q in range(head * group, (head + 1) * group)]
        averaged = torch.stack([outputs[place, place] for place in places]).mean(0)
        read = torch.stack([writer[:, place].T @ writer[:, place] for place in places]).sum(0)
        axes.append(value_axes(cached + averaged, read))
    return torch.stack(axes)
