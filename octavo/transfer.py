"""What goes from one checkpoint to another as it is: unquantized tensors and small files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint, CheckpointWriter
from octavo.edition import Edition

# Small files that belong to a checkpoint, whatever the format of its weights.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)

_PIECE_BYTES = 4 << 20


def carry_files(source: Path, writer: CheckpointWriter) -> None:
    """Copy the small files of the directory ``source``."""
    for file in CARRIED_FILES:
        if (source / file).is_file():
            writer.copy(source / file)


def meta(source: Edition | Checkpoint, name: str) -> Tensor:
    """The tensor ``name`` on the meta device."""
    info = source[name]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def carry_tensors(
    source: Edition,
    names: Iterable[str],
    writer: CheckpointWriter,
    encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    on_piece: Callable[[str, Tensor], None] = lambda name, piece: None,
) -> None:
    """Copy unquantized tensors, in pieces where the output does not cut or pad them.

    Args:
        source: has them under canonical names.
        names: which.
        writer: has a place for each of the names the dialect gives them.
        encode: canonical tensors to the output's names and shapes; works on meta tensors.
        on_piece: called with the name and each piece of the tensor, one-dimensional in its dtype.
    """
    buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
    for name in names:
        whole = meta(source, name)
        copies = encode({name: whole})
        stored = source.stored(name).pieces
        if (
            len(stored) > 1
            or stored[0].rows
            or any(c.shape != whole.shape for c in copies.values())
        ):
            tensor = source.read(name)
            on_piece(name, tensor.reshape(-1))
            for copy, part in encode({name: tensor}).items():
                writer.write(copy, part)
            continue
        for start in range(0, whole.nbytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, whole.nbytes - start)]
            source.checkpoint.read_bytes(stored[0].name, start, piece)
            on_piece(name, piece.view(whole.dtype))
            for copy in copies:
                writer.write_bytes(copy, start, piece)
        for copy in copies:
            writer.finish(copy)
