"""``octavo.quantize_within``: the smallest edition whose loss stays within a budget.

A part of the model costs less if its inputs are dynamic, which takes no bytes but some of the engine's time, and nothing if it
keeps the model's dtype, which takes its bytes. Losses of parts add up well enough to choose by, not to promise by: each choice is quantized and measured on text
that had no say in it, and what was measured corrects the next choice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from octavo.analysis import linear_losses
from octavo.budget import Budget, Choice, Part, cheapest
from octavo.calibration import Calibration
from octavo.calibration.text import BUILTIN
from octavo.checkpoint import Checkpoint, Workspace
from octavo.checkpoint.disk import sync, write_file
from octavo.checkpoint.hub import resolve_model
from octavo.errors import OctavoError
from octavo.evaluation import DivergenceResult, evaluate
from octavo.evaluation.progress import OnProgress, silent
from octavo.evaluation.text import load_tokens
from octavo.evaluation.windows import cut
from octavo.formats import get_format
from octavo.pipeline import Progress, QuantizeResult, quantize
from octavo.preflight import check_target
from octavo.reporting.record import FILE as RECORD
from octavo.reporting.record import BudgetRecord
from octavo.scheme import Scheme
from octavo.units import format_bytes

# Windows that parts are measured on, each part alone, and tokens in each: enough to tell which cost most.
_WINDOWS, _PART_SEQ_LEN = 4, 256

# Tokens in a window that an edition is measured on, unless the model has fewer positions.
_SEQ_LEN = 2048

# Editions that are made at most.
_TRIES = 6

# An aim somewhat below the limit, since a prediction is a few per cent off; and how far below it an edition may be
# before a smaller one is looked for.
_AIM, _LOOSE = 0.97, 0.85


class Within(NamedTuple):
    """What came of a budget.

    Attributes:
        result: of the quantization that made the edition.
        record: what the edition keeps of it.
    """

    result: QuantizeResult
    record: BudgetRecord


class _Try(NamedTuple):
    """An edition, where it is, and what it loses."""

    choice: Choice
    path: Path
    result: QuantizeResult
    loss: float
    measured: DivergenceResult


def quantize_within(
    model: str | Path,
    output: str | Path,
    budget: Budget,
    *,
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
    format: str = "modelopt",
    device: str = "auto",
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_measured: OnProgress = silent,
) -> Within:
    """Write the smallest FP8 edition that a budget allows: with as few bytes of linear layers kept in the model's dtype, and among
    such editions with as few dynamic inputs beside static ones, where the dialect has a place for these.

    If all of them may be quantized, all are. Otherwise what each part costs is measured on the first half of the budget's
    text as :func:`octavo.analyze` does, the cheapest choice is made, and the edition is measured on the second half; up to
    six editions are made until one fits and none that is much cheaper would. Measuring holds both models in memory.

    Args:
        model: as for :func:`octavo.quantize`, like all that is not named here.
        output: the directory to create; it appears only when an edition fits the budget.
        budget: what loss is acceptable.
        on_step: called with what is done next, a sentence.
        on_measured: called as parts and editions are measured.

    Raises:
        OctavoError: as :func:`octavo.quantize`, or no edition of the scheme is within the budget; says how near one came.
    """
    scheme, calibration = scheme or Scheme(), calibration or Calibration()
    dialect = get_format(format, scheme)
    source, target = resolve_model(model), Path(output)
    check_target(source, target)
    if budget.data == calibration.source != BUILTIN:
        raise OctavoError(
            f"The budget's text {Path(budget.data).name} is what scales are calibrated on: what an edition loses on other "
            "text would not be measured. Pass another text as --budget-data."
        )
    seq_len = budget.seq_len or min(_SEQ_LEN, _positions(source))
    with Workspace(target, overwrite=overwrite) as work:
        search = _Search(
            source=source,
            budget=budget,
            halves=_halves(source, budget.data, seq_len, work.directory),
            seq_len=seq_len,
            directory=work.directory,
            target=target,
            scheme=scheme,
            calibration=calibration,
            device=device,
            mixes=dialect.mixes(scheme.kind),
            options={"format": format, "device": device, "shard_size": shard_size},
            on_step=on_step,
            on_progress=on_progress,
            on_measured=on_measured,
        )
        best, tries = search.run()
        record = _record(budget, best, tries)
        _keep_record(best.path, record)
        shutil.rmtree(work.edition)
        best.path.rename(work.edition)
        work.publish()
    return Within(best.result._replace(output=str(target)), record)


class _Search(NamedTuple):
    """A search for the smallest edition within a budget."""

    source: Path
    budget: Budget
    halves: tuple[Path, Path]
    seq_len: int
    directory: Path
    target: Path
    scheme: Scheme
    calibration: Calibration
    device: str
    mixes: bool
    options: dict[str, Any]
    on_step: Callable[[str], None]
    on_progress: Callable[[Progress], None]
    on_measured: OnProgress

    def run(self) -> tuple[_Try, int]:
        """The best edition, and how many were made."""
        limit = self.budget.limit
        tries = [self._try(Choice(), 0)]
        if tries[0].loss <= limit:
            return tries[0], 1
        parts = self._parts()
        most = _most(parts)
        while len(tries) < _TRIES:
            allowed = _allowed([(one.choice.left(parts), one.loss) for one in tries], _AIM * limit)
            chosen = cheapest(parts, allowed)
            if len(chosen.kept) == len(parts):
                chosen = most
            if any(chosen == one.choice for one in tries):
                break
            tries.append(self._try(chosen, len(tries)))
            self._drop_all_but_the_best(tries)
            if _LOOSE * limit <= tries[-1].loss <= limit:
                break
        best = self._best(tries)
        if best is None:
            raise self._unreachable(tries, parts, most)
        return best, len(tries)

    def _best(self, tries: Sequence[_Try]) -> _Try | None:
        fitting = [one for one in tries if one.loss <= self.budget.limit]
        return min(fitting, key=lambda one: one.choice.cost, default=None)

    def _drop_all_but_the_best(self, tries: Sequence[_Try]) -> None:
        """Disk space is that of two editions."""
        best = self._best(tries)
        for one in tries:
            if best is None or one.path != best.path:
                shutil.rmtree(one.path, ignore_errors=True)

    def _try(self, choice: Choice, number: int) -> _Try:
        kept, moved = _modules(choice.kept), _modules(choice.moved)
        but = f" but {len(kept)}, which take {format_bytes(choice.bytes)} more" if kept else ""
        told = f"; {len(moved)} with dynamic inputs" if moved else ""
        self.on_step(f"quantizing all linear layers{but}{told}")
        path = self.directory / f"edition-{number}"
        scheme = self.scheme.model_copy(
            update={"exclude": self.scheme.exclude + kept, "dynamic": self.scheme.dynamic + moved}
        )
        result = quantize(
            self.source,
            path,
            scheme=scheme,
            calibration=self.calibration,
            on_progress=self.on_progress,
            **self.options,
        )
        self.on_step("measuring it")
        measured = evaluate(
            path,
            task="kl",
            data=self.halves[1],
            reference=self.source,
            seq_len=self.seq_len,
            limit=self.budget.windows,
            device=self.device,
            on_progress=self.on_measured,
        )
        assert isinstance(measured, DivergenceResult)
        loss = measured.kl if self.budget.max_kl else measured.perplexity_ratio - 1
        self.on_step(f"{self.budget.measure}: {self.budget.told(loss)}")
        return _Try(choice, path, result, loss, measured)

    def _parts(self) -> list[Part]:
        """What each part that can be kept or moved costs alone."""
        self.on_step("measuring what each part costs")
        losses = linear_losses(
            self.source,
            self.directory,
            self.target,
            scheme=self.scheme,
            dynamic=self.mixes,
            calibration=self.calibration,
            data=self.halves[0],
            windows=_WINDOWS,
            seq_len=min(_PART_SEQ_LEN, self.seq_len),
            device=self.device,
            on_progress=self.on_measured,
        )
        return [
            Part(loss.modules, loss.bytes, loss.kl, None if dynamic is None else dynamic.kl)
            for loss, dynamic in losses
        ]

    def _unreachable(
        self, tries: Sequence[_Try], parts: Sequence[Part], most: Choice
    ) -> OctavoError:
        """Why nothing fits, with the least that can be had measured."""
        best = min(tries, key=lambda one: one.loss)
        if not any(one.choice == most for one in tries):
            best = min(best, self._try(most, len(tries)), key=lambda one: one.loss)
        cached = self.scheme.kv_cache == "fp8"
        advice = " Or leave the KV cache in its dtype (--kv-cache none)." if cached else ""
        return OctavoError(
            f"No edition of the scheme {self.scheme.kind} reaches a {self.budget.measure} of "
            f"{self.budget.told(self.budget.limit)}: with {len(best.choice.kept)} of {len(parts)} groups of linear layers kept it is "
            f"still {self.budget.told(best.loss)}. Allow more, or choose another scheme or --rounding.{advice}"
        )


def _allowed(seen: Sequence[tuple[float, float]], aim: float) -> float:
    """How much the losses of what is quantized may add up to.

    Args:
        seen: of each edition so far, what they added up to and what it lost. Part of the loss may be there whatever is
            kept, the KV cache's for one: after the first edition a line through the last two is followed.
        aim: what is to be lost.
    """
    (left, loss), slope = seen[-1], 0.0
    if len(seen) > 1 and left != seen[-2][0]:
        slope = (loss - seen[-2][1]) / (left - seen[-2][0])
    if slope <= 0:
        return left * aim / loss
    return left - (loss - aim) / slope


def _most(parts: Sequence[Part]) -> Choice:
    """All kept but what costs least: a quantized edition has something quantized."""
    last = min(parts, key=lambda part: part.kl - part.gain)
    kept = tuple(part for part in parts if part is not last)
    return Choice(kept, (last,) if last.gain else ())


def _modules(parts: Iterable[Part]) -> tuple[str, ...]:
    return tuple(module for part in parts for module in part.modules)


def _positions(source: Path) -> int:
    with closing(Checkpoint(source)) as checkpoint:
        return int(checkpoint.config["max_position_embeddings"])


def _halves(source: Path, data: str, seq_len: int, directory: Path) -> tuple[Path, Path]:
    """The budget's text in two files of token ids: to choose on, and to verify on."""
    tokens = load_tokens(data, source)
    middle = len(tokens) // 2
    # Complains where the text is too short, or a window too long.
    cut(len(tokens) - middle, seq_len, None, limit=None, max_positions=_positions(source))
    return (
        _save(tokens[:middle], directory / "choose.npy"),
        _save(tokens[middle:], directory / "verify.npy"),
    )


def _save(tokens: Tensor, path: Path) -> Path:
    np.save(path, tokens.numpy())
    return path


def _record(budget: Budget, best: _Try, tries: int) -> BudgetRecord:
    measured = best.measured
    return BudgetRecord(
        max_kl=budget.max_kl,
        max_perplexity_increase=budget.max_perplexity_increase,
        data=Path(budget.data).name,
        windows=measured.windows,
        seq_len=measured.seq_len,
        kl=measured.kl,
        kl_standard_error=measured.kl_standard_error,
        perplexity_ratio=measured.perplexity_ratio,
        kept=_modules(best.choice.kept),
        bytes=best.choice.bytes,
        dynamic=_modules(best.choice.moved),
        tries=tries,
    )


def _keep_record(edition: Path, record: BudgetRecord) -> None:
    """Add to the edition's own account."""
    path = edition / RECORD
    account = json.loads(path.read_text()) | {"budget": record.model_dump(mode="json")}
    write_file(path, (json.dumps(account, indent=2, ensure_ascii=False) + "\n").encode())
    sync(path)
