"""A checkpoint read under canonical names, whatever dialect it is written in.

A BF16 checkpoint is its own canonical form; an FP8 edition is one renaming away from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint, Entry, read_json
from octavo.errors import OctavoError
from octavo.formats import FORMATS
from octavo.scheme import Scheme

_SCALES = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")


class Edition:
    """Read access to a BF16 checkpoint or an FP8 edition.

    Attributes:
        checkpoint: the files.
        dialect: the name of its dialect, None if it is not quantized.
        scheme: what its config promises, None if it is not quantized.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """
        Raises:
            OctavoError: the config is of no known dialect, or of one Octavo cannot compute.
        """
        self.checkpoint = checkpoint
        section = _quantization(checkpoint)
        self.dialect = None if section is None else _dialect(checkpoint.directory, section)
        self.scheme: Scheme | None = None
        self._stored = {name: name for name in checkpoint}
        if self.dialect is not None and section is not None:
            dialect = FORMATS[self.dialect]
            self.scheme = dialect.scheme(section)
            self._stored = {dialect.canonical_name(name): name for name in checkpoint}

    @property
    def directory(self) -> Path:
        """Where the files are."""
        return self.checkpoint.directory

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Entry:
        return self.checkpoint[self._stored[name]]

    def file_of(self, name: str) -> Path:
        """The shard that holds the tensor with the canonical name ``name``."""
        return self.checkpoint.file_of(self._stored[name])

    def is_quantized(self, module: str) -> bool:
        """Whether the linear layer ``module`` has an FP8 weight."""
        weight = f"{module}.weight"
        return weight in self and self[weight].dtype == torch.float8_e4m3fn

    def has_channel_scales(self, module: str) -> bool:
        """Whether each output channel of ``module`` has a weight scale of its own."""
        name = f"{module}.weight_scale"
        return name in self and self[name].nbytes > self[name].dtype.itemsize

    def read(self, name: str) -> Tensor:
        """The tensor with the canonical name ``name``, as stored.

        Scales are brought to the canonical form: float32, a scalar or ``[out, 1]``.

        Raises:
            OctavoError: a scale is not positive and finite.
        """
        tensor = self.checkpoint.read(self._stored[name])
        if not name.endswith(_SCALES):
            return tensor
        scale = tensor.float()
        scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
        if not (scale.isfinite() & (scale > 0)).all():
            raise OctavoError(
                f"tensor {self._stored[name]!r} in {self.file_of(name)} holds a scale of "
                f"{_worst(scale)}; expected positive, finite numbers. The edition is damaged or was "
                "never calibrated: quantize the original checkpoint again."
            )
        return scale


def _worst(scale: Tensor) -> float:
    return scale[~(scale.isfinite() & (scale > 0))][0].item()


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The section that describes the quantization; None if there is none."""
    legacy = checkpoint.directory / "hf_quant_config.json"
    section = checkpoint.config.get("quantization_config")
    if section is None and legacy.exists():
        return read_json(legacy)
    if section is not None and not isinstance(section, dict):
        raise OctavoError(
            f"{checkpoint.directory / 'config.json'} has a quantization_config that is "
            f"a {type(section).__name__}, expected an object. Restore the file."
        )
    return section


def _dialect(directory: Path, section: dict[str, Any]) -> str:
    for name, dialect in FORMATS.items():
        if dialect.recognizes(section):
            return name
    raise OctavoError(
        f"{directory / 'config.json'} describes a quantization of an unknown dialect "
        f"(quant_method {section.get('quant_method')!r}). Octavo reads {', '.join(FORMATS)}."
    )
