"""The edition's own account of how it was made: ``octavo.json``, written beside the weights.

Like everything in a checkpoint it is data from elsewhere, and checked before use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, PositiveInt, ValidationError

from octavo.errors import OctavoError
from octavo.reporting.validation import Frozen, first_fault, read_bounded
from octavo.scheme import Scheme

FILE = "octavo.json"

# What float32 and BF16 can hold.
Amax = Annotated[float, Field(ge=0, lt=2**128)]

# A thousand layers need less than one megabyte.
_LIMIT = 64 << 20


class CalibrationRecord(Frozen):
    """The tokens the scales were taken on.

    Attributes:
        source: name of the text, or of the file that held it.
        text_field: its field or column.
        samples: sequences drawn.
        seq_len: tokens in each.
        seed: of the draw.
    """

    source: str
    text_field: str
    samples: PositiveInt
    seq_len: PositiveInt
    seed: int


class RotationRecord(Frozen):
    """The axes that the model was brought into before (``octavo rotate``).

    Attributes:
        octavo: version of Octavo.
        calibration: on which tokens they were chosen.
        noise: the noise of FP8 where hidden states are read, as a share of that in the model's own axes.
    """

    octavo: str
    calibration: CalibrationRecord
    noise: Annotated[float, Field(ge=0, le=1)]


class WeightError(Frozen):
    """What quantization did to one weight.

    Attributes:
        sqnr_db: signal to quantization noise ratio, ``10 log10(Σw² / Σ(w - ŵ)²)``, in dB; None
            where there is no noise: the weight came through exactly.
        underflow: share of its nonzero values that became zero, 0 to 1.
    """

    sqnr_db: Annotated[float, Field(ge=-1000, le=1000)] | None
    underflow: Annotated[float, Field(ge=0, le=1)]


class BudgetRecord(Frozen):
    """The loss that was allowed, and what was kept in the model's dtype, or moved to dynamic inputs, for it.

    Attributes:
        max_kl: mean KL(model ‖ edition) allowed, in nats; None where perplexity was limited.
        max_perplexity_increase: allowed, as a share.
        data: name of the text that the edition was measured on, its second half; its first half had a say in the choice.
        windows: measured.
        seq_len: tokens in each.
        kl: found, in nats.
        kl_standard_error: its standard error.
        perplexity_ratio: found, edition over model.
        kept: linear layers.
        bytes: that the edition is larger by.
        dynamic: linear layers that are quantized, with dynamic inputs.
        tries: editions that were made to find it.
    """

    max_kl: float | None
    max_perplexity_increase: float | None
    data: str
    windows: PositiveInt
    seq_len: PositiveInt
    kl: float
    kl_standard_error: float | None
    perplexity_ratio: float
    kept: tuple[str, ...]
    bytes: Annotated[int, Field(ge=0)]
    dynamic: tuple[str, ...] = ()
    tries: PositiveInt


class Record(Frozen):
    """How an edition was made.

    Attributes:
        octavo: version of Octavo.
        torch: version of PyTorch.
        transformers: version of transformers.
        base_model: directory name of the checkpoint it was made from.
        format: dialect.
        scheme: what was quantized and how.
        rotation: the axes that checkpoint is in; None if they are the original's.
        calibration: on which tokens; None without calibration.
        amax: largest absolute value of each weight (``<module>.weight``), and what the scales of each linear
            input (``<module>``), key and value (``<block>.k``, ``<block>.v``) were taken from.
        weights: what quantization did to the weight of each quantized module, by module name;
            empty in editions made before it was recorded.
        budget: what the edition was allowed to lose; None where nothing was said.
    """

    # A later Octavo may record more; what this one knows is still of use.
    model_config = ConfigDict(extra="ignore")

    octavo: str
    torch: str
    transformers: str
    base_model: str
    format: str
    scheme: Scheme
    rotation: RotationRecord | None = None
    calibration: CalibrationRecord | None
    amax: dict[str, Amax]
    weights: Annotated[dict[str, WeightError], Field(default_factory=dict)]
    budget: BudgetRecord | None = None


def read_record(edition: Path) -> Record | None:
    """The record in directory ``edition``; None where there is none (another tool's edition).

    Raises:
        OctavoError: there is one, but it is not what Octavo writes.
    """
    path = edition / FILE
    if not path.exists():
        return None
    try:
        return Record.model_validate_json(read_bounded(path, _LIMIT))
    except ValidationError as error:
        raise OctavoError(
            f"{path} is not a record of Octavo: {first_fault(error)}. Expected the JSON object that "
            "`octavo quantize` writes. Restore it, or remove it: the report then does without its "
            "per-layer part."
        ) from None
