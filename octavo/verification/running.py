"""An edition in an engine: does it load, what does it make of a text, what did the engine take of it?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.calibration.tokens import check_vocabulary
from octavo.checkpoint.hub import resolve_model
from octavo.engines import Engine, open_engine
from octavo.engines.vllm import VllmEngine
from octavo.engines.vllm_loaded import LoadedModel
from octavo.errors import OctavoError
from octavo.evaluation import builtin
from octavo.inspection import Inspection
from octavo.tokenizer import find_tokenizer

# Tokens that an engine scores.
_TOKENS = 512


@dataclass(frozen=True)
class Scores:
    """What an engine made of a short text.

    Attributes:
        engine: its name.
        text: ``builtin`` (see :mod:`octavo.evaluation.builtin`), or ``random`` token ids where the
            checkpoint has no tokenizer.
        tokens: how many were scored.
        nll: mean negative log-likelihood, in nats per token; None if it is not finite.
        reference_nll: of the reference, scored by the engine torch; None without one.
        chance: of a model that knows nothing: ``ln(vocabulary)``.
    """

    engine: str
    text: str
    tokens: int
    nll: float | None
    reference_nll: float | None
    chance: float


class Ran(NamedTuple):
    """What the checks of a run look at.

    Attributes:
        engine: its name.
        inspection: of the checkpoint.
        kv_scales: stored scales of keys and values, by canonical name.
        refusal: what the engine said, if it did not take the checkpoint.
        scores: None if so.
        loaded: what vLLM took; None of other engines.
    """

    engine: str
    inspection: Inspection
    kv_scales: Mapping[str, float]
    refusal: str | None = None
    scores: Scores | None = None
    loaded: LoadedModel | None = None


def run_engine(
    name: str,
    inspection: Inspection,
    kv_scales: Mapping[str, float],
    reference: str | Path | None,
) -> Ran:
    """Load the checkpoint in an engine and score a text; the reference too, in the engine torch."""
    model, ran = Path(inspection.model), Ran(name, inspection, kv_scales)
    try:
        with closing(open_engine(name, model)) as engine:
            loaded = engine.loaded() if isinstance(engine, VllmEngine) else None
            text, tokens = _text(model, engine)
            nll, chance = _mean_nll(engine, tokens), math.log(engine.vocab_size)
    except OctavoError as error:
        return ran._replace(refusal=str(error))
    expected = None
    if reference is not None:
        with closing(open_engine("transformers", resolve_model(reference))) as engine:
            expected = _mean_nll(engine, tokens)
    scores = Scores(name, text, len(tokens) - 1, nll, expected, chance)
    return ran._replace(scores=scores, loaded=loaded)


def _text(model: Path, engine: Engine) -> tuple[str, Tensor]:
    """The first tokens of the built-in text; of a checkpoint without tokenizer, random ones."""
    count = min(_TOKENS, engine.max_positions) + 1
    tokenizer = find_tokenizer(model)
    if tokenizer is not None:
        # More than enough tokens, and quickly made.
        text = "\n\n".join(itertools.islice(builtin.documents(), 2))
        ids = np.asarray(tokenizer(text, verbose=False)["input_ids"][:count], dtype=np.int64)
        check_vocabulary(ids, "the built-in text", engine.vocab_size)
        return "builtin", torch.from_numpy(ids)
    generator = torch.Generator().manual_seed(0)
    return "random", torch.randint(engine.vocab_size, (count,), generator=generator)


def _mean_nll(engine: Engine, tokens: Tensor) -> float | None:
    """In nats per token; None if it is not finite."""
    (scores,) = engine.score([tokens])
    nll = -scores.logprobs.double().mean().item()
    return nll if math.isfinite(nll) else None
