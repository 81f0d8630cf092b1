"""A checkpoint read under canonical names, whatever dialect it is written in.

A BF16 checkpoint is its own canonical form; an FP8 edition is a renaming away from it, or a joining
of the pieces a dialect cuts tensors into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint, read_json
from octavo.errors import OctavoError
from octavo.formats import FORMATS, Decoded, Json, Stored
from octavo.formats.dialect import MODEL_CONFIG, Piece, without_quantization
from octavo.scheme import BLOCK, Scheme

# In config.json: that the model is in other axes than the original, and how they were chosen (:mod:`octavo.rotating`).
ROTATION_KEY = "octavo_rotation"

_SCALES = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")
# JSON files that say what a checkpoint is, besides config.json.
_FILES = ("hf_quant_config.json", MODEL_CONFIG)


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Edition:
    """Read access to a BF16 checkpoint or an FP8 edition.

    Attributes:
        checkpoint: the files.
        config: the model's ``config.json`` in Hugging Face's terms, without the quantization.
        dialect: the name of its dialect, None if it is not quantized.
        scheme: what its config promises, None if it is not quantized.
    """

    def __init__(self, checkpoint: Checkpoint, model_config: Json | None = None) -> None:
        """
        Args:
            checkpoint: the files.
            model_config: the model's ``config.json``, for a dialect that does not carry it.

        Raises:
            OctavoError: the config is of no known dialect, of several, or of one Octavo cannot
                compute.
        """
        self.checkpoint = checkpoint
        files = _description(checkpoint)
        if model_config is not None:
            files[MODEL_CONFIG] = without_quantization(model_config)
        self.dialect = _dialect(checkpoint.directory, files)
        self.config = without_quantization(checkpoint.config)
        self.scheme: Scheme | None = None
        self._stored = {name: Stored((Piece(name),)) for name in checkpoint}
        if self.dialect is not None:
            infos = {name: checkpoint[name] for name in checkpoint}
            decoded: Decoded = FORMATS[self.dialect].decode(files, infos)
            self.config, self.scheme, self._stored = decoded

    @property
    def rotation(self) -> Json | None:
        """How the axes it is in were chosen, None if they are the model's own."""
        found: Json | None = self.config.get(ROTATION_KEY)
        return found

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.checkpoint.directory

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors together."""
        return self.checkpoint.nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __getitem__(self, name: str) -> TensorInfo:
        stored = self._stored[name]
        entries = [self.checkpoint[piece.name] for piece in stored.pieces]
        shape = list(entries[0].shape)
        if shape:
            sizes = (
                piece.rows[1] - piece.rows[0] if piece.rows else entry.shape[stored.axis]
                for piece, entry in zip(stored.pieces, entries, strict=True)
            )
            shape[stored.axis] = sum(sizes)
        return TensorInfo(entries[0].dtype, tuple(shape))

    def stored(self, name: str) -> Stored:
        """Where the tensor with the canonical name ``name`` lies."""
        return self._stored[name]

    def file_of(self, name: str) -> Path:
        """The first shard that holds some of the tensor with the canonical name ``name``."""
        return self.checkpoint.file_of(self._stored[name].pieces[0].name)

    def is_quantized(self, module: str) -> bool:
        """Whether the linear layer ``module`` has an FP8 weight."""
        weight = f"{module}.weight"
        return weight in self and self[weight].dtype == torch.float8_e4m3fn

    def quantized_modules(self) -> list[str]:
        """The linear layers with an FP8 weight, in the files' order."""
        modules = (name.removesuffix(".weight") for name in self if name.endswith(".weight"))
        return [module for module in modules if self.is_quantized(module)]

    def weight_scale_shape(self, module: str) -> tuple[int, ...]:
        """The canonical shape of a weight scale, by what is stored: ``()``, ``[out, 1]``, or that of blocks.

        Raises:
            OctavoError: it has none of these shapes.
        """
        name, weight = f"{module}.weight_scale", f"{module}.weight"
        if weight not in self or len(self[weight].shape) != 2:
            raise OctavoError(
                f"tensor {self._stored[name].pieces[0].name!r} in {self.file_of(name)} belongs to no "
                f"weight matrix {weight!r}. The edition is damaged: quantize the original again."
            )
        rows, columns = self[weight].shape
        found = self[name].shape
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {
            (): (),
            (1,): (),
            (rows,): (rows, 1),
            (rows, 1): (rows, 1),
            blocks: blocks,
        }
        if found not in shapes:
            raise OctavoError(
                f"tensor {self._stored[name].pieces[0].name!r} in {self.file_of(name)} has shape "
                f"{list(found)}, expected one value, {rows} (one a channel) or {list(blocks)} (one a "
                f"block of {BLOCK} x {BLOCK}) for a weight of {rows} x {columns}. The edition is damaged, "
                "or of a scheme Octavo does not read."
            )
        return shapes[found]

    def read(self, name: str) -> Tensor:
        """The tensor with the canonical name ``name``, as stored.

        Scales are brought to the canonical form: float32, a scalar, ``[out, 1]`` or one a block.

        Raises:
            OctavoError: a scale is not positive and finite.
        """
        tensor = self.read_unchecked(name)
        if name.endswith(_SCALES) and not (tensor.isfinite() & (tensor > 0)).all():
            raise OctavoError(
                f"tensor {self._stored[name].pieces[0].name!r} in {self.file_of(name)} holds a scale of "
                f"{_worst(tensor)}; expected positive, finite numbers. The edition is damaged or was "
                "never calibrated: quantize the original checkpoint again."
            )
        return tensor

    def read_unchecked(self, name: str) -> Tensor:
        """:meth:`read`, whatever a scale's value."""
        tensor = self._join(self._stored[name])
        if not name.endswith(_SCALES):
            return tensor
        if name.endswith(".weight_scale"):
            return tensor.float().reshape(
                self.weight_scale_shape(name.removesuffix(".weight_scale"))
            )
        return tensor.float().reshape(()) if tensor.numel() == 1 else tensor.float()

    def _join(self, stored: Stored) -> Tensor:
        pieces = [self._read_piece(piece) for piece in stored.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=stored.axis)

    def _read_piece(self, piece: Piece) -> Tensor:
        if piece.rows is None:
            return self.checkpoint.read(piece.name)
        entry = self.checkpoint[piece.name]
        begin, end = piece.rows
        width = entry.nbytes // max(entry.shape[0], 1)
        buffer = torch.empty((end - begin) * width, dtype=torch.uint8)
        self.checkpoint.read_bytes(piece.name, begin * width, buffer)
        return buffer.view(entry.dtype).view(end - begin, *entry.shape[1:])


def _worst(scale: Tensor) -> float:
    return scale[~(scale.isfinite() & (scale > 0))].reshape(-1)[0].item()


def _description(checkpoint: Checkpoint) -> dict[str, Json]:
    """The JSON files that say what the checkpoint is."""
    files = {"config.json": checkpoint.config}
    for name in _FILES:
        if (checkpoint.directory / name).exists():
            files[name] = read_json(checkpoint.directory / name)
    section = checkpoint.config.get("quantization_config")
    if section is not None and not isinstance(section, dict):
        raise OctavoError(
            f"{checkpoint.directory / 'config.json'} has a quantization_config that is "
            f"a {type(section).__name__}, expected an object. Restore the file."
        )
    return files


def _dialect(directory: Path, files: dict[str, Json]) -> str | None:
    """The name of the one dialect the files are of; None for a checkpoint without quantization."""
    config = files["config.json"]
    section = config.get("quantization_config")
    found = _recognized(files)
    if len(found) > 1:
        raise OctavoError(
            f"The JSON files in {directory} describe several dialects: {', '.join(found)}. "
            "Keep the one that the tensors are written in, and remove what describes the others "
            "(quantization_config in config.json, hf_quant_config.json)."
        )
    unknown = section is not None and not _recognized({"config.json": config})
    if unknown or (not found and "hf_quant_config.json" in files):
        method = section.get("quant_method") if section else None
        raise OctavoError(
            f"{directory / 'config.json'} describes a quantization of an unknown dialect "
            f"(quant_method {method!r}). Octavo reads {', '.join(FORMATS)}."
        )
    return found[0] if found else None


def _recognized(files: dict[str, Json]) -> list[str]:
    return [name for name, dialect in FORMATS.items() if dialect.recognizes(files)]
